"""The label files as a table: registered in Delta or Iceberg where they lie, without writing one of them again.

A run's files come in one commit. In a table that runs share they stand under the value of the partition column
`run_id`, which the files do not hold: it lives in the table's metadata, and each run may be replaced whole. A commit
says what it holds (`content_version`); a second publish of the same files finds that and changes nothing.
"""

import hashlib
import importlib.util
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from raydc.config import Config
from raydc.data.schema import RUN_COLUMN
from raydc.errors import ConfigError, StageError, StorageUnavailable
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import absolute
from raydc.storage.secrets import masked

_Result = TypeVar("_Result")

COMMIT_TRIES = 8
"""Commits of other writers that one of ours may meet before it gives up."""

_PACKAGES = {"delta": "deltalake", "iceberg": "pyiceberg"}


@dataclass(frozen=True)
class LabelFile:
    """One label file as it is in storage."""

    path: str
    """Below the run's labels/."""

    uri: str
    size: int
    """Bytes."""

    rows: int
    sha256: str


@dataclass(frozen=True)
class Registered:
    """Where the labels are to be found as a table."""

    format: str
    table: str
    """URI (Delta) or identifier (Iceberg)."""

    version: str
    """Table version (Delta) or snapshot (Iceberg) after the commit, or as it was if nothing was to be done."""

    committed: bool
    """False if the table held these files already."""


class Conflict(Exception):
    """Another writer committed first; the commit may be tried again on what is there now."""


class BrokenOff(Exception):
    """An answer of the store ended early; nobody knows if the commit is in, and the next try finds out."""


def check(config: Config, run: RunDir) -> None:
    """Return if the tables of the settings can be written, before any work starts.

    Raises:
        ConfigError: a package is missing, or the label files cannot be part of the table; all problems in one message.
    """
    problems = []
    for form, package in _PACKAGES.items():
        if getattr(config.publish, form) is not None and importlib.util.find_spec(package) is None:
            problems.append(f"publish.{form}: needs the package {package}: pip install 'raydc[{form}]'.")
    if config.publish.delta is not None:
        problems += _misplaced(delta_root(config, run), run.uri("labels"))
    if config.publish.iceberg is not None and not config.publish.iceberg.properties and "://" in run.root:
        problems.append(
            "publish.iceberg.properties: the embedded catalog is a local file, but output is not local. Name a "
            "catalog, such as {type: rest, uri: https://...}."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def delta_root(config: Config, run: RunDir) -> str:
    """Return the folder of the Delta table."""
    section = config.publish.delta
    return run.uri("labels") if section is None or section.uri is None else absolute(section.uri)


def register(config: Config, run: RunDir, files: Sequence[LabelFile], schema: pa.Schema) -> list[Registered]:
    """Commit the label files to every table of the settings and return what was done.

    Args:
        config: its section publish.
        run: whose labels they are; looked at before each commit.
        files: all of them.
        schema: of the files.

    Raises:
        StageError: a table has other columns, holds other files of this run (append), or is too busy.
    """
    done = []
    if config.publish.delta is not None:
        from raydc.tables import delta

        run.check_owner()
        done.append(delta.commit(config, run, delta_root(config, run), files, schema))
    if config.publish.iceberg is not None:
        from raydc.tables import iceberg

        run.check_owner()
        done.append(iceberg.commit(config, run, files, schema))
    return done


def content_version(files: Sequence[LabelFile]) -> int:
    """Return a 60-bit number of the files' names and checksums."""
    content = sorted((f.path, f.size, f.sha256) for f in files)
    return int(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:15], 16)


def with_run_column(schema: pa.Schema) -> pa.Schema:
    """Return the table's schema for label files of this one."""
    return schema.append(pa.field(RUN_COLUMN, pa.string()))


def check_schema(name: str, table: dict[str, str], ours: dict[str, str]) -> None:
    """Return if a table has our columns, by name and type.

    Raises:
        StageError: it has not; all differences in one message.
    """
    problems = [
        f"{column} is {table.get(column, 'not there')} in the table and {ours.get(column, 'not there')} in the labels"
        for column in sorted(table.keys() | ours.keys())
        if table.get(column) != ours.get(column)
    ]
    if problems:
        raise StageError(
            f"publish: {name} has other columns than the labels: {'; '.join(problems)}. Use another table, or the same "
            "merge.levels and id type for all runs of a table."
        )


def refuse_append(name: str, run_id: str, num_files: int) -> None:
    """Raise, because a table that is only appended to holds other files of this run already."""
    raise StageError(
        f"publish: {name} holds {num_files} other files of run {run_id!r}. Set publish.mode=replace to put the present "
        "ones in their place, in one commit."
    )


def with_retries(name: str, attempt: Callable[[], _Result]) -> _Result:
    """Return what `attempt` gives, tried again on Conflict and BrokenOff, with growing random pauses.

    Raises:
        StageError: the last try of COMMIT_TRIES was a conflict too.
        StorageUnavailable: the last try was broken off too.
    """
    last: Conflict | BrokenOff
    for number in range(COMMIT_TRIES):
        try:
            return attempt()
        except (Conflict, BrokenOff) as error:
            last = error
            time.sleep(random.uniform(0, 0.05 * 2**number))
    if isinstance(last, BrokenOff):
        raise unavailable(name, str(last)) from last
    raise StageError(
        f"publish: {name} was changed by others during {COMMIT_TRIES} commits in a row: {last}. The same command tries "
        "again."
    ) from last


def unavailable(name: str, said: str) -> StorageUnavailable:
    """Return the error that says that the store of a table gave no good answer, without secrets."""
    return StorageUnavailable(
        f"publish: {name}: {masked(said)}. Check that the store is up and the settings of storage are right; the same "
        "command continues."
    )


def below(folder: str, uri: str) -> str | None:
    """Return the path of `uri` inside a folder, None if it is not inside."""
    prefix = _plain(folder).rstrip("/") + "/"
    return _plain(uri).removeprefix(prefix) if _plain(uri).startswith(prefix) else None


def _plain(uri: str) -> str:
    return re.sub(r"^s3a://", "s3://", uri)


def _misplaced(table: str, labels: str) -> list[str]:
    if _plain(table).rstrip("/") == _plain(labels):
        return []
    path = below(table, labels)
    if path is None:
        return [
            f"publish.delta.uri={table}: the label files in {labels} are not below it, and Polars and Arrow cannot "
            "read a Delta table with files elsewhere. Put output below the table, or leave publish.delta.uri out for a "
            "table of each run."
        ]
    if not any(part.startswith(("_", ".")) for part in path.split("/")):
        return [
            f"publish.delta.uri={table}: VACUUM of a Delta table removes every file below it that the table does not "
            "know, and would remove models and reports of the runs. It passes over names with an underscore: set "
            f"output={table.rstrip('/')}/_runs, or leave publish.delta.uri out for a table of each run."
        ]
    return []


def as_dict(registered: Registered) -> dict[str, Any]:
    """Return what the manifest says of a table."""
    return {"format": registered.format, "table": registered.table, "version": registered.version}
