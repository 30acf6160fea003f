"""Sizes that keep a room readable, and dataclasses that name their fields where they are made."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import raydc

ROOT = Path(raydc.__file__).parent
WINGS = ("runfolder", "labeling", "runtime", "stages", "tables", "report", "commands")
FILES = [p for wing in WINGS for p in sorted((ROOT / wing).rglob("*.py"))]
FILES += [ROOT / "pipeline.py", ROOT / "model.py", *(ROOT / "data" / f"{n}.py" for n in ("records", "metrics"))]
NAMES = [p.relative_to(ROOT).as_posix() for p in FILES]

MOST_LINES = 450
MOST_LINES_OF_A_CLASS = 200
MOST_LINES_OF_A_FUNCTION = 60
FIELDS_BY_NAME = 5


def nodes(name: str, kind: type) -> Iterator:
    yield from (n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, kind))


def lines_of(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_no_file_class_or_function_outgrows_its_bound(name):
    assert len((ROOT / name).read_text().splitlines()) <= MOST_LINES
    assert not [n.name for n in nodes(name, ast.ClassDef) if lines_of(n) > MOST_LINES_OF_A_CLASS]
    assert not [n.name for n in nodes(name, ast.FunctionDef) if lines_of(n) > MOST_LINES_OF_A_FUNCTION]


@pytest.mark.parametrize("name", NAMES)
def test_a_dataclass_of_five_fields_is_made_by_keywords(name):
    positional = []
    for node in nodes(name, ast.ClassDef):
        decorators = [ast.unparse(d) for d in node.decorator_list if ast.unparse(d).startswith("dataclass")]
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        if decorators and len(fields) >= FIELDS_BY_NAME and "kw_only=True" not in decorators[0]:
            positional.append(node.name)
    assert not positional
