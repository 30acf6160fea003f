"""The plan of slices, made from the Parquet footers, and the one reader of a slice.

A slice is a whole file, or a range of its row groups where the file is large. It is the unit of reading, retrying and
resuming. Every row has a key, its position in the sorted input, so any worker can name any row in the same way.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydc.data.schema import rejects_schema
from raydc.errors import DataError
from raydc.storage.lake import Lake, StoredFile

log = logging.getLogger(__name__)

# A row is divided by its norm in float32: outside of these its square is infinite, or has lost its digits.
_LEAST_SQUARE, _LARGEST_SQUARE = np.float32(1e-30), np.float32(1e38)

_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}

_LONGEST_CLASS = 200

# These say nothing against the file: the slice is tried again, its rows are never quarantined.
_NOT_THE_FILE = (ConnectionError, TimeoutError, PermissionError, MemoryError)


@dataclass(frozen=True)
class Layout:
    """How an embedding column is stored."""

    kind: str
    """list, fixed_size_list or fixed_size_binary."""

    dtype: str
    """Element type: float16, float32 or float64."""

    dim: int | None
    """Elements per row where the type itself says so."""


@dataclass(frozen=True)
class Column:
    """One embedding column of the checked input."""

    name: str
    dim: int
    dtype: str
    """Element type on disk: float16, float32 or float64."""

    weight: float = 1.0


@dataclass(frozen=True)
class InputSpec:
    """What profile found out about the input: all that a reader needs to know."""

    columns: tuple[Column, ...]
    id_column: str
    id_type: str
    """int64 or string."""

    label_column: str | None = None
    weight_column: str | None = None
    carry_columns: tuple[str, ...] = ()
    refuse_zero_norm: bool = False
    """Under l2 a row of zeros, or one whose norm leaves float32, has no direction and counts as bad."""

    on_bad_rows: str = "fail"
    on_bad_files: str = "fail"

    @property
    def dim(self) -> int:
        """Width of a row, all embedding columns side by side."""
        return sum(c.dim for c in self.columns)

    @property
    def dtype(self) -> np.dtype:
        """Type of a row in memory: float16 where every column is, else float32."""
        return np.dtype("float16" if all(c.dtype == "float16" for c in self.columns) else "float32")

    @property
    def arrow_id_type(self) -> pa.DataType:
        """Arrow type of the id in outputs."""
        return pa.int64() if self.id_type == "int64" else pa.string()

    @property
    def blocks(self) -> list[tuple[int, int, float]]:
        """(start, stop, weight) of each embedding column within a row."""
        stops = np.cumsum([c.dim for c in self.columns]).tolist()
        return [(stop - c.dim, stop, c.weight) for stop, c in zip(stops, self.columns, strict=True)]


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Slice:
    """A range of row groups of one file."""

    index: int
    name: str
    """Name of its output, unique in the run: the input's path below the common folder."""

    uri: str
    row_groups: tuple[int, ...]
    first_row: int
    """Position of its first row in the file."""

    first_key: int
    """Key of its first row: the position in the whole input."""

    num_rows: int
    num_bytes: int
    """Uncompressed bytes."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Slice":
        """Return the slice of a mapping of its fields, such as a row of a table of slices."""
        return cls(**(row | {"row_groups": tuple(row["row_groups"])}))


@dataclass(frozen=True)
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


def embedding_layout(type_: pa.DataType, metadata: dict[bytes, bytes] | None, dtype: str | None) -> Layout | str:
    """Return how a column type holds embeddings, or a sentence that says why it cannot.

    Args:
        type_: the column's Arrow type; Ray's and Arrow's tensor extensions are seen through.
        metadata: the Arrow field's metadata, in which an unregistered extension type leaves its name.
        dtype: element type for a fixed_size_binary column, from the settings.
    """
    shape_dim = None
    if isinstance(type_, pa.BaseExtensionType):
        shape = getattr(type_, "shape", None)
        shape_dim = math.prod(shape) if shape else None
        type_ = type_.storage_type
    if pa.types.is_fixed_size_list(type_):
        value = _FLOATS.get(str(type_.value_type))
        if value is None:
            return f"holds {type_.value_type}, expected float16, float32 or float64"
        return Layout("fixed_size_list", value, type_.list_size)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        value = _FLOATS.get(str(type_.value_type))
        if value is None:
            return f"holds lists of {type_.value_type}, expected float16, float32 or float64"
        return Layout("list", value, shape_dim)
    if pa.types.is_fixed_size_binary(type_):
        if dtype is None:
            return "is fixed_size_binary; set its element type with input.embedding_columns[].dtype"
        width = np.dtype(dtype).itemsize
        if type_.byte_width % width:
            return f"has {type_.byte_width} bytes per row, not a multiple of {dtype}'s {width}"
        return Layout("fixed_size_binary", dtype, type_.byte_width // width)
    return f"is {type_}, expected a list, fixed_size_list, tensor or fixed_size_binary of floats"


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
    except _NOT_THE_FILE as error:
        raise DataError(f"{file.uri}: {_first_line(error)}. Check the network and the access rights.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        return Footer(file.uri, file.size, problem=_first_line(error))
    if twice := sorted(name for name, n in Counter(schema.names).items() if n > 1):
        return Footer(file.uri, file.size, problem=f"has more than one column {', '.join(map(repr, twice))}")
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
    return Footer(file.uri, file.size, metadata.num_rows, tuple(groups), schema, num_values, seen.hexdigest()[:16])


def _extremes(stats: Any) -> tuple[Any, Any]:
    try:
        return stats.min, stats.max
    except UnicodeDecodeError:
        # Text that is no valid UTF-8.
        return stats.min_raw, stats.max_raw


def plan_slices(footers: Sequence[Footer], slice_bytes: int) -> list[Slice]:
    """Return the slices of readable files, in the order given.

    A file is split between row groups where it is larger than `slice_bytes`; each slice has at least one row group.
    An empty file is one slice of no rows, so that it has its label file too.
    """
    names = _output_names([f.uri for f in footers])
    taken = set(names)
    slices: list[Slice] = []
    key = 0
    for footer, name in zip(footers, names, strict=True):
        parts = _split(footer.row_groups, slice_bytes)
        part_names = _part_names(name, len(parts), taken)
        taken.update(part_names)
        row = 0
        for part_name, groups in zip(part_names, parts, strict=True):
            rows = sum(footer.row_groups[g][0] for g in groups)
            size = sum(footer.row_groups[g][1] for g in groups)
            slices.append(Slice(len(slices), part_name, footer.uri, tuple(groups), row, key, rows, size))
            row += rows
            key += rows
    return slices


def _split(row_groups: Sequence[tuple[int, int]], slice_bytes: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    filled = 0
    for number, (_, size) in enumerate(row_groups):
        if parts[-1] and filled + size > slice_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(number)
        filled += size
    return parts


def _part_names(name: str, num_parts: int, taken: set[str]) -> list[str]:
    if num_parts == 1:
        return [name]
    stem = name.removesuffix(".parquet")
    # `a.parquet` in two parts may lie beside a file that is itself called `a-00000.parquet`.
    while taken.intersection(names := [f"{stem}-{i:05d}.parquet" for i in range(num_parts)]):
        stem += "-part"
    return names


def _output_names(uris: Sequence[str]) -> list[str]:
    if not uris:
        return []
    folders = [u.split("/")[:-1] for u in uris]
    shared = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    names: dict[str, None] = {}
    for uri in uris:
        # Where a list spans schemes, `s3:` and the nothing behind it come before the first folder.
        parts = [part.rstrip(":") for part in uri.split("/")[shared:] if part]
        # An object may be called `../x`; as the name of an output that would lead out of the run folder.
        name = "/".join("_" if part in (".", "..") else part for part in parts)
        while not name.endswith(".parquet") or name in names:
            name += ".parquet"
        names[name] = None
    return list(names)


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
    names = [spec.id_column, *(c.name for c in spec.columns)]
    names += [spec.weight_column] if spec.weight_column else []
    names += [spec.label_column] if with_labels and spec.label_column else []
    names += list(spec.carry_columns) if with_carry else []
    names = list(dict.fromkeys(names))
    row = 0
    try:
        for table in _tables(lake, part, part.row_groups, names, block_rows):
            yield _decode(table, part, row, spec, with_labels=with_labels, with_carry=with_carry)
            row += len(table)
        return
    except _NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError) as error:
        problem = f"{part.uri} cannot be read beyond row {part.first_row + row}: {_first_line(error)}"
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
                    yield _decode(fresh, part, row, spec, with_labels=with_labels, with_carry=with_carry)
                    row += len(fresh)
        except _NOT_THE_FILE:
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
        for batch in parquet.iter_batches(block_rows, row_groups=list(row_groups), columns=names, use_threads=False):
            yield pa.Table.from_batches([batch])


def _group_rows(lake: Lake, part: Slice) -> list[tuple[int, int, int]]:
    """Return (row group, first row, row behind the last) of each row group, counted within the slice."""
    try:
        with lake.open_parquet(part.uri) as handle:
            metadata = pq.ParquetFile(handle).metadata
    except _NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError):
        # The file is gone, or its footer is damaged by now: all that is left of the slice is lost in one piece.
        return [(part.row_groups[0], 0, part.num_rows)]
    stops = np.cumsum([metadata.row_group(g).num_rows for g in part.row_groups]).tolist()
    return [(g, a, b) for g, a, b in zip(part.row_groups, [0, *stops], stops, strict=False)]


def _decode(
    table: pa.Table, part: Slice, row: int, spec: InputSpec, *, with_labels: bool, with_carry: bool
) -> RowBatch:
    n = len(table)
    x = np.empty((n, spec.dim), spec.dtype) if len(spec.columns) > 1 else None
    reasons = np.full(n, "", dtype="U16")
    for column, (start, stop, _) in zip(spec.columns, spec.blocks, strict=True):
        values = vectors_from_arrow(table[column.name], column.dim, column.dtype, reasons)
        _mark_bad_values(values, reasons, refuse_zero_norm=spec.refuse_zero_norm)
        # What leaves the range of float32 here was marked above.
        with np.errstate(over="ignore"):
            if x is None:
                x = values.astype(spec.dtype, copy=False)
            else:
                x[:, start:stop] = values
    assert x is not None
    ids = canonical_ids(table[spec.id_column], spec)
    ids, broken = without_broken_text(ids)
    _mark(reasons, broken, "bad_id")
    if ids.null_count:
        reasons[(reasons == "") & ids.is_null().to_numpy(zero_copy_only=False)] = "missing"
    weights = None
    if spec.weight_column:
        with np.errstate(over="ignore"):
            weights = table[spec.weight_column].to_numpy().astype(np.float32)
        reasons[(reasons == "") & ~(np.isfinite(weights) & (weights > 0))] = "bad_weight"
    labels = table[spec.label_column].combine_chunks() if with_labels and spec.label_column else None
    carry = table.select(list(spec.carry_columns)) if with_carry else None

    good = reasons == ""
    positions = np.arange(n, dtype=np.int64)
    if not good.all():
        bad = np.flatnonzero(~good)
        if spec.on_bad_rows == "fail":
            where = int(bad[0])
            raise DataError(
                f"{part.uri} row {part.first_row + row + where} (id {shown(ids[where].as_py())}) is bad: "
                f"{reasons[where]}. Fix the export, or set input.on_bad_rows=quarantine."
            )
        rejects = _rejects(ids.take(pa.array(bad)), part, part.first_row + row + bad, reasons[bad], spec)
        keep = pa.array(good)
        x, positions = x[good], positions[good]
        ids = ids.filter(keep)
        weights = weights[good] if weights is not None else None
        labels = labels.filter(keep) if labels is not None else None
        carry = carry.filter(keep) if carry is not None else None
    else:
        rejects = rejects_schema(spec.arrow_id_type).empty_table()
    return RowBatch(part.first_key + row + positions, x, ids, weights, labels, carry, rejects)


def vectors_from_arrow(
    column: pa.ChunkedArray, dim: int, dtype: str, reasons: npt.NDArray[np.str_]
) -> npt.NDArray[Any]:
    """Return an embedding column as an (n, dim) matrix, without a copy where every row is regular.

    Args:
        column: n rows, any of the layouts that `embedding_layout` accepts.
        dim: elements per row.
        dtype: element type; of a fixed_size_binary column, how its bytes are read.
        reasons: (n,) written in place: `missing` for null rows, `wrong_length` for rows of another length. Those rows
            are zero in the result.
    """
    chunks = [c.storage if isinstance(c, pa.ExtensionArray) else c for c in column.chunks if len(c)]
    if not chunks:
        return np.empty((0, dim), dtype)
    array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    n = len(array)
    if pa.types.is_fixed_size_binary(array.type):
        width = dim * np.dtype(dtype).itemsize
        start = array.offset * width
        flat = np.frombuffer(array.buffers()[1], np.uint8)[start : start + n * width].view(dtype)
        _mark(reasons, array.is_null().to_numpy(zero_copy_only=False), "missing")
        return flat.reshape(n, dim)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    regular = lengths == dim
    if regular.all():
        return array.flatten().to_numpy(zero_copy_only=False).reshape(n, dim)
    _mark(reasons, lengths < 0, "missing")
    _mark(reasons, ~regular & (lengths >= 0), "wrong_length")
    x = np.zeros((n, dim), dtype)
    x[regular] = array.filter(pa.array(regular)).flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return x


def _mark_bad_values(x: npt.NDArray[Any], reasons: npt.NDArray[np.str_], *, refuse_zero_norm: bool) -> None:
    # One pass finds the suspects: NaN and Inf always spoil a sum. Only the suspects are looked at closely, because a
    # sum of large finite values may overflow too.
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(np.einsum("ij->i", x, dtype=np.float32, casting="unsafe")))
    bad = suspects[~np.isfinite(x[suspects]).all(axis=1)]
    if x.dtype == np.float64:
        # These values leave float32's range when the row is stored.
        bad = np.union1d(bad, suspects[(np.abs(x[suspects]) > np.finfo(np.float32).max).any(axis=1)])
    flags = np.zeros(len(x), bool)
    flags[bad] = True
    _mark(reasons, flags, "not_finite")
    if refuse_zero_norm:
        _mark_bad_norms(x, reasons)


def _mark_bad_norms(x: npt.NDArray[Any], reasons: npt.NDArray[np.str_]) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", x, x, dtype=np.float32, casting="unsafe")
    suspects = np.flatnonzero(~((squares >= _LEAST_SQUARE) & (squares <= _LARGEST_SQUARE)))
    if not len(suspects):
        return
    small = np.zeros(len(x), bool)
    small[suspects] = squares[suspects] < _LEAST_SQUARE
    _mark(reasons, small & ~x.any(axis=1), "zero_norm")
    _mark(reasons, small, "norm_underflow")
    small[suspects] = ~small[suspects]
    _mark(reasons, small, "norm_overflow")


def _mark(reasons: npt.NDArray[np.str_], flags: npt.NDArray[np.bool_], reason: str) -> None:
    reasons[flags & (reasons == "")] = reason


def canonical_ids(column: pa.ChunkedArray, spec: InputSpec) -> pa.Array:
    """Return the ids as int64 or string, whatever width or dictionary they were stored with."""
    ids = column.cast(spec.arrow_id_type).combine_chunks()
    return pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids


def without_broken_text(ids: pa.Array) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return the ids with null for those that are no valid UTF-8, and which these are.

    Parquet does not check its strings; whoever reads such a label file in Python could not decode it.
    """
    broken = np.zeros(len(ids), bool)
    if not pa.types.is_string(ids.type):
        return ids, broken
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid:
        for row, text in enumerate(ids.cast(pa.binary()).to_pylist()):
            try:
                _ = text is None or text.decode()
            except UnicodeDecodeError:
                broken[row] = True
        ids = pc.if_else(pa.array(broken), pa.scalar(None, ids.type), ids)
    return ids, broken


def shown(value: Any, most: int = 100) -> str:
    """Return an id as a message shows it: the beginning of one that is very long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
            ids, _ = without_broken_text(canonical_ids(table[spec.id_column], spec))
            yield rejects(ids)
            row += len(table)
    except _NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError) as error:
        log.warning("ids of %s beyond row %d are not known: %s", part.uri, part.first_row + row, _first_line(error))
    while row < part.num_rows:
        ids = pa.nulls(min(block_rows, part.num_rows - row), spec.arrow_id_type)
        yield rejects(ids)
        row += len(ids)


def _lost_rows(lake: Lake, part: Slice, group: int, start: int, row: int, stop: int, spec: InputSpec) -> RowBatch:
    """Return the rows of a row group from `row` on as rejects; positions count within the slice."""
    rows = np.arange(part.first_row + row, part.first_row + stop)
    try:
        columns = [t[spec.id_column] for t in _tables(lake, part, (group,), [spec.id_column], stop - start)]
        ids = canonical_ids(pa.chunked_array([c for t in columns for c in t.chunks]), spec).slice(row - start)
        ids, _ = without_broken_text(ids)
    except _NOT_THE_FILE:
        raise
    except (pa.ArrowException, OSError):
        ids = pa.nulls(len(rows), spec.arrow_id_type)
    rejects = _rejects(ids, part, rows, np.full(len(rows), "unreadable_file"), spec)
    return RowBatch(
        np.empty(0, np.int64),
        np.empty((0, spec.dim), spec.dtype),
        pa.array([], spec.arrow_id_type),
        np.empty(0, np.float32) if spec.weight_column else None,
        None,
        None,
        rejects,
    )


def class_names(labels: pa.Array | None) -> npt.NDArray[np.str_] | None:
    """Return known classes as text, "" for a missing one.

    A name of more than 200 characters is cut, and ends in a digest of the whole: numpy gives every row of an array the
    room of the longest text, and one label of a megabyte would take all memory.
    """
    if labels is None:
        return None
    names = pc.fill_null(labels.cast(pa.large_string()), "").to_pylist()
    return np.array([n if len(n) <= _LONGEST_CLASS else _shortened(n) for n in names], dtype=np.str_)


def _shortened(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: _LONGEST_CLASS - len(digest) - 4]}... {digest}"
