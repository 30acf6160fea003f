"""Ids: which types are accepted, and how they are written back.

Integers up to 64 signed bits are int64 in every output, text is string; unsigned hashes, UUIDs, bytes, decimals, dates
and timestamps keep their own type, so that a join by id needs no conversion. Where people read an id (the exemplars,
the report) those are text: hexadecimal for bytes.
"""

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raydc.data.columns import as_text
from raydc.data.layouts import is_text


def id_type(type_: pa.DataType) -> str | None:
    """Return the name of the type in which ids of this one are written; None for a type that cannot be an id."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if str(type_) == "extension<arrow.uuid>":
        return "uuid"
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    if pa.types.is_integer(type_):
        return "uint64" if type_ == pa.uint64() else "int64"
    if is_text(type_):
        return "string"
    if pa.types.is_fixed_size_binary(type_):
        return f"fixed_size_binary[{type_.byte_width}]"
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_):
        return "binary"
    if pa.types.is_decimal128(type_) or pa.types.is_date32(type_) or pa.types.is_timestamp(type_):
        return str(type_)
    return "date32[day]" if pa.types.is_date64(type_) else None


def arrow_type(name: str) -> pa.DataType:
    """Return the Arrow type of a name that `id_type` gave."""
    if name == "uuid":
        return pa.uuid()
    if name == "date32[day]":
        return pa.date32()
    if found := re.fullmatch(r"fixed_size_binary\[(\d+)\]", name):
        return pa.binary(int(found[1]))
    if found := re.fullmatch(r"decimal128\((\d+), (-?\d+)\)", name):
        return pa.decimal128(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"timestamp\[(\w+)(?:, tz=(.+))?\]", name):
        return pa.timestamp(found[1], tz=found[2])
    return pa.type_for_alias(name)


def ids_from_arrow(column: pa.ChunkedArray, type_: pa.DataType) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return ids in the type they are written in, and which of them are broken: these are null.

    Broken are texts that are no valid UTF-8 (Parquet does not check its strings; whoever reads such a label file in
    Python could not decode it), and numbers that are not whole in a file whose ids were stored as double.
    """
    parts = [_plain(chunk, type_) for chunk in column.chunks] or [(pa.array([], type_), np.zeros(0, bool))]
    ids = pa.concat_arrays([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]
    return ids, np.concatenate([broken for _, broken in parts])


def readable(ids: pa.Array) -> pa.Array:
    """Return ids as people read them: integers and text as they are, all others as text."""
    if ids.type in (pa.int64(), pa.string()):
        return ids
    if ids.type == pa.uuid():
        return pa.array([None if i is None else str(i) for i in ids.to_pylist()], pa.string())
    if pa.types.is_fixed_size_binary(ids.type) or pa.types.is_binary(ids.type):
        return pa.array([None if i is None else i.hex() for i in ids.to_pylist()], pa.string())
    return as_text(ids).cast(pa.string())


def _plain(array: pa.Array, type_: pa.DataType) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    broken = np.zeros(len(array), bool)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.type == type_ and not pa.types.is_string(type_):
        return array, broken
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if type_ == pa.uuid():
        return pa.ExtensionArray.from_storage(type_, array.cast(type_.storage_type)), broken
    if pa.types.is_floating(array.type):
        values = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
        whole = np.isfinite(values) & (np.floor(values) == values) & (np.abs(values) < 2.0**53)
        integers = np.where(whole, values, 0).astype(np.int64)
        # NaN is how pandas stores a missing id in a column of integers.
        return pa.array(integers, mask=~whole).cast(type_), ~whole & ~np.isnan(values)
    return _without_broken_text(array.cast(type_), broken)


def _without_broken_text(ids: pa.Array, broken: npt.NDArray[np.bool_]) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
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
