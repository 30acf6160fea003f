"""Planted clusters for the large rows of the benchmarks: 10 x 10 x 10 nested clusters in 768 dimensions, float16."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.core.metrics.scores import external
from raydc.data.schema import level_column

DIM = 768
NUM_CLUSTERS = 1000
_SPREAD = (1.0, 0.7, 0.5)
"""Deviation of a dimension of the centers, around their parents, from the top of the hierarchy down."""

_NOISE = 1.5
"""Deviation of a dimension of a row around its center: most of a row is noise, as in real embeddings."""


def centers(dim: int = DIM) -> np.ndarray:
    """Return the (1000, dim) float32 centers; the digits of a cluster's number are its path in the hierarchy."""
    rng = np.random.default_rng(0)
    found = np.zeros((1, dim))
    for spread in _SPREAD:
        found = (found[:, None] + rng.normal(scale=spread, size=(len(found), 10, dim))).reshape(-1, dim)
    return found.astype(np.float32)


def write(folder: Path, num_rows: int, *, rows_per_file: int = 40_000) -> Path:
    """Write the rows as Parquet files of id, embedding (float16) and label (cluster number), unless they are there.

    A row's place says nothing about its cluster; the first rows of a larger set are those of a smaller one.
    """
    center_KD = centers()
    for number, first in enumerate(range(0, num_rows, rows_per_file)):
        path = folder / f"part-{number:05d}.parquet"
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([1, number])
        label = rng.integers(0, NUM_CLUSTERS, min(rows_per_file, num_rows - first))
        x = center_KD[label] + _NOISE * rng.standard_normal((len(label), DIM), dtype=np.float32)
        values = pa.array(x.astype(np.float16).ravel())
        table = pa.table(
            {
                "id": pa.array(np.arange(first, first + len(label))),
                "embedding": pa.FixedSizeListArray.from_arrays(values, DIM),
                "label": pa.array(label),
            }
        )
        staged = path.with_suffix(".part")
        pq.write_table(table, staged, row_group_size=10_000)
        staged.rename(path)
    return folder


def quality(labels: Path, rows: Path) -> dict[str, dict[str, float]]:
    """Return how the labels of a run agree with the planted hierarchy, each of its levels with the one of its size.

    Args:
        labels: the run's label files, 1:1 beside those of `rows`.
        rows: the folder that `write` wrote.

    Returns:
        acc, nmi, ami, ari and purity of the leaves and of the levels of 100 and 10 groups.
    """
    columns = {"leaf": 1, level_column(100): 10, level_column(10): 100}
    tables: dict[str, np.ndarray] = {}
    for path in sorted(labels.glob("*.parquet")):
        planted = pq.read_table(rows / path.name, columns=["label"])["label"].to_numpy()
        found = pq.read_table(path, columns=list(columns))
        for name, divisor in columns.items():
            classes = NUM_CLUSTERS // divisor
            flat = found[name].to_numpy().astype(np.int64) * classes + planted // divisor
            counts = np.bincount(flat, minlength=NUM_CLUSTERS * classes).reshape(-1, classes)
            tables[name] = tables.get(name, 0) + counts
    return {
        name: {metric: round(value, 4) for metric, value in external(table).items()} for name, table in tables.items()
    }
