"""Fingerprints: which settings decide the result of a stage, their hash, and what differs between two of them."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from raydc.config.section import dump, fields_of, is_operational
from raydc.config.stages import SECTIONS_OF_STAGE, StageName, up_to


def sections_until(stage: StageName) -> list[str]:
    """Return the sections that decide the result of a stage: its own and those of every stage before it."""
    return [s for name in up_to(stage) for s in SECTIONS_OF_STAGE[name]]


def decisive(section: Any) -> Any:
    """Return the fields of a section that are not operational, as JSON values; a plain value as it is."""
    fields = fields_of(type(section))
    return dump(section, include={name for name, field in fields.items() if not is_operational(field)})


def digest(value: Any) -> str:
    """Return a 16-digit hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line for each setting that differs, as `section.key was A, is B`."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k} was {before.get(k)!r}, is {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
