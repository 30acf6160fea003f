"""What a run will cost: rows, bytes, steps, FLOPs, memory and files, told before it starts.

Letters: N rows, D width, K leaves, L latent width.
"""

import itertools
import time
from dataclasses import dataclass

import torch

from raydc.config import Config
from raydc.core.models.autoencoder import choose_precision, precision
from raydc.core.objectives.table import info
from raydc.data.neighbor_cost import NeighborCost
from raydc.data.profile import Profile
from raydc.runtime.exchange import ASSUMED_BYTES_PER_SECOND, Exchange, exchanges, lake_passes

# Share of the measured matrix rate that a training step reaches on a CPU: small batches, optimizer, memory traffic.
_STEP_EFFICIENCY = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a run, as far as it is known beforehand."""

    rows: int
    trained_rows: int
    input_bytes: int
    slices: int
    pretrain_steps: int
    refine_steps: int
    fit_flops: float
    assign_flops: float
    worker_bytes: int
    """Resident shard, model, optimizer and one batch, for each training worker."""

    workers: str
    """Number of training workers; the fewest and the most of an elastic fit."""

    streamed: bool
    files: int
    seconds: float | None
    """Arithmetic at the rate measured on this machine; None for GPU workers."""

    neighbors_flops: float = 0.0
    """FLOPs of the search for nearest neighbors; 0 for an objective that needs none."""

    lake_passes: int = 1
    """About how often fit reads its rows from the lake."""

    fewest_workers: int = 1
    exchanges: tuple[Exchange, ...] = ()
    """The gradients that the workers exchange, where there are several."""

    worker_rate: float | None = None
    """FLOP/s that a worker reaches in a step; None for GPU workers."""

    cpu_rate: float = 0.0
    """FLOP/s of one CPU in training steps and in labeling, measured on this machine."""

    neighbors: NeighborCost | None = None
    """What that search asks of the cluster beside its arithmetic."""

    def lines(self) -> list[str]:
        """Return the plan as text, one fact per line."""
        steps = f"{self.pretrain_steps:,} pretraining, at most {self.refine_steps:,} refinement"
        mode = "streamed each epoch" if self.streamed else "resident"
        time_needed = "not estimated for GPU workers"
        if self.seconds is not None:
            time_needed = f"about {duration(self.seconds)} of arithmetic, plus reading and start-up"
        search = f", {self.neighbors_flops:.2g} for the neighbors" if self.neighbors_flops else ""
        sample = "" if self.trained_rows == self.rows else f" ({self.trained_rows:,} of them in training)"
        lines = [
            f"rows        {self.rows:,}{sample} in {self.slices:,} slices, {size(self.input_bytes)} uncompressed",
            f"steps       {steps}",
            f"arithmetic  {self.fit_flops:.2g} FLOP in fit, {self.assign_flops:.2g} in assign{search}",
            f"workers     {self.workers}",
            f"memory      {size(self.worker_bytes)} per training worker, rows {mode}",
            f"files       about {self.files:,} to write",
            f"time        {time_needed}",
        ]
        about = "about " if self.streamed else ""
        lines.append(f"reading     {about}{self.lake_passes} for fit, 1 for assign: passes over the lake")
        lines += [
            f"gradients   {e.line(self.fewest_workers, ASSUMED_BYTES_PER_SECOND, self.worker_rate)}"
            for e in self.exchanges
        ]
        if self.neighbors is not None:
            lines.append(_search_line(self.neighbors))
        return lines


def make_plan(config: Config, profile: Profile) -> Plan:
    """Return the cost of a run with these settings on this input."""
    n, dim = profile.num_rows, profile.spec.dim
    trained = min(n, config.fit.max_rows or n)
    search = _search_flops(config, trained, dim)
    pretrain_steps, pretrain_flops = _pretraining(config, trained, dim)
    refine_steps, refine_flops = _refinement(config, trained, dim)
    fit = trained * _nearest(config, dim) * config.cluster.num_iterations + pretrain_flops + refine_flops
    # Raw rows against the leaves of a baseline, for its sample.
    compared = 2.0 * config.cluster.num_leaves * dim / max(1.0, n / config.evaluate.baseline_rows)
    assign = n * (_forward(config, dim) + _nearest(config, dim) + compared)
    # Memory and time are those of the fewest workers of an elastic fit.
    workers = config.fit.fewest_workers
    shard = -(-trained // workers) * config.row_bytes(dim, profile.spec.dtype.itemsize)
    limit = config.fit.resident_bytes
    streamed = limit is not None and shard > limit
    seconds = rate = None
    cpu_rate = _matrix_rate(config, config.fit.cpus_per_worker) * _STEP_EFFICIENCY / config.fit.cpus_per_worker
    if not config.fit.use_gpu:
        rate = cpu_rate * config.fit.cpus_per_worker
        seconds = (fit + assign + search) / (rate * workers)
    return Plan(
        rows=n,
        trained_rows=trained,
        input_bytes=profile.num_bytes,
        slices=len(profile.slices),
        pretrain_steps=pretrain_steps,
        refine_steps=refine_steps,
        fit_flops=fit,
        assign_flops=assign,
        worker_bytes=(limit or 0 if streamed else shard) + _network_bytes(config, dim),
        workers=_workers(config),
        streamed=streamed,
        files=2 * len(profile.slices) + 30,
        seconds=seconds,
        neighbors_flops=search,
        lake_passes=lake_passes(config, streamed=streamed),
        fewest_workers=workers,
        exchanges=tuple(exchanges(config, trained, dim)) if workers > 1 else (),
        worker_rate=rate,
        cpu_rate=cpu_rate,
        neighbors=NeighborCost.of(config, profile),
    )


def _forward(config: Config, dim: int) -> float:
    """Return the FLOPs of encoding a row; a multiply-add is two, and the backward pass is twice the forward one."""
    return 2.0 * sum(a * b for a, b in itertools.pairwise(config.encoder_widths(dim)))


def _nearest(config: Config, dim: int) -> float:
    """Return the FLOPs of comparing a row with every center."""
    return 2.0 * config.cluster.num_leaves * config.encoder_widths(dim)[-1]


def _pretraining(config: Config, num_rows: int, dim: int) -> tuple[int, float]:
    """Return the steps and the FLOPs of pretraining; none without an autoencoder."""
    if not config.learns:
        return 0, 0.0
    plan, layers = config.pretrain, list(itertools.pairwise(config.encoder_widths(dim)))
    layer_epochs = plan.layer_epochs if plan.layerwise else 0
    steps = (plan.num_epochs + layer_epochs * len(layers)) * -(-num_rows // plan.batch_rows)
    # A pair of layers learns on what the ones below it make of the row.
    pairs = sum(
        2.0 * sum(a * b for a, b in layers[:i]) + 3 * 2 * 2.0 * layers[i][0] * layers[i][1] for i in range(len(layers))
    )
    return steps, num_rows * (plan.num_epochs * 3 * 2 * _forward(config, dim) + layer_epochs * pairs)


def _refinement(config: Config, num_rows: int, dim: int) -> tuple[int, float]:
    """Return the most steps and FLOPs of the training on the objective; none where nothing is left to train."""
    if not config.refines:
        return 0, 0.0
    plan, about = config.refine, info(config.fit.objective)
    forward, nearest = _forward(config, dim), _nearest(config, dim)
    if about.needs_pairs:
        row = about.pair_products * nearest * (config.head.num_heads if about.many_heads else 1)
    else:
        passes = {"none": 0, "one": 1, "refreshes": plan.refreshes_per_epoch}[about.passes]
        network = 2 * forward if about.needs_decoder else forward
        row = 3 * (network + nearest) + passes * (forward + nearest)
    return plan.num_epochs * -(-num_rows // plan.batch_rows), num_rows * plan.num_epochs * row


def _network_bytes(config: Config, dim: int) -> int:
    """Return the bytes of a worker's model, optimizer and one batch."""
    encoder, leaves = config.encoder_widths(dim), config.cluster.num_leaves
    weights = 2 * sum(a * b for a, b in itertools.pairwise(encoder)) + leaves * encoder[-1]
    return 16 * weights + 8 * max(config.pretrain.batch_rows, 8192) * (2 * sum(encoder) + leaves)


def _search_flops(config: Config, num_rows: int, dim: int) -> float:
    """Return the FLOPs of the neighbors stage; 0 where the run has none."""
    section = config.neighbors
    if not config.needs_neighbors:
        return 0.0
    if section.method == "exact" or (section.method == "auto" and num_rows <= section.exact_rows):
        return 2.0 * num_rows**2 * dim
    cells = num_rows**0.5
    # Every row against the cells' centers, then against the rows of the probed cells; the sample against all rows.
    return 2.0 * num_rows * dim * (cells + section.num_probes * num_rows / cells + section.recall_rows)


def _matrix_rate(config: Config, num_threads: int) -> float:
    """Return this machine's FLOP/s on a matrix product of the size of a training step."""
    device = torch.device("cpu")
    arithmetic = choose_precision(config.fit.precision, device)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        a, b = torch.randn(256, 512), torch.randn(512, 2048)
        with precision(device, arithmetic), torch.no_grad():
            for _ in range(3):
                a @ b
            started, repeats = time.perf_counter(), 0
            while time.perf_counter() - started < 0.1:
                a @ b
                repeats += 1
            seconds = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return 2.0 * 256 * 512 * 2048 * repeats / seconds


def _workers(config: Config) -> str:
    fewest, most = config.fit.fewest_workers, config.fit.most_workers
    each = "a GPU each" if config.fit.use_gpu else f"{config.fit.cpus_per_worker} CPU each"
    if isinstance(config.fit.num_workers, int):
        return f"{most} for training, {each}"
    return f"{fewest} to {most} for training, {each}, as there is room; memory and time are those of {fewest}"


def _search_line(cost: NeighborCost) -> str:
    return (
        f"neighbors   {cost.slices:,} tasks, {cost.requests:,} fetches of up to {size(cost.traffic_bytes)} in all, "
        f"about {size(cost.driver_bytes)} in the driver"
    )


def size(num_bytes: float) -> str:
    """Return a number of bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Return a time for a person."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
