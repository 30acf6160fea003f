"""Words that a stranger reads: plain sentences in the settings, American names, no docstring that begins with "Of"."""

import ast
import re
from pathlib import Path

import pytest

import raydc
from raydc.config import Config, description_of, fields_of
from raydc.config.load import section_in
from raydc.core.training.settings import FitSettings

ROOT = Path(raydc.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_WORDS = 35

BRITISH = re.compile(
    r"neighbour|centre|colour|optimis|labell|behaviour|normalis|initialis|regularis|standardis|whiten?is|summaris"
    r"|serialis|organis|favour|honour|grey|metre|catalogue|modell|travell|cancell(?!ation)|analys(e|ing)\b|artefact",
    re.IGNORECASE,
)
# Old names that settings keep for one version, and names that others have given.
FOREIGN = {"CancelledError", "cancelled"}


def docstrings(tree: ast.AST) -> list[str]:
    """Return every docstring of a file: of modules, classes and functions, and those below an attribute."""
    found = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                found.append(statement.value.value)
    return [text.strip() for text in found if isinstance(text, str)]


def fragments(path: Path) -> list[str]:
    """Return the docstrings of a file that begin with "Of"."""
    return [text for text in docstrings(ast.parse(path.read_text())) if text.startswith("Of ")]


def names(tree: ast.AST) -> set[str]:
    """Return every identifier that a file defines or uses, and those of keyword arguments."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "name", "attr", "arg", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.add(value)
    return found


def settings() -> list[tuple[str, str | None]]:
    """Return (section.key, description) of every setting; a section's own docstring stands under its name."""
    found: list[tuple[str, str | None]] = []

    def walk(section: type, prefix: str) -> None:
        for name, field in fields_of(section).items():
            inner = section_in(field.annotation)
            if inner is not None:
                found.append((prefix + name, inner.__doc__))
                walk(inner, f"{prefix}{name}.")
            # An optional section or a list of them is a setting too.
            if inner is None or inner is not field.annotation:
                found.append((prefix + name, description_of(section, name)))

    walk(Config, "")
    walk(FitSettings, "fit settings: ")
    return found


def sentences(text: str) -> list[str]:
    """Return the sentences of a description; a list's items count as sentences."""
    flat = re.sub(r"\n\s*- ", ". ", text)
    return [s for s in re.split(r"(?<=[.:;])\s+|\n\n", " ".join(flat.split())) if s]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_begins_with_of(path):
    assert not fragments(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_spelled_in_american(path):
    assert not sorted(name for name in names(ast.parse(path.read_text())) - FOREIGN if BRITISH.search(name))


def test_every_setting_is_described():
    assert len(settings()) > 150
    assert [key for key, text in settings() if not text] == []


def test_the_sentences_of_the_settings_are_short():
    long = [(key, s) for key, text in settings() for s in sentences(text or "") if len(s.split()) > MOST_WORDS]
    assert not long


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_sentences_of_the_first_pages_are_short(name):
    text = re.sub(r"```.*?```", "", (ROOT.parent / name).read_text(), flags=re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))
    parts = [" ".join(part.split()) for part in re.split(r"(?<=[.:;])\s+|\n\s*\n|\n(?=\d+\. |- )", prose)]
    assert not [part for part in parts if len(part.split()) > MOST_WORDS]
    assert not BRITISH.search(prose)


def test_the_first_sentence_of_a_setting_is_whole():
    """A description begins with a capital or a name of a choice, and says more than where it belongs."""
    for key, text in settings():
        first = (text or "").split("\n\n")[0]
        assert first.rstrip().endswith((".", ":", '."')), key
        assert not first.startswith(("Of ", "See ")), key


def test_settings_have_american_names():
    assert not [key for key, _ in settings() if BRITISH.search(key)]
