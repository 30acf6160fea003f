"""Small Parquet inputs, settings and models for the tests; nothing here starts Ray."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydc.config import Config, parse_config
from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.kernel import Kernel
from raydc.data.slices import InputSpec, Slice
from raydc.data.statistics import Statistics
from raydc.labeling.label_slice import Labeling, completed, label_slice
from raydc.model import Model
from raydc.storage.lake import Lake

# Corners of a square: four leaves that no rounding confuses.
CORNERS = np.array([[0, 0], [0, 10], [10, 0], [10, 10]], np.float32)


def vectors(num: int, dim: int = 4, seed: int = 0) -> np.ndarray:
    """Return rows whose values float16 holds exactly."""
    return np.random.default_rng(seed).integers(-64, 64, size=(num, dim)).astype(np.float32) / 8


def column(x: np.ndarray, layout: str = "fixed_size_list") -> pa.Array:
    """Return the rows of a matrix as an Arrow column."""
    flat = pa.array(np.ascontiguousarray(x).reshape(-1))
    offsets = np.arange(len(x) + 1) * x.shape[1]
    if layout == "fixed_size_list":
        return pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    if layout == "list":
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
    if layout == "large_list":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)
    if layout == "fixed_size_binary":
        return pa.array([row.tobytes() for row in x], pa.binary(x.shape[1] * x.itemsize))
    if layout == "fixed_shape_tensor":
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(x).reshape(len(x), 2, x.shape[1] // 2))
    if layout == "ray_tensor":
        from ray.data.extensions import ArrowTensorArray

        return ArrowTensorArray.from_numpy(np.ascontiguousarray(x).reshape(len(x), 2, x.shape[1] // 2))
    raise ValueError(layout)


def rows(x: Any, first_id: int = 0, **others: Any) -> pa.Table:
    """Return a table of ids and embeddings; `x` is a matrix or a ready column."""
    embedding = column(x) if isinstance(x, np.ndarray) else x
    ids = {} if "id" in others else {"id": pa.array(range(first_id, first_id + len(embedding)), pa.int64())}
    return pa.table({**ids, "embedding": embedding, **others})


def write(path: Path, table: pa.Table, **options: Any) -> str:
    """Write a table and return its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


def settings(path: str | Path | list[str], **sections: Any) -> Config:
    """Return settings of a small clustering of the rows as they are."""
    sections["input"] = {"path": path if isinstance(path, list) else str(path), **sections.get("input", {})}
    sections["cluster"] = {"num_leaves": 4, **sections.get("cluster", {})}
    sections["fit"] = {"objective": "kmeans", **sections.get("fit", {})}
    return parse_config(sections)


def corner_model(**changes: Any) -> Model:
    """Return a model without a network: four leaves in the plane, and a level of two groups."""
    fields: dict[str, Any] = {
        "preprocess": Preprocess("none", [(0, 2, 1.0)]),
        "encoder": None,
        "centers_KL": torch.from_numpy(CORNERS.copy()),
        "kernel": Kernel(1.0, 4.0),
        "widths": (2,),
        "levels": {2: np.array([0, 0, 1, 1], np.int32)},
    }
    return Model(**(fields | changes))


def near_corners(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows beside the corners, and the corner of each."""
    generator = np.random.default_rng(seed)
    leaf = generator.integers(0, len(CORNERS), num)
    return (CORNERS[leaf] + generator.normal(0, 1, (num, 2))).astype(np.float32), leaf


def group_centers() -> dict[int, np.ndarray]:
    """Return the centers of the two groups of `corner_model`."""
    return {2: np.array([[0.0, 5.0], [10.0, 5.0]])}


def corner_labeling(lake: Lake, output: str, spec: InputSpec, **changes: Any) -> Labeling:
    """Return what labels rows by `corner_model` into a folder."""
    fields: dict[str, Any] = {"model": corner_model(), "group_centers": group_centers()}
    return Labeling(lake=lake, output=output, spec=spec, **(fields | changes))


def label_all(job: Labeling, slices: Iterable[Slice]) -> Statistics:
    """Return the sum of the statistics of all slices, labeled one by one in this process."""
    total = Statistics()
    for part in slices:
        total.merge(completed(job, part) or label_slice(job, part), job.num_exemplars)
    return total
