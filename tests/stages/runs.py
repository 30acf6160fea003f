"""A run folder up to its labels, made by the stages themselves but without workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raydc.config import Config
from raydc.data.statistics import Statistics
from raydc.labeling.label_slice import Labeling
from raydc.runfolder import artifacts
from raydc.runfolder.artifacts import Leaves
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
    artifacts.FIT_MODEL.save(run, turned)
    artifacts.baseline("raw_kmeans").save(run, turned)
    means = turned.centers_KL.double().numpy() + (0.0 if offset is None else offset)
    artifacts.FIT_LEAVES.write(run, Leaves(np.full(4, 25.0), means, np.full(4, 50.0)))


def _assign(run: RunDir) -> Statistics:
    profile, model, leaves = artifacts.PROFILE.read(run), artifacts.MODEL.load(run), artifacts.LEAVES.read(run)
    job = Labeling(
        lake=run.lake,
        output=run.root,
        spec=profile.spec,
        model=model,
        group_centers={k: leaves.group_centers(groups) for k, groups in model.levels.items()},
        baselines={"raw_kmeans": artifacts.baseline("raw_kmeans").load(run)},
        baseline_fraction=1.0,
    )
    total = shards.label_all(job, profile.slices)
    artifacts.EXEMPLARS.write(run, total.exemplars.sort_by("key"))
    artifacts.LABEL_FILES.write(run, total.files.sort_by("path"))
    artifacts.STATISTICS.write(run, total)
    return total
