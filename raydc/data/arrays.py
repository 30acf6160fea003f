"""Whatever holds rows in this process as one matrix: arrays, tensors, pandas, polars and Arrow columns and tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydc.core.row_guard import RowGuard
from raydc.data.columns import vectors_from_arrow, vectors_from_parts
from raydc.data.layouts import Layout, embedding_layout
from raydc.data.slices import Column


def rows_of(x: Any, dim: int, columns: Sequence[Column] = ()) -> npt.NDArray[Any]:
    """Return the rows of `x` as a matrix, as a run would read them.

    Args:
        x: a matrix, nested lists, a column of lists (pandas, polars, Arrow), or a table with the model's columns or
            with one column for each dimension.
        dim: numbers of a row.
        columns: of the model, looked for by name in a table.

    Raises:
        ValueError: these are no rows of numbers.
    """
    if isinstance(x, np.ndarray) and x.dtype != object:
        return x
    table = _table(x)
    if table is None:
        return np.asarray(x) if not isinstance(x, np.ndarray) else _of_objects(x, dim)
    if isinstance(table, pa.ChunkedArray):
        return _of_column(table, dim, columns[0].dtype if len(columns) == 1 else "float32", "the column")
    if columns and all(
        c.name in table.column_names or (c.parts and set(c.parts) <= {*table.column_names}) for c in columns
    ):
        parts = [_of_table(table, c) for c in columns]
        return parts[0] if len(parts) == 1 else np.concatenate([p.astype(np.float32) for p in parts], axis=1)
    if table.num_columns == 1:
        return _of_column(table.column(0), dim, "float32", f"column {table.column_names[0]!r}")
    if table.num_columns != dim:
        names = [c.name for c in columns]
        raise ValueError(
            f"expected a table with the columns {names}, or with {dim} columns, got {table.column_names[:20]}"
        )
    return _checked(table, lambda reasons: vectors_from_parts(table, tuple(table.column_names), reasons), "the table")


def refuse_bad_rows(x: npt.NDArray[Any], guard: RowGuard) -> None:
    """Raise if a row cannot be clustered, by the rule of a run.

    Raises:
        ValueError: names the first bad row and its reason, and counts them all.
    """
    reasons = np.full(len(x), "", dtype="U16")
    guard.mark(x, reasons)
    _refuse(reasons, "x")


def _refuse(reasons: npt.NDArray[np.str_], what: str) -> None:
    bad = np.flatnonzero(reasons != "")
    if len(bad):
        raise ValueError(
            f"row {bad[0]} of {what} is bad: {reasons[bad[0]]} ({len(bad)} of {len(reasons)} rows are). Leave them out "
            "first, as a run with input.on_bad_rows=quarantine does."
        )


def _table(x: Any) -> pa.Table | pa.ChunkedArray | None:
    """Return tables and columns of any library as Arrow's; None for what is neither."""
    if isinstance(x, pa.Table | pa.ChunkedArray):
        return x
    if isinstance(x, pa.RecordBatch):
        return pa.Table.from_batches([x])
    if isinstance(x, pa.Array):
        return pa.chunked_array([x])
    library = type(x).__module__.partition(".")[0]
    if library == "pandas":
        if hasattr(x, "columns"):
            return pa.Table.from_pandas(x.rename(columns=str), preserve_index=False)
        found = pa.Array.from_pandas(x)
        return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])
    if library == "polars":
        return _table(x.to_arrow())
    return None


def _of_objects(x: npt.NDArray[np.object_], dim: int) -> npt.NDArray[Any]:
    if x.ndim == 2:
        return x.astype(np.float64)
    return _of_column(pa.chunked_array([pa.array(list(x))]), dim, "float32", "the array")


def _of_table(table: pa.Table, column: Column) -> npt.NDArray[Any]:
    if column.parts:
        x = _checked(table, lambda reasons: vectors_from_parts(table, column.parts, reasons), f"column {column.name!r}")
    else:
        x = _of_column(table[column.name], column.dim, column.dtype, f"column {column.name!r}")
    return x if column.scale == 1.0 else x * np.float32(column.scale)


def _of_column(column: pa.ChunkedArray, dim: int, dtype: str, what: str) -> npt.NDArray[Any]:
    layout = embedding_layout(column.type, None, dtype)
    if not isinstance(layout, Layout) or layout.kind == "number":
        raise ValueError(f"{what} is {column.type}, expected lists of {dim} numbers")
    return _checked(column, lambda reasons: vectors_from_arrow(column, dim, layout.dtype, reasons), what)


def _checked(rows: Any, read: Any, what: str) -> npt.NDArray[Any]:
    reasons = np.full(len(rows), "", dtype="U16")
    x = read(reasons)
    _refuse(reasons, what)
    return x
