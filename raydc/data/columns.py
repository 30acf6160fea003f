"""Arrow columns as arrays: embeddings as a matrix, weights, classes. Rows that cannot be read get a reason."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydc.core.row_guard import mark
from raydc.data.layouts import element_type, is_bytes, is_list, is_spark_vector, is_text, itemsize, values_per_item

_LONGEST_CLASS = 200

# Rows of text that are parsed at once: their parts take several times the memory of the text.
_TEXT_ROWS = 4096


def vectors_from_arrow(
    column: pa.ChunkedArray, dim: int, dtype: str, reasons: npt.NDArray[np.str_]
) -> npt.NDArray[Any]:
    """Return an embedding column as an (n, dim) matrix, without a copy where every row is regular.

    Args:
        column: n rows, any of the layouts that `embedding_layout` accepts, but for single numbers.
        dim: elements per row.
        dtype: element type; says how bytes, and packed integers, are read.
        reasons: (n,) written in place: `missing` for null rows, `wrong_length` for rows of another length,
            `not_numbers` for text that holds none. Those rows are zero in the result.
    """
    array = _one_array(column)
    n = len(array)
    if not n:
        return np.empty((0, dim), dtype if dtype in np.sctypeDict else np.float32)
    if is_spark_vector(array.type):
        return _spark_vectors(array, dim, reasons)
    mark(reasons, array.is_null().to_numpy(zero_copy_only=False), "missing")
    if pa.types.is_null(array.type):
        return np.zeros((n, dim), np.float32)
    if is_text(array.type):
        array = _parsed(array, reasons)
    if is_bytes(array.type):
        return _from_bytes(array, dim, dtype, reasons)
    element = element_type(array.type.value_type, dtype)
    stored = dim // values_per_item(element)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    regular = lengths == stored
    if regular.all():
        return _numbers(array.flatten(), element).reshape(n, dim)
    mark(reasons, ~regular, "wrong_length")
    values = _numbers(array.filter(pa.array(regular)).flatten(), element)
    x = np.zeros((n, dim), values.dtype)
    x[regular] = values.reshape(-1, dim)
    return x


def vectors_from_parts(table: pa.Table, names: tuple[str, ...], reasons: npt.NDArray[np.str_]) -> npt.NDArray[Any]:
    """Return single number columns side by side as a matrix; a row that has no value in any of them is missing."""
    x = np.empty((len(table), len(names)), np.float64)
    for number, name in enumerate(names):
        x[:, number] = _numbers(_one_array(table[name]), "float64").astype(np.float64)
    mark(reasons, np.asarray(np.isnan(x).all(axis=1)), "missing")
    x[reasons == "missing"] = 0
    return x


def row_lengths(column: pa.ChunkedArray, dtype: str) -> list[int]:
    """Return the numbers in each row that is there, whatever the layout; rows of text that hold none are left out."""
    array = _one_array(column)
    if is_spark_vector(array.type):
        _, size, _, values = array.flatten()
        lengths = pc.coalesce(size, pc.list_value_length(values))
    elif is_bytes(array.type):
        lengths = pc.divide(pc.binary_length(array), itemsize(dtype))
    elif is_text(array.type):
        lengths = pc.list_value_length(_parsed(array, np.full(len(array), "", "U16")))
    elif is_list(array.type):
        lengths = pc.list_value_length(array)
        dtype = element_type(array.type.value_type, dtype)
    else:
        return []
    return [n * values_per_item(dtype) for n in pc.drop_null(lengths).to_pylist()]


def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    chunks = [c.storage if isinstance(c, pa.ExtensionArray) else c for c in chunks if len(c)]
    if not chunks:
        return pa.nulls(0)
    array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        # A cast of pyarrow 26 loses the values.
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        return pa.LargeListArray.from_arrays(offsets, array.flatten(), mask=array.is_null())
    return array


def _numbers(values: pa.Array, dtype: str) -> npt.NDArray[Any]:
    """Return stored elements as numbers; a missing one becomes NaN, which makes its row bad."""
    missing = None
    if values.null_count:
        missing = values.is_null().to_numpy(zero_copy_only=False)
    if dtype not in ("bfloat16", "ubinary", "binary"):
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.uint8())
        elif pa.types.is_decimal(values.type) or pa.types.is_null(values.type):
            values = values.cast(pa.float64())
        return values.to_numpy(zero_copy_only=False)
    raw = (values if missing is None else pc.fill_null(values, 0)).to_numpy(zero_copy_only=False)
    found = _decoded(raw, dtype)
    if missing is not None:
        found = found.astype(np.float32)
        found[np.repeat(missing, values_per_item(dtype))] = np.nan
    return found


def _decoded(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        # The upper half of a float32.
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "binary":
        # sentence-transformers' signed form of packed bits: the byte less 128.
        raw = (raw.view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    return np.unpackbits(raw.view(np.uint8))


def _from_bytes(array: pa.Array, dim: int, dtype: str, reasons: npt.NDArray[np.str_]) -> npt.NDArray[Any]:
    n, width = len(array), dim // values_per_item(dtype) * itemsize(dtype)
    fixed = pa.types.is_fixed_size_binary(array.type)
    if not fixed or array.type.byte_width != width:
        lengths = pc.fill_null(pc.binary_length(array), -1).to_numpy(zero_copy_only=False)
        regular = lengths == width
        mark(reasons, ~regular, "wrong_length")
        array = pc.if_else(pa.array(regular), array, pa.scalar(None, array.type)).cast(pa.large_binary())
        array = pc.fill_null(array, pa.scalar(bytes(width), pa.large_binary()))
        flat = np.frombuffer(b"".join(array.to_pylist()), np.uint8)
    else:
        start = array.offset * width
        flat = np.frombuffer(array.buffers()[1], np.uint8)[start : start + n * width]
    if dtype in ("bfloat16", "ubinary", "binary"):
        return _decoded(flat.view("<u2") if dtype == "bfloat16" else flat, dtype).reshape(n, dim)
    return flat.view(np.dtype(dtype).newbyteorder("<")).reshape(n, dim)


def _parsed(array: pa.Array, reasons: npt.NDArray[np.str_]) -> pa.Array:
    """Return text such as `[0.1, -0.2]` as lists of numbers, whatever the brackets, commas, semicolons and blanks."""
    parts = []
    for start in range(0, len(array), _TEXT_ROWS):
        text = array.slice(start, _TEXT_ROWS).cast(pa.large_string())
        parts.append(_parsed_some(text, reasons[start : start + _TEXT_ROWS]))
    return pa.concat_arrays(parts)


def _parsed_some(text: pa.Array, reasons: npt.NDArray[np.str_]) -> pa.Array:
    text = pc.utf8_trim(text, characters=" \t\r\n[](){}")
    text = pc.replace_substring_regex(text, pattern=r"[\s;]*[,;\s][\s;]*", replacement=",")
    lists = pc.split_pattern(text, ",")
    try:
        return _as_floats(lists)
    except pa.ArrowInvalid:
        pass
    good = np.ones(len(lists), bool)
    for row in range(len(lists)):
        try:
            # A cast of a slice of lists would look at the values behind it too.
            lists.slice(row, 1).flatten().cast(pa.float64())
        except pa.ArrowInvalid:
            good[row] = False
    mark(reasons, ~good, "not_numbers")
    return _as_floats(pc.if_else(pa.array(good), lists, pa.scalar(None, lists.type)))


def _as_floats(lists: pa.Array) -> pa.Array:
    return lists.cast(pa.large_list(pa.float64()))


def _spark_vectors(array: pa.Array, dim: int, reasons: npt.NDArray[np.str_]) -> npt.NDArray[np.float64]:
    """Return Spark ML's vectors: dense ones hold all values, sparse ones the size and the values at some indices."""
    n = len(array)
    _, size, indices, values = array.flatten()
    sizes = pc.fill_null(size, -1).to_numpy(zero_copy_only=False)
    num_values = pc.fill_null(pc.list_value_length(values), -1).to_numpy(zero_copy_only=False)
    num_indices = pc.fill_null(pc.list_value_length(indices), -1).to_numpy(zero_copy_only=False)
    sparse = (num_indices >= 0) & (sizes >= 0)
    mark(reasons, array.is_null().to_numpy(zero_copy_only=False) | (num_values < 0), "missing")
    fits = np.where(sparse, (sizes == dim) & (num_indices == num_values), num_values == dim)
    mark(reasons, ~fits, "wrong_length")
    x = np.zeros((n, dim))
    dense = fits & ~sparse
    x[dense] = _numbers(values.filter(pa.array(dense)).flatten(), "float64").reshape(-1, dim)
    some = fits & sparse
    rows = np.repeat(np.flatnonzero(some), num_values[some])
    at = indices.filter(pa.array(some)).flatten().to_numpy(zero_copy_only=False)
    inside = (at >= 0) & (at < dim)
    beyond = np.zeros(n, bool)
    beyond[rows[~inside]] = True
    mark(reasons, beyond, "wrong_length")
    stored = _numbers(values.filter(pa.array(some)).flatten(), "float64")
    x[rows[inside], at[inside].astype(np.int64)] = stored[inside]
    x[beyond] = 0
    return x


def weights_from_arrow(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return row weights as float32, NaN for what is missing or no number."""
    array = _one_array(column)
    try:
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            array = array.cast(pa.float64())
    except pa.ArrowException:
        return np.full(len(column), np.nan, np.float32)
    values = array.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def shown(value: Any, most: int = 100) -> str:
    """Return an id as a message shows it: the beginning of one that is very long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def class_names(labels: pa.Array | None) -> npt.NDArray[np.str_] | None:
    """Return known classes as text, "" for a missing one.

    Whole numbers are the same class whatever type holds them: 3 and 3.0 are `3`. A name of more than 200 characters is
    cut, and ends in a digest of the whole: numpy gives every row of an array the room of the longest text, and one
    label of a megabyte would take all memory.
    """
    if labels is None:
        return None
    names = pc.fill_null(as_text(labels), "").to_pylist()
    return np.array([n if len(n) <= _LONGEST_CLASS else _shortened(n) for n in names], dtype=np.str_)


def as_text(column: pa.Array) -> pa.Array:
    """Return any column as text, null for what is missing; NaN is missing too, and 3.0 is `3`."""
    array = _one_array(column)
    if not len(array):
        return pa.nulls(len(column), pa.large_string())
    if pa.types.is_floating(array.type):
        values = array.cast(pa.float64())
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
        whole = pc.and_(pc.equal(pc.round(values), values), pc.less(pc.abs(values), 2.0**53))
        integers = pc.if_else(whole, values, pa.scalar(0.0)).cast(pa.int64()).cast(pa.large_string())
        return pc.if_else(whole, integers, values.cast(pa.large_string()))
    if is_bytes(array.type):
        return pa.array([None if v is None else _text_of(v) for v in array.to_pylist()], pa.large_string())
    try:
        return array.cast(pa.large_string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return pa.array([None if v is None else repr(v) for v in array.to_pylist()], pa.large_string())


def _text_of(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _shortened(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: _LONGEST_CLASS - len(digest) - 4]}... {digest}"
