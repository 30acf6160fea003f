"""The value of `--set section.key=value`: a text setting takes the text as it is, all others read it as YAML."""

import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from raydc.config.section import fields_of
from raydc.errors import ConfigError
from raydc.storage.secrets import masked

_QUOTES = ("'", '"')


def override_value(model: Any, keys: Sequence[str], text: str) -> Any:
    """Return the value that the text of an override means for the setting of `keys`.

    A text setting takes the text as it is: `/x/set #2`, `on`, `2024`, `a: b`. Three exceptions: text in quotes loses
    them; `null` unsets a setting that may be unset; `[a, b]` is a list where the setting may be one. Any other setting
    is read as YAML.

    Raises:
        ConfigError: the text is no YAML, where YAML is what the setting takes.
    """
    annotation = _annotation(model, keys)
    kinds = _kinds(annotation)
    # The names in a list of texts are texts too: `[on, 2024]`.
    list_loader = yaml.BaseLoader if _element_is_text(annotation) else yaml.SafeLoader
    if _takes_text(kinds) or (keys[-1] == "embedding_columns" and not text.startswith(("[", "{"))):
        if type(None) in kinds and text in ("null", "~"):
            return None
        if list in kinds and text.startswith("[") and text.endswith("]"):
            return _loaded(keys, text, list_loader)
        if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
            return _loaded(keys, text, yaml.BaseLoader)
        return text
    if not kinds:
        # No such setting, which is told with all other problems of the settings.
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return _loaded(keys, text, list_loader if list in kinds else yaml.SafeLoader)


def _loaded(keys: Sequence[str], text: str, loader: Any) -> Any:
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not valid"
        raise ConfigError(
            f"--set {masked('.'.join(keys) + '=' + text)[:300]}: not valid YAML ({problem}). Put quotes around names "
            "with `#`, `:`, `,` or brackets in them."
        ) from None


def _annotation(model: Any, keys: Sequence[str]) -> Any:
    """Return the annotation of a setting; None where there is no such one."""
    *parents, last = keys
    for number, name in enumerate(parents):
        field = fields_of(model).get(name)
        if field is not None and typing.get_origin(field.annotation) is dict and number == len(parents) - 1:
            return typing.get_args(field.annotation)[1]
        inner = [a for a in _kinds(field.annotation) if _is_section(a)] if field is not None else []
        if not inner:
            return None
        model = inner[0]
    field = fields_of(model).get(last)
    return field.annotation if field is not None else None


def _is_section(kind: Any) -> bool:
    return bool(fields_of(kind))


def _kinds(annotation: Any) -> list[Any]:
    """Return the members of a union, with `list` for lists, and `str` for choices between texts."""
    origin = typing.get_origin(annotation)
    if origin is typing.Union or isinstance(annotation, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in _kinds(member)]
    if origin is Literal:
        return [type(choice) for choice in typing.get_args(annotation)]
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    return [origin or annotation] if annotation is not None else []


def _takes_text(kinds: list[Any]) -> bool:
    # `float | Literal["auto"]` is YAML: its numbers must stay numbers.
    return str in kinds and set(kinds) <= {str, list, type(None)}


def _element_is_text(annotation: Any) -> bool:
    members = typing.get_args(annotation) if typing.get_origin(annotation) is not list else (annotation,)
    return any(typing.get_args(m) == (str,) for m in members)
