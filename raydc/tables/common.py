"""What every kind of table shares: the label files to register, what was done, the errors, the bounded retries."""

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from raydc.data.label_files import ColumnFacts
from raydc.data.records import TableEntry
from raydc.data.schema import RUN_COLUMN
from raydc.errors import Busy, StageError, StorageUnavailable
from raydc.storage.secrets import masked

_Result = TypeVar("_Result")

COMMIT_TRIES = 8
"""Commits of other writers that one of ours may meet before it gives up."""


@dataclass(frozen=True, kw_only=True)
class LabelFile:
    """One label file as it is in storage."""

    path: str
    """Below the run's labels/."""

    uri: str
    size: int
    """Bytes."""

    rows: int
    sha256: str
    modified: float | None = None
    """Unix time of its last change; None where nobody has looked."""

    columns: Mapping[str, ColumnFacts] | None = None
    """Ranges of its columns, taken when it was written; None where its footer is to be read."""


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

    def to_json(self) -> TableEntry:
        """Return what the manifest says of the table."""
        return {"format": self.format, "table": self.table, "version": self.version}


class Conflict(Exception):
    """Another writer committed first; the commit may be tried again on what is there now."""


class AnswerLost(Exception):
    """An answer of the store ended early; nobody knows if the commit is in, and the next try finds out."""


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


def with_retries(name: str, attempt: Callable[[], _Result], *, sleep: Callable[[float], None] = time.sleep) -> _Result:
    """Return what `attempt` gives, tried again on Conflict and AnswerLost, with growing random pauses.

    Args:
        name: of the table, for messages.
        attempt: one commit.
        sleep: waits for some seconds; a test gives its own.

    Raises:
        Busy: the last try of COMMIT_TRIES was a conflict too.
        StorageUnavailable: the last try was broken off too.
    """
    last: Conflict | AnswerLost
    for number in range(COMMIT_TRIES):
        try:
            return attempt()
        except (Conflict, AnswerLost) as error:
            last = error
            sleep(random.uniform(0, 0.05 * 2**number))
    if isinstance(last, AnswerLost):
        raise unavailable(name, str(last)) from last
    raise Busy(
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
    prefix = plain(folder).rstrip("/") + "/"
    return plain(uri).removeprefix(prefix) if plain(uri).startswith(prefix) else None


def plain(uri: str) -> str:
    """Return a URI in the spelling that is compared: s3:// for s3a://."""
    return re.sub(r"^s3a://", "s3://", uri)
