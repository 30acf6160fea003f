"""What a column's Arrow type says of the embeddings in it: how they are read, or why not and what converts them."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_NUMBERS = {
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    "bool": "bool",
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

_BYTES_OF = {"bfloat16": 2, "ubinary": 1, "binary": 1}

_EXPECTED = "a list, fixed_size_list, tensor, Spark vector, text or bytes of numbers, or one number a column"


@dataclass(frozen=True)
class Layout:
    """How an embedding column is stored."""

    kind: str
    """list, fixed_size_list, fixed_size_binary, binary, text, vector (Spark ML), number (a dimension) or null."""

    dtype: str
    """Element type, such as float32 or int8; bfloat16, ubinary and binary are ways to read integers."""

    dim: int | None
    """Elements per row where the type itself says so."""


def itemsize(dtype: str) -> int:
    """Return the bytes of one stored element."""
    return _BYTES_OF.get(dtype) or np.dtype(dtype).itemsize


def values_per_item(dtype: str) -> int:
    """Return how many numbers one stored element holds: eight bits of packed ones."""
    return 8 if dtype in ("ubinary", "binary") else 1


def is_whole(dtype: str) -> bool:
    """Return whether the elements are integers of one byte at most: quantized or binary embeddings."""
    return dtype in ("int8", "uint8", "bool", "ubinary", "binary")


def widest(dtypes: set[str]) -> str:
    """Return the element type that stands for several ones that hold the same numbers."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    for wide in ("float64", "float32", "bfloat16"):
        if wide in dtypes:
            return wide
    # Of integers, and of float16 beside integers.
    return "float32" if dtypes & {"float16"} or not all(map(is_whole, dtypes)) else "int16"


def embedding_layout(type_: pa.DataType, metadata: dict[bytes, bytes] | None, dtype: str | None) -> Layout | str:
    """Return how a column type holds embeddings, or a sentence that says why it cannot and what converts it.

    Args:
        type_: the column's Arrow type; Ray's and Arrow's tensor extensions are seen through.
        metadata: the Arrow field's metadata, in which an unregistered extension type leaves its name.
        dtype: how bytes and integers are read, from the settings.
    """
    shape_dim = None
    if isinstance(type_, pa.BaseExtensionType):
        shape = getattr(type_, "shape", None)
        shape_dim = math.prod(shape) if shape else None
        type_ = type_.storage_type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if is_list(type_):
        element = element_type(type_.value_type, dtype)
        if element not in _NUMBERS.values() and element not in _BYTES_OF:
            return f"holds {_named(type_)}, expected numbers. {element}"
        fixed = pa.types.is_fixed_size_list(type_)
        dim = type_.list_size * values_per_item(element) if fixed else shape_dim
        return Layout("fixed_size_list" if fixed else "list", element, dim)
    if is_bytes(type_):
        return _bytes_layout(type_, dtype)
    if is_text(type_):
        return Layout("text", "float64", None)
    if pa.types.is_null(type_):
        return Layout("null", dtype or "float32", None)
    if is_spark_vector(type_):
        return Layout("vector", "float64", None)
    if number := _NUMBERS.get(str(type_)) or ("float64" if pa.types.is_decimal(type_) else None):
        return Layout("number", number, 1)
    return f"is {type_}, expected {_EXPECTED}. {_conversion(type_)}"


def element_type(type_: pa.DataType, dtype: str | None) -> str:
    """Return how the elements of a list are read, or a sentence that says what to do where that is not known."""
    number = _NUMBERS.get(str(type_)) or ("float64" if pa.types.is_decimal(type_) else None)
    packed = {"bfloat16": "uint16", "ubinary": "uint8", "binary": "int8"}
    if dtype in packed and number == packed[dtype]:
        return dtype
    if number == "uint16" and dtype != "uint16":
        return (
            "These may be integers or the bits of bfloat16: set input.embedding_columns={name: COLUMN, dtype: bfloat16}"
            ", or dtype: uint16"
        )
    if number is not None:
        return number
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return converted("flatten(COLUMN)")
    return converted("COLUMN::FLOAT[]")


def converted(expression: str) -> str:
    """Return the line of DuckDB that writes the files again with another column in place of COLUMN."""
    return f"To convert, DuckDB: COPY (SELECT * REPLACE ({expression} AS COLUMN) FROM 'IN/*.parquet') TO 'OUT.parquet'"


def is_list(type_: pa.DataType) -> bool:
    """Return whether a type is any of Arrow's lists but maps."""
    return (
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
        or pa.types.is_list_view(type_)
        or pa.types.is_large_list_view(type_)
    )


def is_text(type_: pa.DataType) -> bool:
    """Return whether a type is any of Arrow's texts."""
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def is_bytes(type_: pa.DataType) -> bool:
    """Return whether a type is any of Arrow's bytes."""
    return (
        pa.types.is_fixed_size_binary(type_)
        or pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_binary_view(type_)
    )


def is_spark_vector(type_: pa.DataType) -> bool:
    """Return whether a type is Spark ML's vector: struct<type, size, indices, values>."""
    return pa.types.is_struct(type_) and [f.name for f in type_.fields] == ["type", "size", "indices", "values"]


def _bytes_layout(type_: pa.DataType, dtype: str | None) -> Layout | str:
    fixed = pa.types.is_fixed_size_binary(type_)
    if dtype is None:
        name = "fixed_size_binary" if fixed else "binary"
        guess = ""
        if fixed:
            fits = [f"{type_.byte_width // n} x {t}" for t, n in (("float32", 4), ("float16", 2), ("float64", 8))
                    if type_.byte_width % n == 0]  # fmt: skip
            guess = f" ({type_.byte_width} bytes may be {', '.join(fits)})" if fits else ""
        return (
            f"is {name}; set its element type with input.embedding_columns[].dtype{guess}, as "
            "input.embedding_columns={name: COLUMN, dtype: float32}"
        )
    width = itemsize(dtype)
    if not fixed:
        return Layout("binary", dtype, None)
    if type_.byte_width % width:
        return f"has {type_.byte_width} bytes per row, not a multiple of {dtype}'s {width}"
    return Layout("fixed_size_binary", dtype, type_.byte_width // width * values_per_item(dtype))


def _named(type_: pa.DataType) -> str:
    return str(type_.value_type) if pa.types.is_fixed_size_list(type_) else f"lists of {type_.value_type}"


def _conversion(type_: pa.DataType) -> str:
    if pa.types.is_map(type_):
        return converted("map_values(COLUMN)::FLOAT[]")
    if pa.types.is_struct(type_):
        fields = ", ".join(f"COLUMN.{f.name}" for f in list(type_.fields)[:3])
        return converted(f"[{fields}, ...]::FLOAT[]")
    return "Name the column of the embeddings with input.embedding_columns"
