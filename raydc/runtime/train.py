"""Ray Train: the worker group, what a worker is given, its rows, and what it tells the person who watches.

`raydc run` and `raydc sweep` differ in what their workers compute (`run_in_worker`), in nothing around it.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import Tensor

from raydc.config import Config
from raydc.core.models.preprocess import Preprocess
from raydc.core.models.teacher import Teacher
from raydc.core.process import prepare_process
from raydc.core.training.collapse import signs
from raydc.core.training.collectives import Ranks
from raydc.core.training.rows import Batch, ResidentRows, Rows, StreamedRows
from raydc.core.training.settings import FitSettings, WatchSettings
from raydc.data.profile import Profile
from raydc.data.slices import InputSpec
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import LeaseLost
from raydc.runfolder.teacher import Teaching
from raydc.runtime.failures import error_of
from raydc.runtime.gauges import Gauges
from raydc.runtime.memory import available_bytes, give_back
from raydc.runtime.remedies import advice, remedy
from raydc.runtime.row_dataset import EverySlice
from raydc.runtime.session import in_one_line, root_cause
from raydc.runtime.worker_log import warnings_to

Result = TypeVar("Result")

_POOL_STEPS = 32
"""Steps whose rows a streamed worker mixes before it cuts them into steps."""


@dataclass(frozen=True, kw_only=True)
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
    """Actor handle of raydc.runtime.board.Board."""

    watch: WatchSettings
    row_bytes: int
    """Bytes of a resident row."""

    @classmethod
    def of(
        cls,
        config: Config,
        settings: FitSettings,
        profile: Profile,
        run: RunDir,
        board: Any,
        *,
        expected_rows: int,
        teaching: Teaching | None = None,
    ) -> "Job":
        """Return the job of a run with these settings.

        Args:
            config: for the resources of a worker and what is watched.
            settings: the core's settings.
            profile: of the input.
            run: whose driver it is; where the results go.
            board: for progress and failures.
            expected_rows: about how many rows will be trained on.
            teaching: the teacher of a distillation.
        """
        spec = profile.spec
        return cls(
            settings=settings,
            preprocess=profile.preprocess(config) if teaching is None else teaching.preprocess,
            spec=spec,
            run=run,
            widths=tuple(config.encoder_widths(spec.dim)),
            teacher=None if teaching is None else teaching.teacher,
            expected_rows=expected_rows,
            resident_bytes=config.fit.resident_bytes,
            num_threads=config.fit.cpus_per_worker,
            board=board,
            watch=config.watch,
            row_bytes=config.row_bytes(spec.dim, spec.dtype.itemsize),
        )

    def check_owner(self) -> None:
        """Return if the driver of these workers still has the run: they outlive it by a moment, and must not write.

        Raises:
            LeaseLost: another driver has taken the run over.
        """
        try:
            self.run.check_owner()
        except LeaseLost as error:
            ray.get(self.board.fail.remote((LeaseLost.__name__, str(error))))
            raise


@dataclass(frozen=True)
class Failure:
    """What a training loop returns instead of its result: an error that no second try mends."""

    kind: str
    text: str


def launch(
    config: Config,
    run: RunDir,
    dataset: ray.data.Dataset,
    loop: Callable[[dict[str, Any]], Result | Failure],
    loop_config: dict[str, Any],
    name: str,
    timeout_seconds: int,
) -> Result:
    """Return what the training loop returned on rank 0, after Ray Train has run it on the worker group of the settings.

    Args:
        config: for the workers and their failures.
        run: checkpoints go below its `checkpoints/`; the same name goes on from the last one.
        dataset: the rows, split over the workers as `rows`.
        loop: runs in every worker; see `in_worker`.
        loop_config: its argument.
        name: of the step, for messages.
        timeout_seconds: how long a worker waits for the others; see raydc.runtime.patience.

    Raises:
        DataError, StageError: the loop returned a failure, or the workers failed too often; see error_of.
    """
    file_system, path = run.lake.arrow_file_system(artifacts.CHECKPOINTS.uri(run))
    trainer = _Trainer(
        loop,  # type: ignore[arg-type]
        train_loop_config=loop_config,
        torch_config=TorchConfig(timeout_s=timeout_seconds),
        scaling_config=_scaling(config),
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
        raise error_of(root_cause(error), failed(name, error, config.fit.max_failures + 1)) from error
    if isinstance(outcome, Failure):
        raise error_of(outcome.kind, f"{name}: {advice(outcome.text)}")
    return outcome


class _Trainer(TorchTrainer):
    """Ctrl-C stays Python's own: Train's handler would end the process with exit code 1 and without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def failed(name: str, error: ray.train.TrainingFailedError, num_attempts: int) -> str:
    """Return what a person reads when the training was given up.

    Args:
        name: of the step.
        error: as Train raises it.
        num_attempts: how often the workers were tried.
    """
    cause = root_cause(error)
    # Train tries again after a failure of the workers alone.
    who = "Ray Train's controller failed with"
    if not isinstance(error, ray.train.ControllerError):
        who = f"the workers failed {num_attempts} times, at last with"
    return (
        f"{name}: {who} {in_one_line(cause)}.{remedy('fit', cause)} Checkpoints are kept; the same command continues."
    )


def in_worker(job: Job, work: Callable[["RayContext", Ranks], Result]) -> Result | Failure:
    """Return what `work` returns in this training worker, or the error that another try would meet again.

    Args:
        job: of the worker group.
        work: raises ValueError and FloatingPointError on every rank alike, so that every rank returns.
    """
    failure = ray.get(job.board.failure.remote())
    if failure:
        # The workers were restarted after an error that no second try mends.
        return Failure(*failure)
    prepare_process(job.num_threads)
    with tempfile.TemporaryDirectory(prefix="raydc-fit-") as folder, warnings_to(job.board):
        context = RayContext(job, Path(folder))
        try:
            return work(context, Ranks(context.rank, context.world_size, context.device))
        except (ValueError, FloatingPointError) as error:
            return Failure(type(error).__name__, str(error))


class RayContext:
    """The core's Context on Ray Train."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.rank = ray.train.get_context().get_world_rank()
        self.world_size = ray.train.get_context().get_world_size()
        self.device = get_device()
        self._job, self._folder = job, folder
        self._seen: list[dict[str, Any]] = []
        self._told: set[str] = set()
        self._gauges = Gauges(job.run.run_id, "fit")
        self._announced: Any = None

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Report to Train, and on rank 0 to the person who watches."""
        if self.rank == 0:
            self._job.board.post.remote(progress_line(metrics))
            self._gauges.set(raydc_loss=metrics.get("loss"), raydc_rows_per_second=metrics.get("rows_per_second"))
            self._watch(metrics)
            if checkpoint_dir is not None:
                self._job.check_owner()
        checkpoint = Checkpoint.from_directory(str(checkpoint_dir)) if checkpoint_dir is not None else None
        ray.train.report(metrics, checkpoint=checkpoint)

    def _watch(self, metrics: dict[str, Any]) -> None:
        """Tell of each new sign of collapse, of this K where there are several."""
        leaves = metrics.get("num_leaves", self._job.settings.cluster.num_leaves)
        self._seen = [e for e in self._seen if e.get("num_leaves", leaves) == leaves] + [metrics]
        for sign in set(signs(self._seen, leaves, self._job.watch)) - self._told:
            self._told.add(sign)
            self._job.board.post.remote(f"collapse?    {sign}")

    def should_checkpoint(self) -> bool:
        """Return whether Ray has announced, since it was last asked, that a worker's node goes."""
        known, self._announced = self._announced, ray.train.get_preemption_info()
        return self._announced is not None and self._announced != known

    def latest_checkpoint(self) -> Path | None:
        """Return a local copy of the last checkpoint."""
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.to_directory(str(self._folder / "checkpoint")))


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
            f"k-means      {metrics['moves']} moves, {metrics['iterations']} iterations, inertia "
            f"{metrics['inertia']:.5g}; kernel alpha {metrics['alpha']:.4g}, scale {metrics['scale']:.4g}, "
            f"mean top q {metrics['top_q']:.2f}{target}"
        )
    done, total = metrics["epoch"] + 1, metrics["num_epochs"]
    if "step" in metrics:
        return f"{metrics['phase']:8s} epoch {done}/{total}  checkpoint after step {metrics['step']:,}"
    parts = [f"{metrics['phase']:8s} epoch {done}/{total}"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.5f}")
    if "changed" in metrics:
        parts.append(f"changed {100 * metrics['changed']:.2f} %")
    parts.append(f"{metrics['rows_per_second']:,.0f} rows/s")
    left = (total - done) * metrics["seconds"]
    parts.append(f"at most {left:.0f} s left" if metrics["phase"] == "refine" else f"{left:.0f} s left")
    return "  ".join(parts)


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
    if streamed and job.settings.needs_pairs:
        # The same on every rank, like every ValueError of the fit.
        raise ValueError(
            f"{job.settings.objective} meets each row with its neighbors and needs the rows resident, but a shard of "
            f"{shard_bytes / 2**20:.0f} MiB does not fit. Raise fit.num_workers or fit.resident_bytes, or train on a "
            "sample (fit.max_rows)"
        )
    if streamed:
        if ranks.rank == 0:
            job.board.post.remote(
                f"a shard of {shard_bytes / 2**20:.0f} MiB does not fit; rows are streamed each epoch, with "
                "checkpoints between two epochs alone"
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


def _scaling(config: Config) -> ScalingConfig:
    resources: dict[str, float] = {"CPU": config.fit.cpus_per_worker}
    if config.fit.use_gpu:
        resources["GPU"] = 1
    return ScalingConfig(
        # Train's own types lag behind: two numbers are the fewest and the most.
        num_workers=config.fit.num_workers,  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=config.fit.resize_seconds,  # type: ignore[call-arg]
        use_gpu=config.fit.use_gpu,
        resources_per_worker=resources,
    )
