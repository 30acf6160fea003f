"""fit: rows through Ray Data into a Ray Train worker group, one `TorchTrainer.fit` for all phases."""

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch

from raydc.config import Config
from raydc.core.models.autoencoder import choose_precision
from raydc.core.training.collapse import signs
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import Fitted, fit
from raydc.core.training.neighbor_pairs import NeighborPairs
from raydc.core.training.rows import ResidentRows, Rows
from raydc.core.training.state import Clustering
from raydc.data.metrics import Epoch, FitMetrics, Resize
from raydc.model import Model
from raydc.runfolder import artifacts
from raydc.runfolder.artifacts import Leaves
from raydc.runfolder.folder import RunDir
from raydc.runfolder.teacher import load_teacher
from raydc.runtime.attempts import known_attempts
from raydc.runtime.board import bounded
from raydc.runtime.patience import collective_timeout
from raydc.runtime.row_dataset import readers, slice_dataset
from raydc.runtime.train import Failure, Job, RayContext, collect, in_worker, launch

log = logging.getLogger(__name__)


def run(config: Config, run: RunDir) -> FitMetrics:
    """Fit on all rows and write fit/: the model before it has a tree, its baselines and its leaf statistics."""
    profile = artifacts.PROFILE.read(run)
    fraction = profile.trained_fraction(config)
    expected = round(fraction * profile.num_rows)
    if expected < profile.num_rows:
        share = expected / profile.num_rows
        log.info(
            "fit: trains on about %d of %d rows (%.2f %%), by hash of the row key",
            expected,
            profile.num_rows,
            100 * share,
        )
    taught = load_teacher(config, profile.spec.dim, run.lake)
    inputs = profile.fingerprint if taught is None else f"{profile.fingerprint}-{taught.fingerprint}"
    slices = profile.slices
    if config.needs_neighbors:
        lost = known_attempts(run.lake, artifacts.attempts("neighbors").uri(run))
        missing = {name for name, attempts in lost.items() if attempts.left_out}
        slices = [s for s in slices if s.name not in missing]
    with bounded("fit", config, run, run.tell) as bound:
        settings = config.fit_settings(inputs)
        job = Job.of(config, settings, profile, run, bound.board, expected_rows=expected, teaching=taught)
        dataset = slice_dataset(
            run.lake,
            slices,
            profile.spec,
            bound,
            seed=config.seed,
            fraction=fraction,
            num_readers=readers(config),
            neighbors_of=run if config.needs_neighbors else None,
        )
        log.info(
            "fit: starting %s training worker(s), which read the rows first; a line for each epoch follows",
            config.fit.fewest_workers,
        )
        patience = collective_timeout(config, expected, profile.spec.dim)
        return launch(config, run, dataset, _train_loop, {"job": job}, "fit", patience)


@dataclass(frozen=True)
class _Done:
    """What a worker has made."""

    rows: Rows
    fitted: Fitted
    context: RayContext
    load_seconds: float


def _train_loop(loop_config: dict[str, Any]) -> FitMetrics | Failure:
    job: Job = loop_config["job"]
    done = in_worker(job, partial(_fitted, job))
    if isinstance(done, Failure):
        return done
    metrics = _metrics(job, done)
    if done.context.rank == 0:
        _write(job, done.fitted)
    return metrics


def _fitted(job: Job, context: RayContext, ranks: Ranks) -> _Done:
    started = time.perf_counter()
    rows = collect(job, ranks)
    load_seconds = time.perf_counter() - started
    pairs = None
    if job.settings.needs_pairs:
        assert isinstance(rows, ResidentRows)
        pairs = NeighborPairs(rows, ranks)
    fitted = fit(rows, job.preprocess, job.settings, context, pairs, teacher=job.teacher)
    return _Done(rows, fitted, context, load_seconds)


def _metrics(job: Job, done: _Done) -> FitMetrics:
    rows, context, history = done.rows, done.context, cast(list[Epoch], done.fitted.history)
    rates = sorted(h["rows_per_second"] for h in history if "rows_per_second" in h and h["phase"] == "pretrain")
    return {
        "objective": job.settings.objective,
        "rows": rows.num_rows,
        "num_workers": context.world_size,
        "resizes": resizes(history),
        "device": context.device.type,
        "precision": choose_precision(job.settings.precision, context.device),
        "mode": "resident" if isinstance(rows, ResidentRows) else "streamed",
        "rows_per_second": rates[len(rates) // 2] if rates else None,
        "num_empty": int((done.fitted.leaves.weights_K == 0).sum()),
        "watch": signs(history, job.settings.cluster.num_leaves, job.watch),
        "history": history,
        "load_seconds": round(done.load_seconds, 3),
    }


def resizes(history: Sequence[Epoch]) -> list[Resize]:
    """Return where the number of workers changed between two epochs: phase, epoch (from 0) and both numbers."""
    return [
        {"phase": b["phase"], "epoch": b["epoch"], "num_workers": [a["num_workers"], b["num_workers"]]}
        for a, b in itertools.pairwise(h for h in history if "num_workers" in h)
        if a["num_workers"] != b["num_workers"]
    ]


def _write(job: Job, fitted: Fitted) -> None:
    job.check_owner()
    details = {
        "objective": job.settings.objective,
        "fingerprint": job.settings.fingerprint,
        "columns": [asdict(c) for c in job.spec.columns],
    }
    artifacts.FIT_MODEL.save(job.run, _to_model(job, fitted.clustering, details))
    for name, clustering in fitted.baselines.items():
        artifacts.baseline(name).save(job.run, _to_model(job, clustering, {"objective": name}))
    leaves = fitted.leaves
    centers = fitted.clustering.centers_KL
    statistics = leaves.weights_K, leaves.means(centers), leaves.sse_around_means(centers)
    artifacts.FIT_LEAVES.write(job.run, Leaves(*(tensor.cpu().numpy() for tensor in statistics)))
    if fitted.decoder is not None:
        artifacts.FIT_DECODER.write(job.run, fitted.decoder.state_dict())


def _to_model(job: Job, clustering: Clustering, details: dict[str, Any]) -> Model:
    widths = job.widths if clustering.encoder is not None else job.widths[:1]
    encoder = clustering.encoder.cpu() if clustering.encoder is not None else None
    predictor = clustering.predictor.to(torch.device("cpu")) if clustering.predictor is not None else None
    return Model(
        preprocess=job.preprocess,
        encoder=encoder,
        centers_KL=clustering.centers_KL.cpu(),
        kernel=clustering.kernel,
        widths=widths,
        details=details,
        predictor=predictor,
    )
