"""The plan of slices, made from the Parquet footers, and what is known of the input.

A slice is a whole file, or a range of its row groups where the file is large. It is the unit of reading, retrying and
resuming. Every row has a key, its position in the sorted input, so any worker can name any row in the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydc.core.row_guard import RowGuard
from raydc.data import ids
from raydc.data.footers import Footer
from raydc.data.layouts import is_whole


@dataclass(frozen=True, kw_only=True)
class Column:
    """One embedding column of the checked input."""

    name: str
    dim: int
    dtype: str
    """Element type on disk, such as float32 or int8; the widest where files differ."""

    weight: float = 1.0
    scale: float = 1.0
    """Factor on the stored numbers, of quantized embeddings."""

    parts: tuple[str, ...] = ()
    """Columns of one number each that make up the row; empty where one column holds it all."""

    npy: str | None = None
    """Where .npy files beside the Parquet files hold the rows; {number} stands for a Parquet file's number."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Column":
        """Return the column of its fields as JSON has them, such as those of a saved model."""
        return cls(**{**record, "parts": tuple(record.get("parts", ()))})

    @property
    def is_exact_in_float16(self) -> bool:
        """Whether float16 holds every stored number."""
        return self.scale == 1.0 and (self.dtype == "float16" or is_whole(self.dtype))


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What profile found out about the input: all that a reader needs to know."""

    columns: tuple[Column, ...]
    id_column: str
    id_type: str
    """int64, string or another type that raydc.data.ids names."""

    label_column: str | None = None
    weight_column: str | None = None
    carry_columns: tuple[str, ...] = ()
    carry_as_text: tuple[str, ...] = ()
    """Carried columns whose types in the files do not fit into one table."""

    refuse_zero_norm: bool = False
    """Under l2 a row of zeros, or one whose norm leaves float32, has no direction and counts as bad."""

    factor: tuple[float, ...] = (1.0,)
    """Factor of each dimension in preprocessing, or one for all: a row must be fit for float32 after it too."""

    offset: tuple[float, ...] = ()
    """Subtracted from each dimension in preprocessing; empty for none."""

    on_bad_rows: str = "fail"
    on_bad_files: str = "fail"

    @property
    def dim(self) -> int:
        """Width of a row, all embedding columns side by side."""
        return sum(c.dim for c in self.columns)

    @property
    def dtype(self) -> np.dtype:
        """Type of a row in memory: float16 where that holds every column's numbers, else float32."""
        return np.dtype("float16" if all(c.is_exact_in_float16 for c in self.columns) else "float32")

    @property
    def arrow_id_type(self) -> pa.DataType:
        """Arrow type of the id in outputs."""
        return ids.arrow_type(self.id_type)

    @property
    def blocks(self) -> list[tuple[int, int, float]]:
        """(start, stop, weight) of each embedding column within a row."""
        stops = np.cumsum([c.dim for c in self.columns]).tolist()
        return [(stop - c.dim, stop, c.weight) for stop, c in zip(stops, self.columns, strict=True)]

    @property
    def guard(self) -> RowGuard:
        """What tells rows that cannot be clustered."""
        blocks = tuple((a, b) for a, b, _ in self.blocks)
        return RowGuard(blocks, self.refuse_zero_norm, self.factor, self.offset)


@dataclass(frozen=True, kw_only=True)
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
            slices.append(
                Slice(
                    index=len(slices),
                    name=part_name,
                    uri=footer.uri,
                    row_groups=tuple(groups),
                    first_row=row,
                    first_key=key,
                    num_rows=rows,
                    num_bytes=size,
                )
            )
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
