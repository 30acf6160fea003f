"""Parquet footers: rows, row groups, schema and a digest of each file, read without its values."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydc.errors import DataError
from raydc.storage.lake import Lake, StoredFile

# These say nothing against the file: the slice is tried again, its rows are never quarantined.
NOT_THE_FILE = (ConnectionError, TimeoutError, PermissionError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a Parquet footer says, or why it could not be read."""

    uri: str
    size: int
    num_rows: int = 0
    row_groups: tuple[tuple[int, int], ...] = ()
    """(rows, uncompressed bytes) of each row group."""

    schema: pa.Schema | None = None
    num_values: dict[str, int] = field(default_factory=dict)
    """Leaf values of each top-level column, counted by the writer."""

    digest: str = ""
    """Hash of the counts, sizes and statistics of every column chunk."""

    problem: str | None = None
    """Why the file cannot be read."""


def read_footers(lake: Lake, files: Sequence[StoredFile], *, num_threads: int = 16) -> list[Footer]:
    """Return the footer of every file, in order; an unreadable one carries its problem instead of raising.

    Raises:
        DataError: a file could not be reached, which says nothing of what is in it.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda f: _read_footer(lake, f), files))


def _read_footer(lake: Lake, file: StoredFile) -> Footer:
    try:
        with lake.open_parquet(file.uri) as handle:
            parquet = pq.ParquetFile(handle)
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except NOT_THE_FILE as error:
        raise DataError(f"{file.uri}: {first_line(error)}. Check the network and the access rights.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        return Footer(uri=file.uri, size=file.size, problem=first_line(error))
    if twice := sorted(name for name, n in Counter(schema.names).items() if n > 1):
        return Footer(uri=file.uri, size=file.size, problem=f"has more than one column {', '.join(map(repr, twice))}")
    seen = hashlib.sha256(str((file.size, metadata.num_rows)).encode())
    groups, num_values = [], dict.fromkeys(schema.names, 0)
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        groups.append((group.num_rows, group.total_byte_size))
        for c in range(group.num_columns):
            chunk = group.column(c)
            # A column's own name may have dots, like the path to its values.
            path = chunk.path_in_schema
            name = max((n for n in schema.names if f"{path}.".startswith(f"{n}.")), key=len, default=path)
            num_values[name] = num_values.get(name, 0) + chunk.num_values
            stats = chunk.statistics
            extremes = _extremes(stats) if stats is not None and stats.has_min_max else None
            seen.update(repr((chunk.path_in_schema, chunk.num_values, chunk.total_compressed_size, extremes)).encode())
    return Footer(
        uri=file.uri,
        size=file.size,
        num_rows=metadata.num_rows,
        row_groups=tuple(groups),
        schema=schema,
        num_values=num_values,
        digest=seen.hexdigest()[:16],
    )


def _extremes(stats: Any) -> tuple[Any, Any]:
    try:
        return stats.min, stats.max
    except UnicodeDecodeError:
        # Text that is no valid UTF-8.
        return stats.min_raw, stats.max_raw


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
