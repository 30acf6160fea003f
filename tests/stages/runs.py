"""A run folder up to its labels, made by the stages themselves but without workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from raydc.config import Config
from raydc.labeling.label_slice import Labeling, Statistics
from raydc.model import Model
from raydc.runfolder.folder import RunDir
from raydc.stages import merge
from raydc.stages import profile as profiling
from raydc.storage.lake import Lake
from tests import shards


def fill(folder: Path, num: int = 100, *, num_bad: int = 0, unknown_corner: int | None = None) -> np.ndarray:
    """Write rows beside the corners into two files and an empty one; return the corner of each good row.

    The rows beside one corner may be of unknown class.
    """
    x, leaf = shards.near_corners(num)
    x[:num_bad] = np.nan
    label = pa.array([None if k == unknown_corner else f"corner {k}" for k in leaf], pa.string())
    for number, rows in enumerate(np.array_split(np.arange(num), 2)):
        table = shards.rows(x[rows], first_id=int(rows[0]), label=label.take(pa.array(rows)))
        shards.write(folder / f"part-{number}.parquet", table)
    shards.write(folder / "part-2.parquet", shards.rows(x[:0], label=label.slice(0, 0)))
    return leaf[num_bad:]


def labeled_run(folder: Path, *, offset: np.ndarray | None = None, **sections: Any) -> tuple[Config, RunDir]:
    """Return a run over `folder`/in that is done up to assign; `offset` moves the means that merge sees."""
    sections["input"] = {"label_column": "label", "on_bad_rows": "quarantine"} | sections.get("input", {})
    sections["merge"] = {"levels": [2]} | sections.get("merge", {})
    config = shards.settings(folder / "in", **sections)
    run = RunDir(Lake(), str(folder / "runs"), "r1")
    run.write_header(config)
    _do(run, config, "profile", profiling.run(config, run))
    _write_fit(run, offset)
    _do(run, config, "fit", {"objective": config.fit.objective, "rows": 100})
    _do(run, config, "merge", merge.run(config, run))
    total = _assign(run)
    _do(run, config, "assign", {"rows": total.rows, "labels": total.labels, "rejects": total.rejects})
    return config, run


def _do(run: RunDir, config: Config, stage: str, metrics: dict[str, Any]) -> None:
    run.mark_done(stage, config.settings(stage), 1.0, metrics)


def _write_fit(run: RunDir, offset: np.ndarray | None) -> None:
    # Turned, so that merge has something to put in order.
    turned = shards.corner_model(centers_KL=torch.from_numpy(shards.CORNERS[[2, 0, 3, 1]]), levels={})
    turned.save(run.lake, run.uri("fit", "model"))
    turned.save(run.lake, run.uri("fit", "baselines", "raw_kmeans"))
    leaves = {
        "weights": torch.tensor([25.0, 25.0, 25.0, 25.0], dtype=torch.float64),
        "means": turned.centers_KL.double() + (0.0 if offset is None else torch.from_numpy(offset)),
        "sse": torch.full((4,), 50.0, dtype=torch.float64),
    }
    run.lake.write_bytes(run.uri("fit", "leaves.safetensors"), safetensors.torch.save(leaves))


def _assign(run: RunDir) -> Statistics:
    profile, model = profiling.load(run), Model.load(run.uri("model"), run.lake)
    leaves = merge.leaf_statistics(run)
    job = Labeling(
        run.lake,
        run.root,
        profile.spec,
        model,
        {k: merge.group_centers(groups, leaves) for k, groups in model.levels.items()},
        {"raw_kmeans": Model.load(run.uri("fit", "baselines", "raw_kmeans"), run.lake)},
        baseline_fraction=1.0,
    )
    total = shards.label_all(job, profile.slices)
    with run.lake.staged(run.uri("exemplars.parquet")) as path:
        pq.write_table(total.exemplars.sort_by("key"), path)
    counted = Statistics(total.rows, total.labels, total.rejects, total.tallies)
    run.lake.write_bytes(run.uri("statistics.npz"), counted.to_bytes())
    return total
