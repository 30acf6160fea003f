"""What a column's Arrow type says of the embeddings in it."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Layout:
    """How an embedding column is stored."""

    kind: str
    """list, fixed_size_list or fixed_size_binary."""

    dtype: str
    """Element type: float16, float32 or float64."""

    dim: int | None
    """Elements per row where the type itself says so."""


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
