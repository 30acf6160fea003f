"""What all sections of the settings share: the base class, the fields of any section, and the check of a URI.

A section that the fit takes is a dataclass of raydc.core.training.settings; every other one is a `Section`. Both are
frozen, refuse unknown keys, and keep a description of each field.
"""

import inspect
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from raydc.core.training.settings import OPERATIONAL
from raydc.storage.schemes import ONE_PROCESS, why_refused
from raydc.storage.secrets import REMEDY, has_credentials, masked

__all__ = ["OPERATIONAL", "Section", "check_uri", "description_of", "dump", "fields_of"]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values never change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def fields_of(section: Any) -> dict[str, FieldInfo]:
    """Return the fields of a section's class by name; none for a class that is no section."""
    if not inspect.isclass(section):
        return {}
    if issubclass(section, BaseModel):
        return dict(section.model_fields)
    return dict(getattr(section, "__pydantic_fields__", {}))


def description_of(section: Any, name: str) -> str | None:
    """Return the description of a field: its docstring, in the class or in the one that it comes from."""
    # A dataclass does not hand the docstrings of its fields on to its subclasses.
    found = (fields_of(base).get(name) for base in section.__mro__)
    return next((field.description for field in found if field is not None and field.description), None)


def dump(section: Any, *, include: set[str] | None = None) -> Any:
    """Return a section as JSON values; all of its fields, or those named; a plain value as it is."""
    if not fields_of(type(section)):
        return section
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(type(section))
    return adapter.dump_python(section, mode="json", include=include)


def is_operational(field: FieldInfo) -> bool:
    """Return whether a field says where and how fast a run works, and not what it computes."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


def check_uri(uri: str, setting: str) -> None:
    """Refuse a URI with credentials in it, one that no other process can see, or one of a kind that is not opened.

    Raises:
        ValueError: naming the setting.
    """
    if has_credentials(uri):
        raise ValueError(f"{setting}={masked(uri)} carries credentials. {REMEDY}")
    if (reason := why_refused(uri)) is not None:
        raise ValueError(f"{setting}={uri} {reason}.")
    if uri.startswith(f"{ONE_PROCESS}://"):
        raise ValueError(f"{setting}={uri} lives in one process, where no worker can see it. Use a folder or a store.")
