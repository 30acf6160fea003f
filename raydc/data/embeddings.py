"""Which columns hold the embeddings, how wide they are, and which files hold them otherwise."""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import EmbeddingColumn
from raydc.data.columns import row_lengths
from raydc.data.footers import FileColumns, Footer
from raydc.data.layouts import Layout, embedding_layout, is_whole, values_per_item, widest
from raydc.data.npy import Npy, npy_uri, read_header
from raydc.data.slices import Column
from raydc.storage.lake import Lake

_READERS = 16

# Files whose first rows are looked at where the footer does not say how long a row is.
_LOOKED_AT = 3

# So many columns of one number each look like an embedding that was spread over them.
_MANY_NUMBERS = 8


@dataclass(kw_only=True)
class Resolved:
    """What the footers say of the embedding columns."""

    columns: list[Column] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Problems of a file, by URI."""

    arrays: list[list[Any]] = field(default_factory=list)
    """Size and type of each .npy file, for the input's fingerprint."""

    general: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, uri: str, problem: str) -> None:
        """Add a problem of a file."""
        self.problems[uri] = f"{self.problems[uri]}; {problem}" if uri in self.problems else problem


def names_of(columns: FileColumns, most: int = 20) -> str:
    """Return the column names of a file for a message."""
    names = columns.names
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])}, and {len(names) - most} more"


def resolve(wanted: Sequence[EmbeddingColumn], footers: Sequence[Footer], on_bad_rows: str, lake: Lake) -> Resolved:
    """Return the embedding columns as most files have them, and the problem of each file that has them otherwise."""
    found = Resolved()
    for group in _groups(wanted, footers):
        first = group[0]
        if first.npy is not None:
            column = _from_npy(first, footers, lake, found)
        elif first.prefix is not None or first.columns or len(group) > 1 or _is_number(first, footers):
            column = _from_parts(group, footers, found)
        else:
            column = _from_column(first, footers, on_bad_rows, lake, found)
        if column is None:
            found.general = found.general or [_not_found(first, footers)]
        else:
            found.columns.append(column)
            found.notes += _interpretation(column, first)
    return found


def _groups(wanted: Sequence[EmbeddingColumn], footers: Sequence[Footer]) -> list[list[EmbeddingColumn]]:
    """Return columns of one number each that stand side by side as one group: the dimensions of one embedding."""
    groups: list[list[EmbeddingColumn]] = []
    together = False
    for column in wanted:
        number = column.prefix is None and not column.columns and column.npy is None and _is_number(column, footers)
        same = groups and (groups[-1][-1].weight, groups[-1][-1].scale) == (column.weight, column.scale)
        if number and together and same:
            groups[-1].append(column)
        else:
            groups.append([column])
        together = number
    return groups


def _layout(footer: Footer, name: str, dtype: str | None) -> Layout | str | None:
    assert footer.columns is not None
    return _layout_in(footer.columns, name, dtype)


@functools.lru_cache(maxsize=1024)
def _layout_in(columns: FileColumns, name: str, dtype: str | None) -> Layout | str | None:
    arrow = columns.fields.get(name)
    return None if arrow is None else embedding_layout(arrow.type, arrow.metadata, dtype)


def _is_number(column: EmbeddingColumn, footers: Sequence[Footer]) -> bool:
    layouts = (_layout(f, column.name, column.dtype) for f in footers)
    first = next((x for x in layouts if isinstance(x, Layout) and x.kind != "null"), None)
    return first is not None and first.kind == "number"


def _from_npy(wanted: EmbeddingColumn, footers: Sequence[Footer], lake: Lake, found: Resolved) -> Column | None:
    assert wanted.npy is not None
    uris = [npy_uri(wanted.npy, f.uri) for f in footers]
    with ThreadPoolExecutor(_READERS) as pool:
        heads = list(pool.map(lambda uri: "" if uri is None else read_header(lake, uri), uris))
    kinds = Counter((h.dim, np.dtype(h.dtype).name) for h in heads if isinstance(h, Npy))
    if not kinds:
        found.general += [f"{f.uri}: {h}" for f, h in zip(footers, heads, strict=True) if h][:1]
        return None
    dim, dtype = kinds.most_common(1)[0][0]
    for f, head, uri in zip(footers, heads, uris, strict=True):
        if uri is None:
            found.add(f.uri, f"has no number at the end of its name, which {wanted.npy} asks for")
        elif isinstance(head, str):
            found.add(f.uri, head)
        elif (head.dim, np.dtype(head.dtype).name) != (dim, dtype):
            found.add(f.uri, f"goes with {uri} of {head.dim} x {np.dtype(head.dtype).name}, expected {dim} x {dtype}")
        elif head.num_rows != f.num_rows:
            found.add(f.uri, f"has {f.num_rows} rows, and {uri} has {head.num_rows}: they are not the same rows")
        else:
            found.arrays.append([uri.rsplit("/", 1)[-1], head.num_rows, head.dim, head.dtype])
    return Column(name=wanted.name, dim=dim, dtype=dtype, weight=wanted.weight, scale=wanted.scale, npy=wanted.npy)


def _from_parts(group: list[EmbeddingColumn], footers: Sequence[Footer], found: Resolved) -> Column | None:
    first = group[0]
    parts = tuple(first.columns) or (_by_prefix(first.prefix, footers) if first.prefix is not None else ())
    parts = parts or tuple(c.name for c in group if first.prefix is None)
    name = first.name if len(group) == 1 else f"{first.name}..{group[-1].name}"
    if not parts:
        return None
    dtypes: set[str] = set()
    usable = 0
    # Files of one schema are one question.
    judged: dict[FileColumns | None, tuple[str, set[str]]] = {}
    for f in footers:
        if f.columns not in judged:
            judged[f.columns] = _judge_parts(parts, first, f)
        problem, here = judged[f.columns]
        if problem:
            found.add(f.uri, problem)
        else:
            usable += 1
            dtypes |= here
    if not usable:
        return None
    return Column(
        name=name,
        dim=len(parts),
        dtype=widest(dtypes or {"float32"}),
        weight=first.weight,
        scale=first.scale,
        parts=parts,
    )


def _judge_parts(parts: Sequence[str], wanted: EmbeddingColumn, footer: Footer) -> tuple[str, set[str]]:
    """Return what is wrong with the single number columns of a file, "" for nothing, and their element types."""
    layouts = {name: _layout(footer, name, wanted.dtype) for name in parts}
    missing = [name for name, layout in layouts.items() if layout is None]
    wrong = [name for name, x in layouts.items() if isinstance(x, str) or (x and x.kind not in ("number", "null"))]
    assert footer.columns is not None
    problems = []
    if missing:
        problems.append(f"has no column {_some(missing)} (columns: {names_of(footer.columns)})")
    if wrong:
        problems.append(f"column {_some(wrong)} holds no single number, expected one in each of {len(parts)} columns")
    if wanted.prefix is not None and (more := set(_numbered(wanted.prefix, footer)) - set(parts)):
        problems.append(f"has {len(parts) + len(more)} columns called {wanted.prefix!r} and a number, not {len(parts)}")
    return "; ".join(problems), {x.dtype for x in layouts.values() if isinstance(x, Layout) and x.kind == "number"}


def _by_prefix(prefix: str, footers: Sequence[Footer]) -> tuple[str, ...]:
    counts = Counter(_numbered(prefix, f) for f in footers)
    return max(counts, key=lambda names: (bool(names), counts[names]), default=())


def _numbered(prefix: str, footer: Footer) -> tuple[str, ...]:
    assert footer.columns is not None
    return _numbered_in(prefix, footer.columns)


@functools.lru_cache(maxsize=1024)
def _numbered_in(prefix: str, columns: FileColumns) -> tuple[str, ...]:
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    numbered = [(int(m[1]), name) for name in columns.names if (m := pattern.fullmatch(name))]
    return tuple(name for _, name in sorted(numbered))


def _from_column(
    wanted: EmbeddingColumn, footers: Sequence[Footer], on_bad_rows: str, lake: Lake, found: Resolved
) -> Column | None:
    layouts: dict[str, Layout] = {}
    for f in footers:
        assert f.columns is not None
        layout = _layout(f, wanted.name, wanted.dtype)
        if layout is None:
            found.add(f.uri, f"has no column {wanted.name!r} (columns: {names_of(f.columns)})")
        elif isinstance(layout, str):
            found.add(f.uri, f"column {wanted.name!r} {layout.replace('COLUMN', wanted.name)}")
        else:
            layouts[f.uri] = layout
    filled = {f.uri: f for f in footers if f.uri in layouts and f.num_rows}
    real = {u: x for u, x in layouts.items() if x.kind != "null" and (u in filled or not filled)}
    if not real:
        return None
    dims = {f.uri: _dim(f, real[f.uri], wanted.name) for f in footers if f.uri in real}
    dim = _usual_dim(wanted, real, dims, filled, lake)
    if not dim:
        uri, layout = next(iter(real.items()))
        found.general.append(f"column {wanted.name!r} holds {layout.kind} without any numbers in {uri}")
        return None
    family = Counter(is_whole(x.dtype) for x in real.values()).most_common(1)[0][0]
    for uri, footer in filled.items():
        problem = _misfit(wanted, footer, layouts[uri], dims.get(uri), dim, on_bad_rows, lake)
        if not problem and uri in real and is_whole(real[uri].dtype) != family:
            problem = f"holds {real[uri].dtype}, and most files do not: quantized numbers are others than those"
        if problem:
            found.add(uri, f"column {wanted.name!r} {problem}")
    dtypes = Counter(x.dtype for u, x in real.items() if u not in found.problems and is_whole(x.dtype) == family)
    dtype = widest(set(dtypes) or {next(iter(real.values())).dtype})
    if len(dtypes) > 1:
        counts = ", ".join(f"{t} in {n}" for t, n in dtypes.most_common())
        found.notes.append(f"column {wanted.name!r} has several element types ({counts} files), read as {dtype}")
    return Column(name=wanted.name, dim=dim, dtype=dtype, weight=wanted.weight, scale=wanted.scale)


def _dim(footer: Footer, layout: Layout, name: str) -> int | None:
    """Return how wide the rows of a file are as far as its footer says; a mean, for lists."""
    if layout.dim is not None or layout.kind != "list":
        return layout.dim
    values, rows = footer.num_values[name], footer.num_rows
    return values // rows * values_per_item(layout.dtype) if rows and values % rows == 0 else None


def _usual_dim(
    wanted: EmbeddingColumn,
    layouts: dict[str, Layout],
    dims: dict[str, int | None],
    filled: dict[str, Footer],
    lake: Lake,
) -> int | None:
    counts = Counter(dims[u] for u in (filled or layouts) if u in dims)
    dim = max(counts, key=lambda d: (d is not None, counts[d]), default=None)
    usual = [f for u, f in filled.items() if u in dims and dims[u] == dim and layouts[u].dim is None]
    if dim is not None and any(dims[u] == dim and layouts[u].dim is not None for u in dims):
        return dim
    # So far a mean over the file, which bad rows may have bent to another whole number; or nothing at all.
    for footer in usual[:_LOOKED_AT]:
        if looked := _commonest_length(footer, wanted, lake):
            return looked
    return dim


def _misfit(
    wanted: EmbeddingColumn,
    footer: Footer,
    layout: Layout,
    found: int | None,
    dim: int,
    on_bad_rows: str,
    lake: Lake,
) -> str:
    """Return how the column of a file differs from `dim` numbers a row, "" where it does not."""
    if layout.kind == "null":
        if on_bad_rows == "fail":
            return f"holds no value in {footer.num_rows} rows. Set input.on_bad_rows=quarantine to leave them out"
        return ""
    if layout.kind in ("text", "vector", "binary"):
        # Each row says how long it is, when it is read.
        return ""
    uneven = found is None
    if found != dim and layout.dim is None:
        found = _commonest_length(footer, wanted, lake) or dim
        uneven = found == dim
    if uneven and on_bad_rows == "fail":
        counts = f"{footer.num_values[wanted.name]} values in {footer.num_rows} rows"
        return (
            f"has rows of different lengths, or missing ones ({counts}). "
            "Set input.on_bad_rows=quarantine to leave the wrong ones out"
        )
    return f"holds {found} x {layout.dtype}, expected {dim} x {layout.dtype}" if (found or dim) != dim else ""


def _commonest_length(footer: Footer, wanted: EmbeddingColumn, lake: Lake) -> int | None:
    """Return the commonest length among the first rows of a column; None where they cannot be read."""
    try:
        with lake.open_parquet(footer.uri) as handle:
            batch = next(pq.ParquetFile(handle).iter_batches(1024, columns=[wanted.name]))
    except (pa.ArrowException, OSError):
        return None
    layout = _layout(footer, wanted.name, wanted.dtype)
    assert isinstance(layout, Layout)
    lengths = row_lengths(batch.column(0), layout.dtype)
    return Counter(lengths).most_common(1)[0][0] if lengths else None


def _not_found(wanted: EmbeddingColumn, footers: Sequence[Footer]) -> str:
    if wanted.prefix is not None:
        return f"input.embedding_columns: no column is called {wanted.prefix!r} and a number, such as {wanted.prefix}0"
    text = f"column {wanted.name!r}: no file holds usable embeddings in it"
    for f in footers[:1]:
        assert f.columns is not None
        prefixes = Counter(m[1] for name in f.columns.names if (m := re.fullmatch(r"(.*?)\d+", name)))
        prefix, count = prefixes.most_common(1)[0] if prefixes else ("", 0)
        layout = _layout(f, _numbered(prefix, f)[0], None) if count >= _MANY_NUMBERS else None
        if isinstance(layout, Layout) and layout.kind == "number":
            return (
                f"{text}. {count} columns are called {prefix!r} and a number: if each is a dimension, set "
                f"input.embedding_columns={{prefix: {prefix!r}}}"
            )
    return text


def _interpretation(column: Column, wanted: EmbeddingColumn) -> list[str]:
    """Return what to know of numbers that may mean something else than they say."""
    if column.dtype in ("int8", "uint8") and wanted.dtype is None and wanted.scale == 1.0:
        packed = "ubinary" if column.dtype == "uint8" else "binary"
        return [
            f"column {column.name!r} holds {column.dim} x {column.dtype}, read as numbers. Packed bits need dtype: "
            f"{packed}; quantized numbers have a scale"
        ]
    if column.dtype in ("float64", "int32", "int64", "uint32", "uint64"):
        return [f"{column.dtype} embeddings are rounded to float32"]
    return []


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"
