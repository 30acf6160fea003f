"""Who may import whom: core knows neither Ray nor the rooms around it, and the leaves know nobody."""

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
    """Return every raydc module that a file names in an import, inside functions too."""
    package = ".".join(["raydc", *path.relative_to(ROOT).parent.parts])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("raydc", "ray")}


def test_core_is_imported_without_ray_and_without_the_rooms_around_it():
    assert len(CORE) > 15
    outside = [m for m in loaded_by(*CORE) if m != "raydc" and not f"{m}.".startswith("raydc.core.")]
    # The package itself offers Config, which stands on the leaves.
    assert set(outside) <= {"raydc.config", "raydc.errors", "raydc.presets", "raydc.secrets"}


def test_no_core_module_names_a_room_outside_core_or_ray():
    for path in sorted((ROOT / "core").rglob("*.py")):
        for name in imports_of(path):
            assert name == "raydc" or name.startswith("raydc.core"), f"{path.name} imports {name}"
            assert name != "raydc" or path.name == "__init__.py", f"{path.name} imports raydc itself"


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("errors", set()),
        ("schema", set()),
        ("secrets", {"errors"}),
        ("presets", set()),
        ("config", {"errors", "presets", "secrets"}),
        ("s3", {"errors", "secrets"}),
        ("lake", {"errors", "s3", "secrets"}),
        ("slices", {"errors", "lake", "schema"}),
        ("repeats", {"lake", "slices"}),
        ("lease", {"errors", "lake"}),
        ("signals", {"lease"}),
        ("rundir", {"config", "errors", "lake", "lease", "schema", "secrets"}),
        ("model", {"core", "errors", "lake", "schema"}),
    ],
)
def test_a_room_imports_only_those_below_it(room, allowed):
    rooms = {name.split(".")[1] for name in imports_of(ROOT / f"{room}.py") if name.startswith("raydc.")}
    assert rooms <= allowed
    assert "ray" not in imports_of(ROOT / f"{room}.py")


def test_a_model_is_loaded_and_labels_without_ray():
    loaded = loaded_by("raydc.model", "raydc.labelling", "raydc.stages.profile", "raydc.stages.publish")
    assert "raydc.cluster" not in loaded


def test_the_way_of_the_rows_to_the_workers_loads_no_torch():
    script = "import sys, raydc.stages.blocks; assert not {'torch', 'faiss', 'sklearn'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_loads_neither_torch_nor_ray():
    script = "import sys, raydc; raydc.Config; assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'raydc' has no attribute 'nothing'"):
        raydc.nothing  # noqa: B018
