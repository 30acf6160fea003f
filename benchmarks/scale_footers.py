"""What the driver pays for a footer: `python -m benchmarks.scale_footers` prints the table for the page on scale.

Both sides parse the same bytes in one thread. The plain one looks through all columns for every column chunk, reads its
statistics and keeps a schema for each file; that is quadratic in the columns.
"""

import hashlib
import io
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.data.footers import ColumnsCache, Footer, parse_footer
from raydc.storage.lake import StoredFile

COLUMNS = (4, 300)
ROW_GROUPS = 10
_DIM = 8
_PLAIN_FILES = 5
_KEPT_FILES = 500


@dataclass(frozen=True, kw_only=True)
class FooterCost:
    """What footers of one width cost the driver."""

    columns: int
    footer_bytes: int
    plain_ms: float
    """CPU a footer, chunk by chunk."""

    parse_ms: float
    """CPU a footer of pyarrow's parser alone, which both sides pay."""

    ours_ms: float
    """CPU a footer, as raydc reads it."""

    kept_bytes: float
    """Memory of each footer that is kept; a schema is kept once for all."""


def measure(columns: Sequence[int] = COLUMNS, num_files: int = 2000) -> list[FooterCost]:
    """Return the cost of a footer for files of these numbers of columns."""
    return [_cost(number, num_files) for number in columns]


def _cost(columns: int, num_files: int) -> FooterCost:
    raw = footer_of(columns)
    known = ColumnsCache()
    kept: list[Footer] = []

    def ours() -> None:
        file = StoredFile(f"s3://bucket/folder/part-{len(kept):06d}.parquet", 10**8)
        kept.append(parse_footer(file, raw, known))

    # The first says what the columns are.
    ours()
    ours_ms = _cpu_ms(ours, num_files)
    grown = _growth(ours, _KEPT_FILES)
    plain = _cpu_ms(lambda: by_every_chunk(raw), _PLAIN_FILES)
    parse = _cpu_ms(lambda: pq.read_metadata(pa.BufferReader(raw)), min(num_files, 200))
    assert by_every_chunk(raw)["embedding"] == kept[0].num_values["embedding"]
    return FooterCost(
        columns=columns,
        footer_bytes=len(raw),
        plain_ms=plain,
        parse_ms=parse,
        ours_ms=ours_ms,
        kept_bytes=grown / _KEPT_FILES,
    )


def footer_of(columns: int) -> bytes:
    """Return the footer of a file of ten row groups: an id, an embedding and other columns of numbers."""
    rng = np.random.default_rng(0)
    rows = ROW_GROUPS * 4
    values = pa.array(rng.random(rows * _DIM, np.float32))
    table = {"id": np.arange(rows), "embedding": pa.FixedSizeListArray.from_arrays(values, _DIM)}
    table |= {f"column_{i}": rng.random(rows) for i in range(columns - len(table))}
    file = io.BytesIO()
    pq.write_table(pa.table(table), file, row_group_size=rows // ROW_GROUPS)
    body = file.getvalue()
    return body[-int.from_bytes(body[-8:-4], "little") - 8 :]


def by_every_chunk(raw: bytes) -> dict[str, int]:
    """Return the values of each column the plain way, with the digest of all statistics on the way."""
    metadata = pq.read_metadata(pa.BufferReader(raw))
    names = metadata.schema.to_arrow_schema().names
    seen, found = hashlib.sha256(), dict.fromkeys(names, 0)
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            chunk = group.column(c)
            path = chunk.path_in_schema
            found[max((n for n in names if f"{path}.".startswith(f"{n}.")), key=len)] += chunk.num_values
            statistics = chunk.statistics
            extremes = (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None
            seen.update(repr((path, chunk.num_values, chunk.total_compressed_size, extremes)).encode())
    return found


def _cpu_ms(what: Callable[[], Any], times: int) -> float:
    started = time.process_time()
    for _ in range(times):
        what()
    return 1000 * (time.process_time() - started) / times


def _growth(what: Callable[[], Any], times: int) -> int:
    """Return the bytes of Python objects that so many calls leave behind."""
    tracemalloc.start()
    try:
        for _ in range(times):
            what()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def section(costs: Sequence[FooterCost], num_files: int = 100_000) -> list[str]:
    """Return the table of the costs as lines of a page, with what follows for so many files."""
    return [
        "## Footers",
        "",
        f"CPU of one thread for one footer of {ROW_GROUPS} row groups, and what is kept of it, storage aside.",
        f"The last two columns are multiplied by {num_files:,} files, not measured there.",
        "",
        "| columns | footer kB | chunk by chunk ms | parser alone ms | raydc ms | kept bytes | CPU min | kept GiB |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {c.columns} | {c.footer_bytes / 1000:.0f} | {c.plain_ms:.2f} | {c.parse_ms:.2f} | {c.ours_ms:.2f} | "
            f"{c.kept_bytes:.0f} | {c.ours_ms * num_files / 6e4:.1f} | {c.kept_bytes * num_files / 2**30:.2f} |"
            for c in costs
        ),
    ]


def records(costs: Sequence[FooterCost]) -> list[dict[str, Any]]:
    """Return the costs as JSON values."""
    return [asdict(c) for c in costs]


if __name__ == "__main__":
    print("\n".join(section(measure())))
