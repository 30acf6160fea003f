"""The demo's data: scikit-learn's digits as sharded Parquet files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.errors import StageError
from raydc.runfolder.ownership import DEMO_INPUT
from raydc.storage.lake import Lake, is_staged, join

DIGITS = "demo:digits"
_NUM_FILES = 4


def with_data(config: Config, check: Callable[[Config], None]) -> Config:
    """Return the settings with `input.path: demo:digits` replaced by the shards, written below `output` first.

    Args:
        config: any settings; others than the demo's stay as they are.
        check: called with the new settings before anything is written; raises what the command would refuse.

    Raises:
        StageError: other files are where the shards belong.
    """
    if config.input.path != DIGITS:
        return config
    output = config.output
    folder = join(output, DEMO_INPUT) if "://" in output else str(Path(output) / DEMO_INPUT)
    config = config.model_copy(update={"input": config.input.model_copy(update={"path": folder})})
    check(config)
    _write_missing(Lake(**config.storage.model_dump()), folder)
    return config


def write_digits(folder: Path) -> Path:
    """Write the 1797 images of 8 x 8 pixels as Parquet files: id, embedding (64 floats in [0, 1]), label.

    Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, as scikit-learn ships it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in _shards():
        pq.write_table(table, folder / name)
    return folder


def _shards() -> Iterator[tuple[str, pa.Table]]:
    # A second that a run on other data need not wait for.
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32)
    for number, rows in enumerate(np.array_split(np.arange(len(x)), _NUM_FILES)):
        table = pa.table(
            {
                "id": pa.array(rows, pa.int64()),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x[rows].reshape(-1)), x.shape[1]),
                "label": pa.array(y[rows], pa.int64()),
            }
        )
        yield f"part-{number:05d}.parquet", table


def _write_missing(lake: Lake, folder: str) -> None:
    """Write the shards that are not there; a folder that holds anything else is left as it is."""
    shards, names = dict(_shards()), lake.names(folder)
    present = [name for name in names if name in shards]
    foreign = [name for name in names if name not in shards and not is_staged(name)]
    foreign += [name for name in present if not _holds(lake, join(folder, name), shards[name])]
    if foreign:
        raise StageError(
            f"demo: {folder} holds {sorted(foreign)[0] or 'a file of this name'}, which is not the demo's. Nothing "
            "there was touched. Use another output, or move what is there to another place."
        )
    for name in sorted(shards.keys() - set(present)):
        with lake.staged(join(folder, name)) as path:
            pq.write_table(shards[name], path)


def _holds(lake: Lake, uri: str, table: pa.Table) -> bool:
    try:
        with lake.open_parquet(uri) as handle:
            return pq.read_table(handle).cast(table.schema).equals(table)
    except (pa.ArrowException, OSError, ValueError):
        return False
