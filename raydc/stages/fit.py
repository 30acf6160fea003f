"""fit: rows through Ray Data into a Ray Train worker group, one `TorchTrainer.fit` for all phases."""

import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import safetensors.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor

from raydc.config import Config
from raydc.core.models.autoencoder import choose_precision
from raydc.core.models.preprocess import Preprocess
from raydc.core.models.teacher import Teacher
from raydc.core.process import prepare_process
from raydc.core.training.collapse import WatchSettings, signs
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import Fitted, fit
from raydc.core.training.neighbor_pairs import NeighborPartners
from raydc.core.training.rows import Batch, ResidentRows, Rows, StreamedRows
from raydc.core.training.settings import (
    ClusterSettings,
    DistillSettings,
    FitSettings,
    HeadSettings,
    PretrainSettings,
    RefineSettings,
    VadeSettings,
)
from raydc.core.training.state import Clustering
from raydc.data.slices import InputSpec
from raydc.errors import DataError, StageError
from raydc.model import Model
from raydc.runfolder.attempts import FOLDER, known_attempts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import LeaseLost
from raydc.runfolder.teacher import load_teacher
from raydc.runtime.memory import available_bytes, give_back
from raydc.runtime.remedies import remedy
from raydc.runtime.row_dataset import EverySlice, readers, slice_dataset
from raydc.runtime.session import bounded, in_one_line, root_cause
from raydc.stages import profile as profiling

log = logging.getLogger(__name__)

# Rows that a streamed worker mixes before it cuts them into steps.
_POOL_STEPS = 32


@dataclass(frozen=True)
class Job:
    """All that a training worker needs, beside its rows."""

    settings: FitSettings
    preprocess: Preprocess
    spec: InputSpec
    run: RunDir
    widths: tuple[int, ...]
    teacher: Teacher | None
    expected_rows: int
    resident_bytes: int | None
    num_threads: int
    board: Any
    watch: WatchSettings
    row_bytes: int
    """Of a resident row."""


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Fit on all rows and write fit/: the model before it has a tree, its baselines and its leaf statistics."""
    profile = profiling.load(run)
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
        missing = {name for name, a in known_attempts(run.lake, run.uri(FOLDER, "neighbors")).items() if a.left_out}
        slices = [s for s in slices if s.name not in missing]
    with bounded("fit", config, run.lake, run.root, run.tell) as bound:
        job = Job(
            fit_settings(config, inputs),
            profile.preprocess(config) if taught is None else taught.preprocess,
            profile.spec,
            run,
            tuple(config.encoder_widths(profile.spec.dim)),
            None if taught is None else taught.teacher,
            expected,
            config.fit.resident_bytes,
            config.fit.cpus_per_worker,
            bound.board,
            WatchSettings(**config.watch.model_dump()),
            config.row_bytes(profile.spec.dim, profile.spec.dtype.itemsize),
        )
        dataset = slice_dataset(
            run.lake,
            slices,
            profile.spec,
            bound,
            seed=config.seed,
            fraction=fraction,
            num_readers=readers(config),
            neighbors_root=run.uri("neighbors") if config.needs_neighbors else None,
        )
        log.info(
            "fit: starting %s training worker(s), which read the rows first; a line for each epoch follows",
            config.fit.fewest_workers,
        )
        outcome = launch(config, run, dataset, _train_loop, {"job": job}, "fit")
    return outcome["metrics"]


def launch(
    config: Config,
    run: RunDir,
    dataset: ray.data.Dataset,
    loop: Callable[[dict[str, Any]], dict[str, Any]],
    loop_config: dict[str, Any],
    name: str,
) -> dict[str, Any]:
    """Return what the training loop returned on rank 0, after Ray Train has run it on the worker group of the settings.

    Args:
        config: for the workers and their failures.
        run: checkpoints go below its `checkpoints/`; the same name goes on from the last one.
        dataset: the rows, split over the workers as `rows`.
        loop: returns {"failure": (kind, text)} for an error that no second try mends.
        loop_config: its argument.
        name: of the step, for messages.

    Raises:
        DataError, StageError: the loop told of a failure, or the workers failed too often.
    """
    file_system, path = run.lake.arrow_file_system(run.uri("checkpoints"))
    trainer = _Trainer(
        loop,  # type: ignore[arg-type]
        train_loop_config=loop_config,
        scaling_config=ScalingConfig(
            # Train's own types lag behind: two numbers are the fewest and the most.
            num_workers=config.fit.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=config.fit.resize_seconds,  # type: ignore[call-arg]
            use_gpu=config.fit.use_gpu,
            resources_per_worker=_worker_resources(config),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=config.fit.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
        datasets={"rows": dataset},
        dataset_config=EverySlice(),
    )
    try:
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        cause = root_cause(error)
        # Train tries again after a failure of the workers alone.
        who = "Ray Train's controller failed with"
        if not isinstance(error, ray.train.ControllerError):
            who = f"the workers failed {config.fit.max_failures + 1} times, at last with"
        raise StageError(
            f"{name}: {who} {in_one_line(cause)}.{remedy(name, cause)} Checkpoints are kept; the same command "
            "continues."
        ) from error
    if outcome.get("failure"):
        kind, text = outcome["failure"]
        raise (DataError if kind == "DataError" else StageError)(f"{name}: {text}")
    return outcome


def fit_settings(config: Config, input_fingerprint: str) -> FitSettings:
    """Return the core's settings of a config."""
    return FitSettings(
        objective=config.fit.objective,
        seed=config.seed,
        precision=config.fit.precision,
        hidden_dims=tuple(config.autoencoder.hidden_dims),
        latent_dim=config.autoencoder.latent_dim,
        pretrain=PretrainSettings(**config.pretrain.model_dump()),
        cluster=ClusterSettings(**config.cluster.model_dump()),
        refine=RefineSettings(**config.refine.model_dump()),
        vade=VadeSettings(**config.vade.model_dump()),
        distill=DistillSettings(**config.distill.model_dump()),
        head=HeadSettings(**config.head.model_dump()) if config.needs_neighbors else None,
        baseline_rows=config.evaluate.baseline_rows,
        fingerprint=f"{config.fingerprint('fit')}-{input_fingerprint}",
        checkpoint_epochs=config.fit.checkpoint_epochs,
    )


class _Trainer(TorchTrainer):
    """Ctrl-C stays Python's own: Train's handler would end the process with exit code 1 and without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


class RayContext:
    """The core's Context on Ray Train."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.rank = ray.train.get_context().get_world_rank()
        self.world_size = ray.train.get_context().get_world_size()
        self.device = get_device()
        self._job, self._folder = job, folder
        self._seen: list[dict[str, Any]] = []
        self._told: set[str] = set()

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Report to Train, and on rank 0 to the person who watches."""
        if self.rank == 0:
            self._job.board.post.remote(progress_line(metrics))
            self._watch(metrics)
            if checkpoint_dir is not None:
                check_owner(self._job)
        checkpoint = Checkpoint.from_directory(str(checkpoint_dir)) if checkpoint_dir is not None else None
        ray.train.report(metrics, checkpoint=checkpoint)

    def _watch(self, metrics: dict[str, Any]) -> None:
        """Tell of each new sign of collapse, of this K where there are several."""
        leaves = metrics.get("num_leaves", self._job.settings.cluster.num_leaves)
        self._seen = [e for e in self._seen if e.get("num_leaves", leaves) == leaves] + [metrics]
        for sign in set(signs(self._seen, leaves, self._job.watch)) - self._told:
            self._told.add(sign)
            self._job.board.post.remote(f"collapse?    {sign}")

    def latest_checkpoint(self) -> Path | None:
        """Return a local copy of the last checkpoint."""
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.to_directory(str(self._folder / "checkpoint")))


def check_owner(job: Job) -> None:
    """Return if the driver of these workers still has the run; they outlive it by a moment, and must not write then."""
    try:
        job.run.check_owner()
    except LeaseLost as error:
        ray.get(job.board.fail.remote((LeaseLost.__name__, str(error))))
        raise


def progress_line(metrics: dict[str, Any]) -> str:
    """Return one line for a person from the metrics of an epoch."""
    if "num_leaves" in metrics:
        rest = {name: value for name, value in metrics.items() if name != "num_leaves"}
        return f"K = {metrics['num_leaves']}: {progress_line(rest)}"
    if metrics["phase"] == "sweep":
        return f"K = {metrics['k']}: done in {metrics['seconds']:.1f} s"
    if metrics["phase"] == "kmeans":
        short = metrics["top_q"] < 0.99 * metrics["target_top_q"]
        target = f", below the {metrics['target_top_q']:.2f} asked for: set refine.alpha=auto" if short else ""
        return (
            f"k-means      {metrics['iterations']} iterations, inertia {metrics['inertia']:.5g}; kernel alpha "
            f"{metrics['alpha']:.4g}, scale {metrics['scale']:.4g}, mean top q {metrics['top_q']:.2f}{target}"
        )
    done, total = metrics["epoch"] + 1, metrics["num_epochs"]
    parts = [f"{metrics['phase']:8s} epoch {done}/{total}"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.5f}")
    if "changed" in metrics:
        parts.append(f"changed {100 * metrics['changed']:.2f} %")
    parts.append(f"{metrics['rows_per_second']:,.0f} rows/s")
    left = (total - done) * metrics["seconds"]
    parts.append(f"at most {left:.0f} s left" if metrics["phase"] == "refine" else f"{left:.0f} s left")
    return "  ".join(parts)


def _train_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    job: Job = loop_config["job"]
    failure = ray.get(job.board.failure.remote())
    if failure:
        # The workers were restarted after an error that no second try mends.
        return {"failure": failure}
    prepare_process(job.num_threads)
    with tempfile.TemporaryDirectory(prefix="raydc-fit-") as folder:
        context = RayContext(job, Path(folder))
        ranks = Ranks(context.rank, context.world_size, context.device)
        try:
            started = time.perf_counter()
            rows = collect(job, ranks)
            load_seconds = time.perf_counter() - started
            partners = None
            if job.settings.head is not None:
                assert isinstance(rows, ResidentRows)
                partners = NeighborPartners(rows, ranks)
            fitted = fit(rows, job.preprocess, job.settings, context, partners, teacher=job.teacher)
        except (ValueError, FloatingPointError) as error:
            # Raised alike on every rank, so every rank returns.
            return {"failure": (type(error).__name__, str(error))}
    metrics = _metrics(job, rows, fitted, context) | {"load_seconds": round(load_seconds, 3)}
    if context.rank == 0:
        _write(job, fitted)
    return {"metrics": metrics}


def _whole(table: pa.Table, batch: Batch) -> Batch:
    """Return all rows of a block."""
    return batch


def collect(job: Job, ranks: Ranks, part: Callable[[pa.Table, Batch], Batch] = _whole) -> Rows:
    """Return this worker's share of the rows: resident where every worker has the memory, else streamed.

    Args:
        job: for the width, type and expected number of the rows.
        ranks: of the worker group.
        part: called with each block and its rows; returns those of them that are meant.
    """
    shard = ray.train.get_dataset_shard("rows")
    dtype = torch.float16 if job.spec.dtype == np.float16 else torch.float32

    def stream() -> Iterator[Batch]:
        for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield part(table, _to_batch(table, job.spec.dim))

    shard_bytes = math.ceil(job.expected_rows / ranks.world_size) * job.row_bytes
    allowed = job.resident_bytes
    if allowed is None:
        allowed = int(0.6 * available_bytes()) // ray.train.get_context().get_local_world_size()
    # Every rank takes the same mode, that of the rank with the least memory.
    streamed = bool(ranks.max(torch.tensor([int(shard_bytes > allowed)]))[0])
    if streamed and job.settings.head is not None:
        # The same on every rank, like every ValueError of the fit.
        raise ValueError(
            f"{job.settings.objective} meets each row with its neighbors and needs the rows resident, but a shard of "
            f"{shard_bytes / 2**20:.0f} MiB does not fit. Raise fit.num_workers or fit.resident_bytes, or train on a "
            "sample (fit.max_rows)"
        )
    if streamed:
        if ranks.rank == 0:
            job.board.post.remote(
                f"a shard of {shard_bytes / 2**20:.0f} MiB does not fit; rows are streamed each epoch"
            )
        pool = _POOL_STEPS * max(job.settings.pretrain.batch_rows, job.settings.refine.batch_rows)
        pool = math.ceil(pool / ranks.world_size)
        return StreamedRows(stream, job.spec.dim, ranks, expected_rows=job.expected_rows, pool_rows=pool)
    share = math.ceil(job.expected_rows / ranks.world_size)
    rows = ResidentRows.collect(stream(), job.spec.dim, dtype, ranks, expected_rows=share)
    # What the blocks took on their way.
    give_back()
    if ranks.rank == 0:
        job.board.post.remote(
            f"{rows.num_rows:,} rows resident on {ranks.world_size} worker(s), {ranks.device}, "
            f"{shard_bytes / 2**20:.0f} MiB each"
        )
    return rows


def _to_batch(table: pa.Table, dim: int) -> Batch:
    x = table["x"].combine_chunks()
    x = x.chunk(0) if isinstance(x, pa.ChunkedArray) and x.num_chunks else x
    values = x.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) if len(x) else np.empty((0, dim), np.float32)
    # Copied: the block lives in the object store, which would fill up if the shard kept pointing into it.
    return Batch(
        torch.from_numpy(table["key"].to_numpy().copy()),
        torch.from_numpy(values.copy()),
        torch.from_numpy(table["weight"].to_numpy().copy()),
        neighbors_NM=_neighbors(table),
    )


def _neighbors(table: pa.Table) -> Tensor | None:
    if "neighbors" not in table.column_names:
        return None
    column = table["neighbors"]
    values = np.concatenate([np.empty(0, np.int64), *(c.flatten().to_numpy() for c in column.chunks)])
    return torch.from_numpy(values.reshape(len(column), column.type.list_size))


def _metrics(job: Job, rows: Rows, fitted: Fitted, context: RayContext) -> dict[str, Any]:
    epochs = [h for h in fitted.history if "rows_per_second" in h and h["phase"] == "pretrain"]
    rates = sorted(h["rows_per_second"] for h in epochs)
    return {
        "objective": job.settings.objective,
        "rows": rows.num_rows,
        "num_workers": context.world_size,
        "resizes": resizes(fitted.history),
        "device": context.device.type,
        "precision": choose_precision(job.settings.precision, context.device),
        "mode": "resident" if isinstance(rows, ResidentRows) else "streamed",
        "rows_per_second": rates[len(rates) // 2] if rates else None,
        "num_empty": int((fitted.leaves.weights_K == 0).sum()),
        "watch": signs(fitted.history, job.settings.cluster.num_leaves, job.watch),
        "history": fitted.history,
    }


def resizes(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return where the number of workers changed between two epochs: phase, epoch (from 0) and both numbers."""
    return [
        {"phase": b["phase"], "epoch": b["epoch"], "num_workers": [a["num_workers"], b["num_workers"]]}
        for a, b in itertools.pairwise(h for h in history if "num_workers" in h)
        if a["num_workers"] != b["num_workers"]
    ]


def _write(job: Job, fitted: Fitted) -> None:
    check_owner(job)
    lake, uri = job.run.lake, job.run.uri
    details = {
        "objective": job.settings.objective,
        "fingerprint": job.settings.fingerprint,
        "columns": [asdict(c) for c in job.spec.columns],
    }
    _to_model(job, fitted.clustering, details).save(lake, uri("fit", "model"))
    for name, clustering in fitted.baselines.items():
        _to_model(job, clustering, {"objective": name}).save(lake, uri("fit", "baselines", name))
    leaves = fitted.leaves
    statistics: dict[str, Tensor] = {
        "weights": leaves.weights_K,
        "means": leaves.means(fitted.clustering.centers_KL),
        "sse": leaves.sse_around_means(fitted.clustering.centers_KL),
    }
    body = safetensors.torch.save({k: t.cpu().contiguous() for k, t in statistics.items()})
    lake.write_bytes(uri("fit", "leaves.safetensors"), body)
    if fitted.decoder is not None:
        weights = {k: t.cpu().contiguous() for k, t in fitted.decoder.state_dict().items()}
        lake.write_bytes(uri("fit", "decoder.safetensors"), safetensors.torch.save(weights))


def _to_model(job: Job, clustering: Clustering, details: dict[str, Any]) -> Model:
    widths = job.widths if clustering.encoder is not None else job.widths[:1]
    encoder = clustering.encoder.cpu() if clustering.encoder is not None else None
    predictor = clustering.predictor.to(torch.device("cpu")) if clustering.predictor is not None else None
    return Model(
        job.preprocess, encoder, clustering.centers_KL.cpu(), clustering.kernel, widths, {}, details, predictor
    )


def _worker_resources(config: Config) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": config.fit.cpus_per_worker}
    if config.fit.use_gpu:
        resources["GPU"] = 1
    return resources
