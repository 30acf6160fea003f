"""Who may import whom: one table for every wing. Core knows neither Ray nor the rooms around it."""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import raydc
import raydc.core

ROOT = Path(raydc.__file__).parent
CORE = sorted(m.name for m in pkgutil.walk_packages(raydc.core.__path__, "raydc.core."))
MODULES = {".".join(["raydc", *p.relative_to(ROOT).with_suffix("").parts]): p for p in sorted(ROOT.rglob("*.py"))}

# Wing -> the wings that it may import, itself aside. From the ground up; a wing that is not named here fails.
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "core": set(),
    "storage": {"errors"},
    "config": {"core", "errors", "storage"},
    "data": {"config", "core", "errors", "storage"},
    "model": {"core", "data", "errors", "storage"},
    "runfolder": {"config", "core", "data", "errors", "model", "storage"},
    "runtime": {"config", "core", "data", "errors", "model", "runfolder", "storage"},
    "labeling": {"core", "data", "errors", "model", "runfolder", "storage"},
    "tables": {"config", "data", "errors", "runfolder", "storage"},
    "report": {"core", "data", "runfolder"},
}
FLOORS["stages"] = set(FLOORS)
FLOORS["pipeline"] = set(FLOORS)
FLOORS["commands"] = set(FLOORS)
FLOORS["cli"] = set(FLOORS)
FLOORS["__main__"] = {"cli"}
# The public names, handed on.
FLOORS["__init__"] = set(FLOORS)

# The wings that Ray's processes need; all others import none of it.
WITH_RAY = {"runtime", "stages", "pipeline", "commands", "cli"}

SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "ray" not in sys.modules, f"{name} imports ray"
print("\\n".join(sorted(m for m in sys.modules if m.split(".")[0] == "raydc")))
"""


def loaded_by(*names: str) -> list[str]:
    """Return the raydc modules that a fresh interpreter has loaded after it imported these, and check for Ray."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imports_of(path: Path) -> set[str]:
    """Return every module of raydc or Ray that a file names in an import, inside functions too."""
    package = ".".join(["raydc", *path.relative_to(ROOT).parent.parts])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in ("raydc", "ray")}


def wing_of(module: str) -> str:
    """Return the first name below raydc; __init__ for the package itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_wing_imports_only_those_below_it(module):
    wing, names = wing_of(module), imports_of(MODULES[module])
    others = {wing_of(name) for name in names if name.split(".")[0] == "raydc" and name != "raydc"} - {wing}
    assert wing in FLOORS, f"{module}: name the wing {wing} in the table of floors"
    # `from raydc import Config` names an attribute of the package, not a wing.
    assert {o for o in others if o in FLOORS} <= FLOORS[wing]
    if wing not in WITH_RAY:
        assert not [name for name in names if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("module", [m for m in MODULES if wing_of(m) == "stages"])
def test_a_stage_never_imports_a_stage(module):
    assert not [name for name in imports_of(MODULES[module]) if name.startswith("raydc.stages")]


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module: {n.removesuffix(".__init__") for n in imports_of(path)} & set(MODULES)
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_core_is_imported_without_ray_and_without_the_rooms_around_it():
    assert len(CORE) > 15
    outside = [m for m in loaded_by(*CORE) if m != "raydc" and not f"{m}.".startswith("raydc.core.")]
    assert not outside


def test_a_model_is_loaded_and_labels_without_ray():
    loaded = loaded_by("raydc.model", "raydc.labeling.label_slice", "raydc.stages.profile", "raydc.stages.publish")
    assert "raydc.runtime.session" not in loaded


def test_the_way_of_the_rows_to_the_workers_loads_no_torch():
    script = "import sys, raydc.runtime.row_dataset; assert not {'torch', 'faiss', 'sklearn'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_settings_load_neither_torch_nor_ray_nor_pyarrow():
    script = "import sys, raydc.config; assert not {'torch', 'ray', 'pyarrow', 'faiss', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_loads_neither_torch_nor_ray():
    script = "import sys, raydc; raydc.Config; assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'raydc' has no attribute 'nothing'"):
        raydc.nothing  # noqa: B018
