"""The demo's data: scikit-learn's digits as sharded Parquet files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from raydc.config import Config

DIGITS = "demo:digits"
_NUM_FILES = 4


def with_data(config: Config) -> Config:
    """Return the settings with `input.path: demo:digits` replaced by the shards, written below `output` first."""
    if config.input.path != DIGITS:
        return config
    folder = write_digits(Path(config.output) / "input-digits")
    return config.model_copy(update={"input": config.input.model_copy(update={"path": str(folder)})})


def write_digits(folder: Path) -> Path:
    """Write the 1797 images of 8 x 8 pixels as Parquet files: id, embedding (64 floats in [0, 1]), label.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, as scikit-learn ships it.
    """
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(x)), _NUM_FILES)):
        table = pa.table(
            {
                "id": pa.array(rows, pa.int64()),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x[rows].reshape(-1)), x.shape[1]),
                "label": pa.array(y[rows], pa.int64()),
            }
        )
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    return folder
