"""What a run will cost: rows, bytes, steps, FLOPs, memory and files, told before it starts.

Letters: N rows, D width, K leaves, L latent width.
"""

import itertools
import time
from dataclasses import dataclass

import torch

from raydc.config import Config
from raydc.core.models.autoencoder import choose_precision, precision
from raydc.data.profile import Profile

# Share of the measured matrix rate that a training step reaches on a CPU: small batches, optimizer, memory traffic.
_STEP_EFFICIENCY = 0.5


@dataclass(frozen=True)
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
    """How many training workers; of an elastic fit the fewest and the most."""

    streamed: bool
    files: int
    seconds: float | None
    """Arithmetic at the rate measured on this machine; None for GPU workers."""

    neighbors_flops: float = 0.0
    """Of the search of the neighbors, where the objective needs them."""

    def lines(self) -> list[str]:
        """Return the plan as text, one fact per line."""
        steps = f"{self.pretrain_steps:,} pretraining, at most {self.refine_steps:,} refinement"
        mode = "streamed each epoch" if self.streamed else "resident"
        duration = "not estimated for GPU workers"
        if self.seconds is not None:
            duration = f"about {_duration(self.seconds)} of arithmetic, plus reading and start-up"
        search = f", {self.neighbors_flops:.2g} for the neighbors" if self.neighbors_flops else ""
        sample = "" if self.trained_rows == self.rows else f" ({self.trained_rows:,} of them in training)"
        return [
            f"rows        {self.rows:,}{sample} in {self.slices:,} slices, {_size(self.input_bytes)} uncompressed",
            f"steps       {steps}",
            f"arithmetic  {self.fit_flops:.2g} FLOP in fit, {self.assign_flops:.2g} in assign{search}",
            f"workers     {self.workers}",
            f"memory      {_size(self.worker_bytes)} per training worker, rows {mode}",
            f"files       about {self.files:,} to write",
            f"time        {duration}",
        ]


def make_plan(config: Config, profile: Profile) -> Plan:
    """Return the cost of a run with these settings on this input."""
    n = profile.num_rows
    trained = min(n, config.fit.max_rows or n)
    dim, leaves = profile.spec.dim, config.cluster.num_leaves
    encoder = config.encoder_widths(dim)
    # A multiply-add is two FLOPs; the backward pass is twice the forward one.
    forward = 2.0 * sum(a * b for a, b in itertools.pairwise(encoder))
    nearest = 2.0 * leaves * encoder[-1]
    learns, refines = config.learns, config.refines
    per_epoch = -(-trained // config.pretrain.batch_rows)
    layers = list(itertools.pairwise(encoder))
    layer_epochs = config.pretrain.layer_epochs if learns and config.pretrain.layerwise else 0
    pretrain_steps = (config.pretrain.num_epochs + layer_epochs * len(layers)) * per_epoch if learns else 0
    refine_steps = config.refine.num_epochs * -(-trained // config.refine.batch_rows) if refines else 0
    flops = trained * nearest * config.cluster.num_iterations
    if learns:
        flops += trained * config.pretrain.num_epochs * 3 * 2 * forward
        # A pair of layers learns on what the ones below it make of the row.
        pairs = sum(
            2.0 * sum(a * b for a, b in layers[:i]) + 3 * 2 * 2.0 * layers[i][0] * layers[i][1]
            for i in range(len(layers))
        )
        flops += trained * layer_epochs * pairs
    if refines:
        network = forward if config.fit.objective == "dec" else 2 * forward
        # Passes without a gradient: DEC and IDEC make their target, DCN encodes a step's rows again, distillation gives
        # every row its id.
        targets = config.refine.refreshes_per_epoch
        passes = {"dec": targets, "idec": targets, "dcn": 1, "distill": 1}
        step = 3 * (network + nearest) + passes.get(config.fit.objective, 0) * (forward + nearest)
        if config.needs_neighbors:
            # Both rows of a pair, forward and back; TEMI's teacher looks at both as well, and every head does all this.
            step = 8 * nearest * config.head.num_heads if config.fit.objective == "temi" else 6 * nearest
        flops += trained * config.refine.num_epochs * step
    assign = n * (forward + nearest + 2.0 * leaves * dim / max(1.0, n / config.evaluate.baseline_rows))
    # Of an elastic fit: memory must do for the fewest workers, and the time is that of the fewest as well.
    workers = config.fit.fewest_workers
    shard = -(-trained // workers) * config.row_bytes(dim, profile.spec.dtype.itemsize)
    limit = config.fit.resident_bytes
    streamed = limit is not None and shard > limit
    weights = 2 * sum(a * b for a, b in itertools.pairwise(encoder)) + leaves * encoder[-1]
    batch = 8 * max(config.pretrain.batch_rows, 8192) * (2 * sum(encoder) + leaves)
    seconds = None
    if not config.fit.use_gpu:
        cpus = workers * config.fit.cpus_per_worker
        rate = _matrix_rate(config, config.fit.cpus_per_worker) * cpus / config.fit.cpus_per_worker
        seconds = (flops + assign + _search_flops(config, trained, dim)) / (rate * _STEP_EFFICIENCY)
    return Plan(
        n,
        trained,
        profile.num_bytes,
        len(profile.slices),
        pretrain_steps,
        refine_steps,
        flops,
        assign,
        (limit or 0 if streamed else shard) + 16 * weights + batch,
        _workers(config),
        streamed,
        2 * len(profile.slices) + 30,
        seconds,
        _search_flops(config, trained, dim),
    )


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


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
