"""Run a function on several gloo ranks, each in its own process, and fit on plain arrays."""

import multiprocessing
import tempfile
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raydc.core.models.preprocess import Preprocess
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.rows import Batch, ResidentRows, StreamedRows
from raydc.core.training.settings import (
    AutoencoderSettings,
    ClusterSettings,
    DistillSettings,
    FitSettings,
    PretrainSettings,
    RefineSettings,
    VadeSettings,
)

SETTINGS = FitSettings(
    objective="dec",
    seed=0,
    precision="float32",
    autoencoder=AutoencoderSettings(hidden_dims=(32, 64), latent_dim=5),
    pretrain=PretrainSettings(
        num_epochs=3,
        batch_rows=64,
        optimizer="adam",
        learning_rate=1e-3,
        warmup_steps=0,
        schedule="cosine",
        decay_steps=20_000,
        weight_decay=0.0,
        corruption=0.1,
        layerwise=False,
        layer_epochs=2,
        layer_corruption=0.2,
        max_grad_norm=None,
    ),
    cluster=ClusterSettings(
        num_leaves=6, init_rows=10_000, num_restarts=3, num_iterations=30, tolerance=1e-5, space="codes"
    ),
    refine=RefineSettings(
        num_epochs=2,
        batch_rows=64,
        optimizer="adam",
        learning_rate=1e-3,
        refreshes_per_epoch=2,
        tolerance=0.0,
        alpha="auto",
        scale="auto",
        target_top_q=0.5,
        target_exponent=2.0,
        frequency_exponent=1.0,
        size_prior="uniform",
        clustering_weight=0.1,
        code_weight=0.1,
        code_loss="nearest",
        distance_weight=1.0,
        centroid_update="ema",
        centroid_decay=0.99,
        recluster_epochs=10,
        max_grad_norm=5.0,
    ),
    distill=DistillSettings(
        metric="cosine",
        temperature=0.1,
        reconstruction_weight=1.0,
        num_reclusterings=10,
        class_weights="none",
        start_rows=10_000,
    ),
    vade=VadeSettings(
        likelihood="gaussian",
        component_weights="learned",
        kl_weight=1.0,
        warmup_epochs=1.0,
        mixture_learning_rate=None,
        decay=0.9,
        decay_epochs=1,
        decay_floor=0.0,
        start_rows=10_000,
        start_iterations=20,
    ),
    baseline_rows=10_000,
    fingerprint="test",
)


_pools: dict[int, list] = {}


def run_ranks(world_size, function, *arguments):
    """Return [function(ranks, *arguments) for each rank]; functions are top-level, results picklable.

    The processes of a world size are started once and kept: importing torch costs seconds.
    """
    if world_size == 1:
        return [function(Ranks(), *arguments)]
    pool = _pools.get(world_size) or _start_pool(world_size)
    for _, pipe in pool:
        pipe.send((function, arguments))
    results = []
    for process, pipe in pool:
        if not pipe.poll(600):
            for hanging, _ in _pools.pop(world_size):
                hanging.kill()
            raise TimeoutError(f"rank process {process.name} hangs")
        results.append(pipe.recv())
    for kind, result in results:
        if kind == "error":
            raise RuntimeError(result)
    return [result for _, result in results]


def _start_pool(world_size):
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp()
    pool = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world_size, folder, theirs), daemon=True)
        process.start()
        pool.append((process, ours))
    _pools[world_size] = pool
    return pool


def _serve(rank, world_size, folder, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", function(Ranks(rank, world_size), *arguments)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


@dataclass
class PlainContext:
    """A launcher that keeps reports, and checkpoints below a folder."""

    rank: int = 0
    world_size: int = 1
    folder: Path | None = None
    stop_after: int | None = None
    """Raise KeyboardInterrupt at the report with this number."""

    notice_after: int | None = None
    """Want a checkpoint, once, when so many were reported."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009
    reports: list[dict[str, Any]] = field(default_factory=list)

    def report(self, metrics, checkpoint_dir=None):
        """Keep the metrics and the checkpoint."""
        self.reports.append(metrics)
        if checkpoint_dir is not None and self.folder is not None:
            target = self.folder / "latest"
            target.mkdir(parents=True, exist_ok=True)
            for source in checkpoint_dir.iterdir():
                (target / source.name).write_bytes(source.read_bytes())
        if len(self.reports) == self.stop_after:
            raise KeyboardInterrupt

    def latest_checkpoint(self):
        """Return the kept checkpoint."""
        latest = None if self.folder is None else self.folder / "latest"
        return latest if latest is not None and latest.exists() else None

    def should_checkpoint(self):
        """Return True once, when the notice is there."""
        if self.notice_after is None or len(self.reports) < self.notice_after:
            return False
        self.notice_after = None
        return True


def blobs(num_rows=1000, dim=12, num_blobs=6, seed=0):
    """Return (N, dim) float32 rows around centers, and the center of each."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(num_blobs, dim)) * 2.0
    labels = generator.integers(0, num_blobs, num_rows)
    return (centers[labels] + generator.normal(size=(num_rows, dim)) * 0.5).astype(np.float32), labels


def shard(ranks, num_rows):
    """Return the row numbers of a rank: ragged shares, in a shuffled order."""
    order = np.random.default_rng(5).permutation(num_rows)
    bounds = np.cumsum([0] + [2 * r + 1 for r in range(ranks.world_size)]) * num_rows // ranks.world_size**2
    return order[bounds[ranks.rank] : bounds[ranks.rank + 1]]


def make_rows(ranks, x, *, streamed=False, chunk=97):
    """Return a rank's rows, resident or streamed."""
    mine = shard(ranks, len(x))
    keys, values = torch.from_numpy(mine), torch.from_numpy(x[mine])
    chunks = [
        Batch(keys[s : s + chunk], values[s : s + chunk], torch.ones(len(keys[s : s + chunk])))
        for s in range(0, len(keys), chunk)
    ]
    if streamed:
        return StreamedRows(lambda: iter(chunks), x.shape[1], ranks, expected_rows=len(x), pool_rows=300)
    return ResidentRows.collect(iter(chunks), x.shape[1], torch.float32, ranks)


def fit_blobs(ranks, settings=SETTINGS, streamed=False, folder=None, stop_after=None, x=None, teacher=None):
    """Fit and return what a test compares: history, centers, sizes and the baselines' centers."""
    rows = make_rows(ranks, blobs()[0] if x is None else x, streamed=streamed)
    context = PlainContext(ranks.rank, ranks.world_size, folder, stop_after)
    try:
        fitted = fit(rows, Preprocess(), settings, context, teacher=teacher)
    except KeyboardInterrupt:
        return {"stopped": True, "reports": context.reports}
    return {
        "history": fitted.history,
        "reports": context.reports,
        "centers": fitted.clustering.centers_KL.numpy(),
        "encoder": {k: v.numpy() for k, v in fitted.clustering.encoder.state_dict().items()}
        if fitted.clustering.encoder is not None
        else {},
        "predictor": {k: v.numpy() for k, v in fitted.clustering.predictor.tensors().items()}
        if fitted.clustering.predictor is not None
        else {},
        "weights": fitted.leaves.weights_K.numpy(),
        "baselines": {name: b.centers_KL.numpy() for name, b in fitted.baselines.items()},
    }


def order_of_leaves(result, alone):
    """Return which leaf of `result` is each leaf of `alone`: the one with the nearest center, a permutation.

    Rounding, which differs with the number of ranks and with the processor, decides between restarts of a k-means that
    end with the same leaves in another order.
    """
    order = ((alone["centers"][:, None] - result["centers"]) ** 2).sum(axis=2).argmin(axis=1)
    assert sorted(order) == list(range(len(order)))
    return order


def with_objective(objective, **changes):
    """Return SETTINGS for an objective."""
    return replace(SETTINGS, objective=objective, **changes)
