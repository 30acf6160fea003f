"""Arrow columns as arrays: embeddings as a matrix, ids, classes; and which rows are bad, with the reason."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydc.data.slices import InputSpec

# A row is divided by its norm in float32: outside of these its square is infinite, or has lost its digits.
_LEAST_SQUARE, _LARGEST_SQUARE = np.float32(1e-30), np.float32(1e38)

_LONGEST_CLASS = 200


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
        mark(reasons, array.is_null().to_numpy(zero_copy_only=False), "missing")
        return flat.reshape(n, dim)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    regular = lengths == dim
    if regular.all():
        return array.flatten().to_numpy(zero_copy_only=False).reshape(n, dim)
    mark(reasons, lengths < 0, "missing")
    mark(reasons, ~regular & (lengths >= 0), "wrong_length")
    x = np.zeros((n, dim), dtype)
    x[regular] = array.filter(pa.array(regular)).flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return x


def mark_bad_values(x: npt.NDArray[Any], reasons: npt.NDArray[np.str_], *, refuse_zero_norm: bool) -> None:
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
    mark(reasons, flags, "not_finite")
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
    mark(reasons, small & ~x.any(axis=1), "zero_norm")
    mark(reasons, small, "norm_underflow")
    small[suspects] = ~small[suspects]
    mark(reasons, small, "norm_overflow")


def mark(reasons: npt.NDArray[np.str_], flags: npt.NDArray[np.bool_], reason: str) -> None:
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
