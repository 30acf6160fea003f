"""From a YAML file and `--set` to a checked Config, with every problem in one message."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from raydc.config.config import Config
from raydc.config.overrides import override_value
from raydc.config.renamed import present_name, with_present_names
from raydc.config.section import fields_of
from raydc.errors import ConfigError
from raydc.storage.secrets import masked

_MOST_SHOWN = 200
"""Characters of a wrong value, or of a parser's text, that a message shows."""


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Return the checked config of a YAML file with `key=value` overrides; without a file, of the overrides alone.

    Raises:
        ConfigError: the file cannot be read, or any setting is wrong; all problems are in one message.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {} if path is not None else {}
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}. Give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected a mapping of sections, found {type(values).__name__}.")
    try:
        # Before the overrides, so that one of them replaces a value of the file by whichever name.
        values = with_present_names(values)
    except ValueError as error:
        raise ConfigError(f"config {path}: {error}") from None
    for override in overrides:
        apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Return the checked config of a mapping.

    Raises:
        ConfigError: all problems in one message; unknown keys name the nearest valid ones.
    """
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a mapping of settings, in place.

    Raises:
        ConfigError: there is no key or no value, or the key lies below something that is no section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {masked(override)!r}: expected section.key=value.")
    keys = present_name(key).split(".")
    value = override_value(Config, keys, text)
    *parents, last = keys
    node = values
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {masked(override)!r}: {name} is not a section. Give section.key=value.")
        node = child
    node[last] = value


def _describe(problem: Any) -> str:
    where = ".".join(_settings_in(problem["loc"]))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, last = problem["loc"]
        known = _known_keys(parents)
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(sorted(known))}."
        return f"{'.'.join(map(str, problem['loc']))}: unknown setting. {hint}"
    if problem["type"] == "missing":
        return f"{where}: required, but not set."
    if problem["type"] in ("model_type", "dataclass_type") and where:
        return f"{where}={_shown(problem['input'])}: expected a mapping of settings, such as {{key: value}}."
    if problem["type"] == "value_error" or not where:
        return str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
    return f"{where}={_shown(problem['input'])}: {problem['msg']}."


def _shown(value: Any) -> str:
    text = masked(repr(value))
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _yaml_problem(error: Exception) -> str:
    """Return what is wrong and where, without the parser's own lines of the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return str(error)[:_MOST_SHOWN]
    return f"{problem[:_MOST_SHOWN]} in line {mark.line + 1}, column {mark.column + 1}"


def _settings_in(place: Iterable[Any]) -> list[str]:
    """Return the place of a problem without the names that pydantic adds for the members of a union."""
    kept: list[Any] = []
    for part in place:
        if isinstance(part, int) or part in _known_keys(kept):
            kept.append(part)
    return [str(part) for part in kept]


def _known_keys(parents: list[Any]) -> list[str]:
    section: Any = Config
    for name in parents:
        field = fields_of(section).get(name)
        if field is not None:
            section = section_in(field.annotation) or section
    return list(fields_of(section))


def section_in(annotation: Any) -> Any:
    """Return the section in a type: itself, or a member of a union or a list; None where there is none."""
    if fields_of(annotation):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)
