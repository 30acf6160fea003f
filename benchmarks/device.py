"""The GPU alone, without Ray: `python -m benchmarks device`. Where torch finds no CUDA device it says so and stops.

The rate of a plain product of the card, of the nearest-center search beside a product with an argmin, an iteration of
Lloyd, an epoch of the autoencoder and of DEC on resident rows, and the exact tree. `--device cpu` with a small
`--num-rows` runs the same code to show that it works, and records nothing. Letters: N rows, K centers, D width.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.heads import Launcher
from benchmarks.record import ROOT, made
from raydc.config import load_config
from raydc.core.models.preprocess import Preprocess
from raydc.core.search.kmeans import leaf_sums
from raydc.core.search.nearest import nearest
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.rows import Batch, ResidentRows
from raydc.core.tree.linkage import ward

BOOK = ROOT / "docs" / "device.json"
_WIDTH = 768
_REPEATS = 5


def main(options: argparse.Namespace) -> None:
    """Measure every row and, on a GPU, write docs/device.json."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("device: skipped, torch finds no CUDA device here. Nothing of this page was measured.")
        return
    small = device.type == "cpu"
    n = options.num_rows
    entries = [*products(device, small=small), *searches(device, n, small=small)]
    entries += [lloyd(device, n), *epochs(device, n, small=small), tree(device, small=small)]
    for entry in entries:
        print(json.dumps(entry), flush=True)
    if not small:
        machine = made() | {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        BOOK.write_text(json.dumps([e | {"made": machine} for e in entries], indent=1) + "\n")


def products(device: torch.device, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield the rate of a square product in float32 and in bf16."""
    size = 512 if small else 8192
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = timed(lambda a=a: a @ a, device)
        yield {"work": "product", "size": f"{size}^3 {dtype}", "seconds": seconds, "tflops": _rate(size**3, seconds)}


def searches(device: torch.device, n: int, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield the nearest center of every row beside a product with an argmin, block by block."""
    for dim in (_WIDTH, 10):
        for num_centers in (1000, 2000 if small else 100_000):
            rows = min(n, 2**18 if num_centers > 1000 else n)
            z, centers = torch.randn(rows, dim, device=device), torch.randn(num_centers, dim, device=device)
            ours = timed(lambda z=z, centers=centers: nearest(z, centers), device)
            plain = timed(lambda z=z, centers=centers: _plain(z, centers), device)
            work = rows * num_centers * dim
            yield {
                "work": "nearest center",
                "size": f"{rows:,} x {dim}, K = {num_centers:,}",
                "seconds": ours,
                "tflops": _rate(work, ours),
                "plain_seconds": plain,
                "plain_tflops": _rate(work, plain),
            }


def lloyd(device: torch.device, n: int) -> dict[str, Any]:
    """Return the seconds of an iteration over rows of 128 numbers and 1024 centers."""
    z = torch.randn(n, 128, device=device)
    weights, centers = torch.ones(n, device=device), z[torch.randperm(n, device=device)[:1024]].clone()
    blocks = list(zip(z.split(65536), weights.split(65536), strict=True))
    seconds = timed(lambda: leaf_sums(blocks, centers, all_sum=lambda t: t), device)
    return {"work": "Lloyd iteration", "size": f"{n:,} x 128, K = 1024", "seconds": seconds}


def epochs(device: torch.device, n: int, *, small: bool) -> Iterator[dict[str, Any]]:
    """Yield the seconds of an epoch of pretraining and of DEC, by the settings of jobs/cluster_imagenet.yaml."""
    seen: list[dict[str, Any]] = []

    class Context(Launcher):
        def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
            seen.append(metrics)

    context = Context()
    context.device = device
    centers = torch.randn(1000, _WIDTH)
    x = (centers[torch.randint(0, 1000, (n,))] + torch.randn(n, _WIDTH)).half()
    rows = ResidentRows.collect(
        iter([Batch(torch.arange(n), x, torch.ones(n))]), _WIDTH, torch.float16, Ranks(0, 1, device)
    )
    overrides = ["fit.objective=dec", "pretrain.num_epochs=3", "refine.num_epochs=3", "refine.tolerance=0"]
    overrides += ["cluster.init_rows=100000", "cluster.num_restarts=1", "evaluate.baseline_rows=2000"]
    overrides += ["cluster.num_leaves=50", "merge.levels=[10]"] if small else []
    config = load_config(ROOT / "jobs" / "cluster_imagenet.yaml", overrides)
    fit(rows, Preprocess("l2", [(0, _WIDTH, 1.0)]), config.fit_settings("benchmark"), context)
    for phase in ("pretrain", "refine"):
        # The first epoch warms up.
        seconds = [e["seconds"] for e in seen if e["phase"] == phase][1:]
        size = f"{n:,} x {_WIDTH} float16, K = {config.cluster.num_leaves:,}"
        yield {"work": f"{phase} epoch", "size": size, "seconds": round(statistics.median(seconds), 4)}


def tree(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Return the seconds of the exact tree, searched on the device."""
    num_leaves = 2000 if small else 100_000
    centers = np.random.default_rng(0).normal(size=(num_leaves, 64))
    started = time.perf_counter()
    where = str(device) if device.type != "cpu" else "torch:cpu"
    ward(centers, np.ones(num_leaves), device=where)
    return {
        "work": "exact tree",
        "size": f"{num_leaves:,} leaves x 64",
        "seconds": round(time.perf_counter() - started, 3),
    }


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a call, after one that warms up."""
    seconds = []
    for _ in range(1 + _REPEATS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds[1:]), 6)


def _plain(z_ND: Tensor, centers_KD: Tensor) -> Tensor:
    half_K = (centers_KD**2).sum(dim=1) / 2
    return torch.cat([(half_K - block @ centers_KD.T).argmin(dim=1) for block in z_ND.split(16384)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(multiply_adds: int, seconds: float) -> float:
    return round(2 * multiply_adds / seconds / 1e12, 3)
