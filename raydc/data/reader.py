"""The one reader of a slice: batches of good rows as arrays, bad rows as rejects."""

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.core.row_guard import mark
from raydc.data.columns import as_text, shown, vectors_from_arrow, vectors_from_parts, weights_from_arrow
from raydc.data.footers import NOT_THE_FILE, first_line
from raydc.data.ids import ids_from_arrow
from raydc.data.npy import npy_uri, read_rows
from raydc.data.partitions import partition_values
from raydc.data.schema import rejects_schema
from raydc.data.slices import InputSpec, Slice
from raydc.errors import DataError
from raydc.storage.lake import Lake

log = logging.getLogger(__name__)

REMEDIES = {
    "too_large": "Its norm leaves what float32 distances can hold: set the value right or leave the row out",
    "not_numbers": "Its text holds no list of numbers: set it right",
}
"""What to do about a bad row, by reason, where `Fix the export` says too little."""


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Consecutive rows of one slice: the good ones as arrays, the bad ones as rejects."""

    keys: npt.NDArray[np.int64]
    """(n,) keys of the good rows, rising."""

    x: npt.NDArray[Any]
    """(n, D) float16 or float32 raw rows."""

    ids: pa.Array
    weights: npt.NDArray[np.float32] | None
    labels: pa.Array | None
    carry: pa.Table | None
    rejects: pa.Table


def read_slice(
    lake: Lake,
    part: Slice,
    spec: InputSpec,
    *,
    block_rows: int = 65536,
    with_labels: bool = False,
    with_carry: bool = False,
) -> Generator[RowBatch, None, None]:
    """Yield the rows of a slice in order, in batches of at most `block_rows`.

    Raises:
        DataError: a bad row under on_bad_rows=fail, or unreadable bytes under on_bad_files=fail. Under quarantine the
            rows that cannot be used come as rejects; after unreadable bytes that is the rest of their row group, with
            their ids where these can be read.
    """
    if not part.num_rows:
        return
    names = wanted_columns(spec, with_labels=with_labels, with_carry=with_carry)
    row = 0
    try:
        for table in _tables(lake, part, part.row_groups, names, block_rows):
            yield _decode(lake, table, part, row, spec, with_labels=with_labels, with_carry=with_carry)
            row += len(table)
        return
    except NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError) as error:
        problem = f"{part.uri} cannot be read beyond row {part.first_row + row}: {first_line(error)}"
        if spec.on_bad_files == "fail":
            raise DataError(f"{problem}. Restore the file, or set input.on_bad_files=quarantine.") from None
        log.warning("%s; the other row groups are read on", problem)
    # From here on each row group by itself: what is damaged in one says nothing of the next.
    for group, start, stop in _group_rows(lake, part):
        at = start
        try:
            for table in _tables(lake, part, (group,), names, block_rows):
                fresh = table.slice(max(0, row - at))
                at += len(table)
                if len(fresh):
                    yield _decode(lake, fresh, part, row, spec, with_labels=with_labels, with_carry=with_carry)
                    row += len(fresh)
        except NOT_THE_FILE:
            raise
        except (pa.ArrowException, OSError):
            yield _lost_rows(lake, part, group, start, row, stop, spec)
            row = stop


def _tables(
    lake: Lake, part: Slice, row_groups: Sequence[int], names: list[str], block_rows: int
) -> Generator[pa.Table, None, None]:
    with lake.open_parquet(part.uri) as handle:
        # Where the writer left checksums of its pages, a flipped bit is found instead of read as another number.
        parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        there = [name for name in names if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(block_rows, row_groups=list(row_groups), columns=there, use_threads=False):
            yield pa.Table.from_batches([batch])


def _group_rows(lake: Lake, part: Slice) -> list[tuple[int, int, int]]:
    """Return (row group, first row, row behind the last) of each row group, counted within the slice."""
    try:
        with lake.open_parquet(part.uri) as handle:
            metadata = pq.ParquetFile(handle).metadata
    except NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError):
        # The file is gone, or its footer is damaged by now: all that is left of the slice is lost in one piece.
        return [(part.row_groups[0], 0, part.num_rows)]
    stops = np.cumsum([metadata.row_group(g).num_rows for g in part.row_groups]).tolist()
    return [(g, a, b) for g, a, b in zip(part.row_groups, [0, *stops], stops, strict=False)]


def wanted_columns(spec: InputSpec, *, with_labels: bool, with_carry: bool) -> list[str]:
    """Return the columns of a file that a reader looks for; those that only serve evaluation may be absent."""
    names = [spec.id_column]
    for column in spec.columns:
        names += column.parts or ([] if column.npy else [column.name])
    names += [spec.weight_column] if spec.weight_column else []
    names += [spec.label_column] if with_labels and spec.label_column else []
    names += list(spec.carry_columns) if with_carry else []
    return list(dict.fromkeys(names))


def _decode(
    lake: Lake, table: pa.Table, part: Slice, row: int, spec: InputSpec, *, with_labels: bool, with_carry: bool
) -> RowBatch:
    reasons = np.full(len(table), "", dtype="U16")
    x = _matrix(lake, table, part, row, spec, reasons)
    spec.guard.mark(x, reasons)
    ids, broken = ids_from_arrow(table[spec.id_column], spec.arrow_id_type)
    mark(reasons, broken, "bad_id")
    if ids.null_count:
        mark(reasons, np.asarray(ids.is_null()), "missing")
    weights = None
    if spec.weight_column:
        weights = _weights(table, part, spec.weight_column)
        mark(reasons, ~(np.isfinite(weights) & (weights > 0)), "bad_weight")
    labels = None
    if with_labels and spec.label_column:
        labels = _one_array(_optional(table, part, spec.label_column))
    carry = _carried(table, part, spec) if with_carry else None

    good = reasons == ""
    positions = np.arange(len(table), dtype=np.int64)
    if good.all():
        rejects = rejects_schema(spec.arrow_id_type).empty_table()
        return RowBatch(
            keys=part.first_key + row + positions,
            x=x,
            ids=ids,
            weights=weights,
            labels=labels,
            carry=carry,
            rejects=rejects,
        )
    bad = np.flatnonzero(~good)
    if spec.on_bad_rows == "fail":
        where = int(bad[0])
        raise DataError(
            f"{part.uri} row {part.first_row + row + where} (id {shown(ids[where].as_py())}) is bad: "
            f"{reasons[where]}. {REMEDIES.get(reasons[where], 'Fix the export')}, or set input.on_bad_rows=quarantine."
        )
    keep = pa.array(good)
    return RowBatch(
        keys=part.first_key + row + positions[good],
        x=x[good],
        ids=ids.filter(keep),
        weights=weights[good] if weights is not None else None,
        labels=labels.filter(keep) if labels is not None else None,
        carry=carry.filter(keep) if carry is not None else None,
        rejects=_rejects(ids.take(pa.array(bad)), part, part.first_row + row + bad, reasons[bad], spec),
    )


def _matrix(
    lake: Lake, table: pa.Table, part: Slice, row: int, spec: InputSpec, reasons: npt.NDArray[np.str_]
) -> npt.NDArray[Any]:
    """Return the raw rows, all embedding columns side by side, in the type that memory holds them in."""
    x = np.empty((len(table), spec.dim), spec.dtype) if len(spec.columns) > 1 else None
    for column, (start, stop, _) in zip(spec.columns, spec.blocks, strict=True):
        if column.npy is not None:
            uri = npy_uri(column.npy, part.uri)
            assert uri is not None
            values = read_rows(lake, uri, part.first_row + row, len(table))
        elif column.parts:
            values = vectors_from_parts(table, column.parts, reasons)
        else:
            values = vectors_from_arrow(table[column.name], column.dim, column.dtype, reasons)
        if column.scale != 1.0:
            values = values * np.float32(column.scale)
        # What leaves the range of float32 here becomes infinite, and is found by the guard.
        with np.errstate(over="ignore"):
            if x is None:
                return values.astype(spec.dtype, copy=False)
            x[:, start:stop] = values
    assert x is not None
    return x


def _optional(table: pa.Table, part: Slice, name: str) -> pa.ChunkedArray:
    """Return a column that may stand in the folders' names instead, or nowhere: its values are missing then."""
    if name in table.column_names:
        return table[name]
    value = partition_values(part.uri).get(name)
    return pa.chunked_array([pa.nulls(len(table)) if value is None else pa.repeat(pa.scalar(value), len(table))])


def _weights(table: pa.Table, part: Slice, name: str) -> npt.NDArray[np.float32]:
    column = _optional(table, part, name)
    if pa.types.is_null(column.type):
        # A file that knows no weights: each row counts once, as it does without the setting.
        return np.ones(len(table), np.float32)
    return weights_from_arrow(column)


def _carried(table: pa.Table, part: Slice, spec: InputSpec) -> pa.Table:
    columns = {name: _optional(table, part, name) for name in spec.carry_columns}
    return pa.table({n: as_text(c) if n in spec.carry_as_text else c for n, c in columns.items()})


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _rejects(
    ids: pa.Array, part: Slice, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.str_], spec: InputSpec
) -> pa.Table:
    schema = rejects_schema(spec.arrow_id_type)
    names = pa.array([part.name] * len(rows), pa.string())
    return pa.table([ids, names, pa.array(rows), pa.array(reasons.tolist(), pa.string())], schema=schema)


def all_rejected(
    lake: Lake, part: Slice, spec: InputSpec, reason: str, *, with_ids: bool, block_rows: int = 65536
) -> Generator[pa.Table, None, None]:
    """Yield every row of a slice as rejects, in order; of the file only the ids are read, or nothing.

    Args:
        lake: storage.
        part: the slice.
        spec: for the id column.
        reason: one of REJECT_REASONS.
        with_ids: false leaves the ids null, as they are where they cannot be read.
        block_rows: rows of a table.
    """
    row = 0

    def rejects(ids: pa.Array) -> pa.Table:
        rows = np.arange(part.first_row + row, part.first_row + row + len(ids))
        return _rejects(ids, part, rows, np.full(len(ids), reason), spec)

    try:
        for table in _tables(lake, part, part.row_groups, [spec.id_column], block_rows) if with_ids else ():
            ids, _ = ids_from_arrow(table[spec.id_column], spec.arrow_id_type)
            yield rejects(ids)
            row += len(table)
    except NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError) as error:
        log.warning("ids of %s beyond row %d are not known: %s", part.uri, part.first_row + row, first_line(error))
    while row < part.num_rows:
        ids = pa.nulls(min(block_rows, part.num_rows - row), spec.arrow_id_type)
        yield rejects(ids)
        row += len(ids)


def _lost_rows(lake: Lake, part: Slice, group: int, start: int, row: int, stop: int, spec: InputSpec) -> RowBatch:
    """Return the rows of a row group from `row` on as rejects; positions count within the slice."""
    rows = np.arange(part.first_row + row, part.first_row + stop)
    try:
        columns = [t[spec.id_column] for t in _tables(lake, part, (group,), [spec.id_column], stop - start)]
        chunks = [c for column in columns for c in column.chunks]
        ids = ids_from_arrow(pa.chunked_array(chunks), spec.arrow_id_type)[0].slice(row - start)
    except NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError):
        ids = pa.nulls(len(rows), spec.arrow_id_type)
    rejects = _rejects(ids, part, rows, np.full(len(rows), "unreadable_file"), spec)
    return RowBatch(
        keys=np.empty(0, np.int64),
        x=np.empty((0, spec.dim), spec.dtype),
        ids=pa.array([], spec.arrow_id_type),
        weights=np.empty(0, np.float32) if spec.weight_column else None,
        labels=None,
        carry=None,
        rejects=rejects,
    )
