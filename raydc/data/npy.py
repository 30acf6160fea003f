"""Embeddings in .npy files beside the Parquet files, in the same order of rows, as clip-retrieval writes them.

A template names the array of each Parquet file: {number} stands for the digits at the end of its name, {stem} for its
name without the ending. So metadata/metadata_3.parquet goes with `img_emb/img_emb_{number}.npy`.
"""

import ast
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydc.errors import DataError
from raydc.storage.lake import Lake, absolute

# More than the header of any array of numbers takes.
_HEADER_BYTES = 4096


@dataclass(frozen=True)
class Npy:
    """What the header of an .npy file says."""

    dtype: str
    """As numpy writes it, such as <f2."""

    num_rows: int
    dim: int
    offset: int
    """Place of the first number in the file, in bytes."""


def npy_uri(template: str, parquet_uri: str) -> str | None:
    """Return the array that belongs to a Parquet file; None if its name has no number and the template asks for one."""
    stem = parquet_uri.rsplit("/", 1)[-1].rpartition(".")[0] or parquet_uri.rsplit("/", 1)[-1]
    number = re.search(r"(\d+)$", stem)
    if "{number}" in template and number is None:
        return None
    return absolute(template.replace("{number}", number[1] if number else "").replace("{stem}", stem))


def read_header(lake: Lake, uri: str) -> Npy | str:
    """Return what an .npy file says of itself, or a sentence that says what is wrong with it."""
    try:
        head = lake.read_range(uri, 0, _HEADER_BYTES)
        size = lake.size(uri)
    except FileNotFoundError:
        return f"has no array {uri}"
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        return f"goes with {uri}, which is no .npy file"
    wide = head[6] >= 2
    start = 12 if wide else 10
    length = int.from_bytes(head[8:start], "little")
    try:
        found = ast.literal_eval(head[start : start + length].decode("latin1"))
        dtype, shape, fortran = np.dtype(found["descr"]), found["shape"], found["fortran_order"]
        rows, dim = shape
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return f"goes with {uri}, whose header is not that of a matrix"
    if fortran or dtype.kind not in "fiu":
        return f"goes with {uri}, which must hold numbers row by row: numpy.save(path, numpy.ascontiguousarray(x))"
    if size != start + length + rows * dim * dtype.itemsize:
        return f"goes with {uri}, which is not whole: {size} bytes for {rows} x {dim} x {dtype}"
    return Npy(dtype.str, int(rows), int(dim), start + length)


def read_rows(lake: Lake, uri: str, first: int, num: int) -> npt.NDArray[Any]:
    """Return some rows of an array.

    Raises:
        DataError: they are not there any more.
    """
    head = read_header(lake, uri)
    if isinstance(head, str) or first + num > head.num_rows:
        raise DataError(f"{uri}: changed since the input was profiled. Restore it, or use a new --run-id.")
    dtype = np.dtype(head.dtype)
    width = head.dim * dtype.itemsize
    start = head.offset + first * width
    body = lake.read_range(uri, start, start + num * width)
    return np.frombuffer(body, dtype).reshape(num, head.dim)
