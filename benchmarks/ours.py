"""Our side of the rows of the speed table that the `raydc` command alone cannot measure; one process each.

Run as `python -m benchmarks.ours NAME JSON`; prints one JSON object.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT


def lloyd(data: str, start: str, iterations: int, threads: int) -> dict[str, Any]:
    """Return the seconds of an iteration of the worker's Lloyd from given centers."""
    import numpy as np
    import torch

    from raydc.core.process import prepare_process
    from raydc.core.search import kmeans

    prepare_process(threads)
    x, centers = torch.from_numpy(np.load(data)), torch.from_numpy(np.load(start))
    weights = torch.ones(len(x))
    marks: list[float] = []
    kmeans.lloyd(
        lambda: zip(x.split(65536), weights.split(65536), strict=True),
        centers,
        all_sum=lambda t: t,
        generator=torch.Generator(),
        num_iterations=1 + iterations,
        tolerance=0.0,
        on_iteration=lambda *_: marks.append(time.perf_counter()),
    )
    return {"seconds": [b - a for a, b in itertools.pairwise(marks)]}


def write_model(path: str, widths: list[int]) -> dict[str, Any]:
    """Write a model of 1000 centers, without a tree; with an encoder of these widths, or none."""
    import numpy as np
    import torch

    from benchmarks import planted
    from raydc.core.models.autoencoder import initialize, perceptron
    from raydc.core.models.preprocess import Preprocess
    from raydc.core.objectives.kernel import Kernel
    from raydc.model import Model
    from raydc.storage.lake import Lake

    shutil.rmtree(path, ignore_errors=True)
    encoder, centers = None, planted.centers()
    if widths:
        encoder = perceptron(widths)
        initialize(encoder, torch.Generator().manual_seed(0))
        centers = np.random.default_rng(0).normal(size=(1000, widths[-1])).astype(np.float32)
    preprocess = Preprocess("none", [(0, planted.DIM, 1.0)])
    columns = [{"name": "embedding", "dim": planted.DIM, "dtype": "float16", "weight": 1.0}]
    Model(
        preprocess=preprocess,
        encoder=encoder,
        centers_KL=torch.from_numpy(centers),
        kernel=Kernel(),
        widths=tuple(widths or [planted.DIM]),
        details={"columns": columns},
    ).save(Lake(), path)
    return {}


def start_up() -> dict[str, Any]:
    """Return seconds of `raydc run` on digits: to the first epoch, and from the last label to the prompt."""
    folder = ROOT / "build" / "benchmarks" / "start-up"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = ["--set", f"output={folder}", "--set", "pretrain.num_epochs=2", "--set", "refine.num_epochs=1"]
    command = [sys.executable, "-m", "raydc", "run", "--config", "jobs/digits.yaml", "--run-id", "r", *overrides]
    started, marks = time.perf_counter(), {}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for key, pattern in (("resident", r"rows resident on"), ("assigned", r"\bassign: done")):
                if re.search(pattern, line):
                    marks.setdefault(key, time.perf_counter())
    ended = time.perf_counter()
    return {
        "to_first_epoch": marks["resident"] - started,
        "after_fit": ended - marks["assigned"],
        "seconds": [ended - started],
    }


NAMES = {f.__name__: f for f in (lloyd, write_model, start_up)}

if __name__ == "__main__":
    found = NAMES[sys.argv[1]](**json.loads(sys.argv[2]))
    # getrusage would count the process that started this one as well.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    print(json.dumps({**found, "peak_mib": peak}))
