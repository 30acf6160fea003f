"""The bounds of the house: how long a file, a class and a function may be, and what is built by keywords."""

import ast
from pathlib import Path

import pytest

import raydc

ROOT = Path(raydc.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_ROOMS, MOST_IN_FILE, MOST_IN_CLASS, MOST_IN_FUNCTION, FEWEST_BY_KEYWORD = 20, 450, 200, 60, 5


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def is_positional_dataclass(node: ast.ClassDef) -> bool:
    """Return whether five or more fields may be given by their places."""
    made = [ast.unparse(d) for d in node.decorator_list if "dataclass" in ast.unparse(d)]
    fields = [s for s in node.body if isinstance(s, ast.AnnAssign)]
    places = [ast.unparse(f.annotation) for f in fields]
    places = places[: places.index("KW_ONLY")] if "KW_ONLY" in places else places
    return bool(made) and "kw_only=True" not in made[0] and len(places) >= FEWEST_BY_KEYWORD


def test_the_top_holds_few_rooms():
    rooms = [p for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert len(rooms) <= MOST_ROOMS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_longer_than_a_reader_can_hold(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_IN_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert lines(node) <= MOST_IN_FUNCTION, node.name
        if isinstance(node, ast.ClassDef):
            assert lines(node) <= MOST_IN_CLASS, node.name
            assert not is_positional_dataclass(node), f"{node.name}: kw_only=True"
