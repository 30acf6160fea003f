"""Clustering quality over seeds: raw k-means, autoencoder + k-means, DEC and IDEC, by the settings of jobs/.

The fit is the job's own (raydc.core.training) in one process without Ray; DEC and IDEC of a seed go on from the same
pretrained checkpoint, so a seed's rows differ by the objective alone. Writes docs/quality.md and docs/quality.json
after every seed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydc.config import Config, load_config
from raydc.core import metrics
from raydc.core.collectives import Ranks
from raydc.core.nearest import nearest, prepare_process
from raydc.core.preprocess import Preprocess
from raydc.core.rows import Batch, ResidentRows
from raydc.core.state import Clustering
from raydc.core.training import Fitted, fit
from raydc.demo import write_digits
from raydc.labelling import class_names
from raydc.lake import Lake
from raydc.rundir import versions
from raydc.slices import read_slice
from raydc.stages.fit import fit_settings
from raydc.stages.profile import profile_input

ROOT = Path(__file__).resolve().parent.parent
# Of the code that runs: asked when the run starts, not after hours in which others may have committed.
_COMMIT = subprocess.run(
    ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
).stdout.strip()
PUBLISHED = {
    "mnist": {
        "raw_kmeans": "ACC .535 (DEC paper)",
        "autoencoder_kmeans": "ACC .818 (DEC paper, table 3)",
        "dec": "ACC .843 (DEC paper, best of 9); .779 (a faithful reproduction, 5 seeds)",
        "idec": "ACC .881, NMI .867 (IDEC paper); ACC .794 (the same reproduction)",
    },
    "digits": {},
}


def main(options: argparse.Namespace) -> None:
    """Run the seeds on digits, and on MNIST where its folder is given."""
    with tempfile.TemporaryDirectory() as folder:
        run("digits", write_digits(Path(folder) / "digits"), options.seeds)
    if options.mnist:
        run("mnist", Path(options.mnist), options.seeds)
    else:
        print("quality on MNIST skipped: give its folder with --mnist or RAYDC_MNIST")


def run(name: str, folder: Path, seeds: list[int]) -> None:
    """Fit every seed and write the table."""
    config = load_config(ROOT / "jobs" / f"{name}.yaml", [f"input.path={folder}"])
    threads = len(os.sched_getaffinity(0))
    prepare_process(threads)
    rows, preprocess, classes, fingerprint = _read(config)
    for seed in seeds:
        entries = _seed(name, config.model_copy(update={"seed": seed}), rows, preprocess, classes, fingerprint)
        for entry in entries:
            print(json.dumps(entry), flush=True)
        _record(name, seed, entries)


def _read(config: Config) -> tuple[ResidentRows, Preprocess, np.ndarray, str]:
    lake = Lake()
    profile = profile_input(config, lake)
    chunks, classes = [], []
    for part in profile.slices:
        for batch in read_slice(lake, part, profile.spec, with_labels=True):
            x = torch.from_numpy(batch.x.copy())
            chunks.append(Batch(torch.from_numpy(batch.keys), x, torch.ones(len(x))))
            names = class_names(batch.labels)
            assert names is not None
            classes.append(names)
    dtype = torch.float16 if profile.spec.dtype == np.float16 else torch.float32
    rows = ResidentRows.collect(iter(chunks), profile.spec.dim, dtype, Ranks())
    return rows, profile.preprocess(config), np.concatenate(classes), profile.fingerprint


def _seed(
    name: str, config: Config, rows: ResidentRows, preprocess: Preprocess, classes: np.ndarray, fingerprint: str
) -> list[dict[str, Any]]:
    settings = fit_settings(config, fingerprint)
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        shared, started = Path(folder) / "shared", time.perf_counter()
        try:
            fit(rows, preprocess, settings, _Launcher(shared, stop_after_kmeans=True))
        except _StartedClustersError:
            before = time.perf_counter() - started
        for objective in ("dec", "idec"):
            own = Path(folder) / objective
            shutil.copytree(shared, own)
            started = time.perf_counter()
            fitted = fit(rows, preprocess, replace(settings, objective=objective), _Launcher(own))
            seconds = before + time.perf_counter() - started
            if objective == "dec":
                for baseline in ("raw_kmeans", "autoencoder_kmeans"):
                    entries.append(
                        _entry(name, baseline, config.seed, fitted.baselines[baseline], rows, preprocess, classes)
                    )
                entries[-1]["seconds"] = round(before, 1)
            entry = _entry(name, objective, config.seed, fitted.clustering, rows, preprocess, classes)
            entries.append(entry | {"seconds": round(seconds, 1), **_course(fitted)})
    return entries


class _StartedClustersError(Exception):
    """The shared part of the fit is done."""


class _Launcher:
    """The core's Context in one process, with checkpoints in a folder."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, folder: Path, *, stop_after_kmeans: bool = False) -> None:
        self._folder, self._stop = folder, stop_after_kmeans

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Keep the checkpoint."""
        if checkpoint_dir is not None and metrics["phase"] != "pretrain":
            shutil.copytree(checkpoint_dir, self._folder, dirs_exist_ok=True)
        if self._stop and metrics["phase"] == "kmeans":
            raise _StartedClustersError

    def latest_checkpoint(self) -> Path | None:
        """Return the kept checkpoint."""
        return self._folder if self._folder.exists() else None


def _entry(
    data: str,
    method: str,
    seed: int,
    found: Clustering,
    rows: ResidentRows,
    preprocess: Preprocess,
    classes: np.ndarray,
) -> dict[str, Any]:
    names, of_row = np.unique(classes, return_inverse=True)
    leaves = []
    with torch.no_grad():
        for batch in rows.blocks(8192):
            x = preprocess(batch.x_ND)
            z = x if found.encoder is None else found.encoder(x)
            leaves.append(nearest(z, found.centers_KL)[0][:, 0].numpy())
    table = np.zeros((len(found.centers_KL), len(names)), np.int64)
    np.add.at(table, (np.concatenate(leaves), of_row), 1)
    scores = {k: round(v, 4) for k, v in metrics.external(table).items() if k in ("acc", "nmi", "ari")}
    return {"data": data, "method": method, "seed": seed, **scores}


def _course(fitted: Fitted) -> dict[str, Any]:
    refine = [h for h in fitted.history if h["phase"] == "refine"]
    return {
        "epochs": len(refine),
        "changed": round(refine[-1].get("changed", 1.0), 5),
        "top_q": round(refine[-1]["top_q"], 3),
    }


def _record(name: str, seed: int, entries: list[dict[str, Any]]) -> None:
    path = ROOT / "docs" / "quality.json"
    book = json.loads(path.read_text()) if path.exists() else {"runs": []}
    kept = [e for e in book["runs"] if (e["data"], e["seed"]) != (name, seed)]
    book["runs"] = sorted(kept + entries, key=lambda e: (e["data"], e["seed"]))
    book["made"] = _made()
    path.write_text(json.dumps(book, indent=1) + "\n")
    (ROOT / "docs" / "quality.md").write_text(_page(book))


def _made() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": _COMMIT,
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "faiss-cpu")},
    }


def _page(book: dict[str, Any]) -> str:
    made = book["made"]
    lines = [
        "# Quality over seeds",
        "",
        "Written by `python -m benchmarks quality --mnist FOLDER`, which fits by the settings of `jobs/digits.yaml`",
        "and `jobs/mnist.yaml`. Seconds are of the fit in one process, with the pretraining, which DEC and IDEC share.",
        f"Made on {made['cpu']}, {made['cores']} cores, commit {made['commit']}, "
        + ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        + ".",
        "",
    ]
    for data in sorted({e["data"] for e in book["runs"]}):
        runs = [e for e in book["runs"] if e["data"] == data]
        lines += [
            f"## {data}",
            "",
            "| method | seeds | ACC mean (min - max) | NMI | ARI | seconds | published |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(e["method"] for e in runs):
            lines.append(_row(method, [e for e in runs if e["method"] == method], PUBLISHED[data].get(method, "")))
        lines += ["", "| method | " + " | ".join(f"seed {s}" for s in sorted({e["seed"] for e in runs})) + " |"]
        lines.append("|---" * (1 + len({e["seed"] for e in runs})) + "|")
        for method in dict.fromkeys(e["method"] for e in runs):
            scores = " | ".join(f"{e['acc']:.4f}" for e in runs if e["method"] == method)
            lines.append(f"| {method}, ACC | {scores} |")
        lines.append("")
    return "\n".join(lines)


def _row(method: str, runs: list[dict[str, Any]], published: str) -> str:
    acc = [e["acc"] for e in runs]
    seconds = [e["seconds"] for e in runs if "seconds" in e]
    mean = {k: statistics.mean(e[k] for e in runs) for k in ("acc", "nmi", "ari")}
    duration = f"{statistics.mean(seconds):.0f}" if seconds else ""
    spread = f"{mean['acc']:.4f} ({min(acc):.4f} - {max(acc):.4f})"
    return f"| {method} | {len(runs)} | {spread} | {mean['nmi']:.4f} | {mean['ari']:.4f} | {duration} | {published} |"
