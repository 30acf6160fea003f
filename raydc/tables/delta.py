"""Label files in a Delta table (package deltalake): one commit, with the run's transaction number in it."""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from raydc.config import Config, StorageConfig
from raydc.data.label_files import column_facts
from raydc.data.schema import RUN_COLUMN
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake
from raydc.tables.common import (
    AnswerLost,
    Conflict,
    LabelFile,
    Registered,
    below,
    check_schema,
    content_version,
    refuse_append,
    unavailable,
    with_retries,
    with_run_column,
)

# Delta's client (object_store) says this where it asked again in vain. It does not ask again if a listing ends early,
# nor if the answer to a commit is lost, which may be in then.
_ASKED_AGAIN = re.compile(r"after \d+ retries")
# What object_store waits at most between two tries, halved by chance on average; and how long it tries by default.
_DELTA_PAUSE_SECONDS = 7.5
_DELTA_LEAST_SECONDS = 180.0
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def commit(config: Config, run: RunDir, root: str, files: Sequence[LabelFile], schema: pa.Schema) -> Registered:
    """Make the table at `root` hold exactly these files of the run, in one commit.

    A table in the run's own labels/ has the columns of the files. One that runs share lies above them and has the
    partition column run_id as well.

    The commit carries the Delta application transaction (`raydc/<run id>`, content version). Delta refuses the second
    of two commits that carry the same application, so two drivers cannot both add the files.

    Raises:
        StageError: the table has other columns or other files of this run (append), or is too busy.
        StorageUnavailable: the store gave no good answer.
    """
    shared = root.rstrip("/") != artifacts.LABELS.uri(run)
    target = _Target(
        root=root,
        run_id=run.run_id,
        schema=Schema.from_arrow(with_run_column(schema) if shared else schema),
        partition_by=[RUN_COLUMN] if shared else [],
        mode=config.publish.mode,
        options=storage_options(config.storage),
    )
    actions = [_add_action(run, target, file) for file in files]

    def attempt() -> Registered:
        try:
            return _commit_once(target, actions, content_version(files))
        except CommitFailedError as error:
            raise Conflict(_said(error)) from error
        except (DeltaError, OSError) as error:
            said = _said(error)
            if _ASKED_AGAIN.search(said):
                raise unavailable(target.name, said) from error
            if isinstance(error, OSError) or "HTTP error" in said:
                raise AnswerLost(said) from error
            raise

    return with_retries(target.name, attempt)


@dataclass(frozen=True, kw_only=True)
class _Target:
    root: str
    run_id: str
    schema: Schema
    partition_by: list[str]
    mode: str
    options: dict[str, str]

    @property
    def name(self) -> str:
        return f"the Delta table {self.root}"

    @property
    def partition(self) -> dict[str, str | None]:
        return dict.fromkeys(self.partition_by, self.run_id)

    def open(self) -> DeltaTable:
        return DeltaTable(self.root, storage_options=self.options)


def _commit_once(target: _Target, actions: list[AddAction], version: int) -> Registered:
    table = _open_or_create(target)
    if (found := table.metadata().partition_columns) != target.partition_by:
        check_schema(
            target.name,
            {RUN_COLUMN: f"partitioned by {found}"},
            {RUN_COLUMN: f"partitioned by {target.partition_by}"},
        )
    check_schema(target.name, _columns(table.schema()), _columns(target.schema))
    known = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    earlier = [a for a in known if all(a[f"partition.{k}"] == v for k, v in target.partition.items())]
    application = f"raydc/{target.run_id}"
    if earlier and table.transaction_version(application) == version:
        return Registered("delta", target.root, str(table.version()), False)
    if earlier and target.mode == "append":
        refuse_append(target.name, target.run_id, len(earlier))
    # A path that is added again replaces what the table knew of it; Delta refuses to remove it in the same commit.
    ours = {action.path for action in actions}
    removed = [
        RemoveAction(
            path=unquote(a["path"]),
            data_change=True,
            deletion_timestamp=int(time.time() * 1000),
            size=a["size_bytes"],
            partition_values=target.partition,
        )
        for a in earlier
        if unquote(a["path"]) not in ours
    ]
    table.create_write_transaction(
        [*actions, *removed],
        "append",
        target.schema,
        target.partition_by,
        commit_properties=CommitProperties(
            custom_metadata={"raydc.runId": target.run_id},
            # Another commit may be one of ours: the table is looked at again before the next try.
            max_commit_retries=0,
            app_transactions=[Transaction(application, version)],
        ),
    )
    return Registered("delta", target.root, str(target.open().version()), True)


def _open_or_create(target: _Target) -> DeltaTable:
    try:
        return target.open()
    except TableNotFoundError:
        pass
    if "://" not in target.root:
        os.makedirs(target.root, exist_ok=True)
    try:
        return DeltaTable.create(
            target.root, target.schema, partition_by=target.partition_by, storage_options=target.options
        )
    except DeltaError as error:
        if DeltaTable.is_deltatable(target.root, target.options):
            raise Conflict("created by another at the same time") from error
        raise


def storage_options(section: StorageConfig) -> dict[str, str]:
    """Return the options of Delta's own S3 client; it too finds credentials in the environment and asks again."""
    found: dict[str, Any] = {
        "AWS_ENDPOINT_URL": section.endpoint_url,
        "AWS_REGION": section.region,
        "AWS_PROFILE": section.profile,
        "AWS_ALLOW_HTTP": "true" if (section.endpoint_url or "").startswith("http://") else None,
        "AWS_SKIP_SIGNATURE": "true" if section.anonymous else None,
        # It stops at whichever comes first: enough retries for the wait, by its own longest pause, and time for both.
        "max_retries": str(section.max_attempts - 1 + math.ceil(section.max_wait_seconds / _DELTA_PAUSE_SECONDS)),
        "retry_timeout": f"{max(section.max_wait_seconds, _DELTA_LEAST_SECONDS):g} seconds",
        "timeout": f"{section.timeout_seconds:g} seconds",
        "connect_timeout": f"{section.timeout_seconds:g} seconds",
    }
    return {key: value for key, value in found.items() if value}


def _said(error: Exception) -> str:
    """Return the text of an error of Delta, which may be a tree of lines in colors, in one line."""
    lines = _COLORS.sub("", str(error)).splitlines()
    return ": ".join(line.strip(" ↳") for line in lines)


def _add_action(run: RunDir, target: _Target, file: LabelFile) -> AddAction:
    path = below(target.root, file.uri)
    assert path is not None, f"{file.uri} is not below {target.root}"
    return AddAction(
        path=path,
        size=file.size,
        partition_values=target.partition,
        modification_time=int(_modified(run.lake, file) * 1000),
        data_change=True,
        stats=json.dumps(file_statistics(run.lake, file)),
    )


def _modified(lake: Lake, file: LabelFile) -> float:
    if file.modified is not None:
        return file.modified
    fs, location = lake.file_system(file.uri)
    return float(fs.modified(location).timestamp())


def file_statistics(lake: Lake, file: LabelFile) -> dict[str, Any]:
    """Return rows, and least and largest value of each integer column, with which readers skip files."""
    columns = file.columns
    if columns is None:
        with lake.open_parquet(file.uri) as handle:
            columns = column_facts(pq.ParquetFile(handle).metadata)
    whole = {name: facts for name, facts in columns.items() if isinstance(facts["least"], int)}
    least = {name: facts["least"] for name, facts in whole.items()}
    largest = {name: facts["largest"] for name, facts in whole.items()}
    return {"numRecords": file.rows, "minValues": least, "maxValues": largest}


def _columns(schema: Schema) -> dict[str, str]:
    return {field.name: str(getattr(field.type, "type", field.type)) for field in schema.fields}
