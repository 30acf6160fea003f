"""What is known of a file of labels or rejects when it is written, so that nobody has to read it again.

The checksums are of the bytes on their way out. Ranges of columns are those that Delta and Iceberg tables keep: readers
skip files by them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("sha256", pa.string()),
        ("md5", pa.string()),
        ("columns", pa.string()),
    ]
)
"""One row for each file. `columns` is JSON, of ColumnFacts by name."""

_LONGEST_TEXT = 256
_BLOCK = 8 * 2**20


class ColumnFacts(TypedDict):
    """What the footer of a Parquet file says of one column."""

    bytes: int
    """Compressed."""

    nulls: int | None
    """None where the file does not say."""

    least: int | float | str | None
    """None where there is no value, or one too long to keep."""

    largest: int | float | str | None


def record(path: str, local: Path) -> pa.Table:
    """Return what is known of a whole Parquet file.

    Args:
        path: below the folder of the run.
        local: the same file on this machine.
    """
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with local.open("rb") as handle:
        while block := handle.read(_BLOCK):
            sha256.update(block)
            md5.update(block)
    metadata = pq.read_metadata(local)
    body = {
        "path": path,
        "bytes": local.stat().st_size,
        "rows": metadata.num_rows,
        "sha256": sha256.hexdigest(),
        "md5": md5.hexdigest(),
        "columns": json.dumps(column_facts(metadata)),
    }
    return pa.Table.from_pylist([body], SCHEMA)


def column_facts(metadata: pq.FileMetaData) -> dict[str, ColumnFacts]:
    """Return what a footer says of each column."""
    found: dict[str, ColumnFacts] = {}
    silent: set[str] = set()
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            new: ColumnFacts = {"bytes": 0, "nulls": 0, "least": None, "largest": None}
            facts = found.setdefault(chunk.path_in_schema, new)
            facts["bytes"] += chunk.total_compressed_size
            statistics = chunk.statistics
            if statistics is None or not statistics.has_null_count:
                silent.add(chunk.path_in_schema)
                continue
            facts["nulls"] = (facts["nulls"] or 0) + statistics.null_count
            if statistics.has_min_max:
                facts["least"] = _of(min, facts["least"], statistics.min)
                facts["largest"] = _of(max, facts["largest"], statistics.max)
    for name, facts in found.items():
        # One bound without the other would be taken for the whole range.
        if name in silent or not (_is_kept(facts["least"]) and _is_kept(facts["largest"])):
            facts["least"] = facts["largest"] = None
        if name in silent:
            facts["nulls"] = None
    return found


def from_record(row: Mapping[str, Any]) -> dict[str, ColumnFacts]:
    """Return the facts of the columns of a row of SCHEMA."""
    found: dict[str, ColumnFacts] = json.loads(row["columns"])
    return found


def _of(choose: Any, before: Any, value: Any) -> Any:
    return value if before is None else choose(before, value)


def _is_kept(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
