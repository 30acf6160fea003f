"""The speed, memory and quality of the tree: exact beside fastcluster, its growth, and mini-batch beside exact.

Every tree is built in a process of its own, so that its peak of resident memory is its own. Rows may be run one by one
(`--rows growth million`): each says when and at which commit it was made, and docs/linkage.json keeps the others.
Writes docs/linkage.json, docs/linkage.md and docs/linkage.png.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TREES = ROOT / "build" / "benchmarks"
CUTS = (10, 50, 300)


def main(options: argparse.Namespace) -> None:
    """Run the rows that are named, or all, and write the page."""
    for name in options.rows or ROWS:
        if name.startswith("mnist") and not options.mnist:
            print(f"{name} skipped: give its folder with --mnist or RAYDC_MNIST")
            continue
        entry = {"made": _made(), **(ROWS[name](options.mnist) if name.startswith("mnist") else ROWS[name]())}
        print(name, json.dumps(entry), flush=True)
        path = DOCS / "linkage.json"
        book = json.loads(path.read_text()) if path.exists() else {}
        book[name] = entry
        path.write_text(json.dumps({n: book[n] for n in ROWS if n in book}, indent=1) + "\n")
        write_page(book)


def data_of(kind: str, num: int, width: int) -> np.ndarray:
    """Return centroids: `tree`, twelve nested levels that overlap; `none`, one normal cloud without structure."""
    rng = np.random.default_rng(num)
    if kind == "none":
        return rng.normal(size=(num, width))
    x = rng.normal(size=(num, width)) * 0.3
    for depth in range(12):
        centers = rng.normal(size=(2 ** (depth + 1), width)) * 0.75**depth
        x += centers[rng.integers(0, len(centers), num)]
    return x


def weights_of(kind: str, num: int) -> np.ndarray | None:
    """Return weights: `unit`, none; `lognormal S`, of deviation S in the logarithm. 0.5 is like a k-means."""
    if kind == "unit":
        return None
    return np.random.default_rng(1).lognormal(0, float(kind.split()[1]), num)


def build(method: str, data: str, num: int, width: int, weights: str = "unit") -> dict[str, Any]:
    """Build one tree in this process and keep its merges; return what it took.

    Args:
        method: exact, certified or minibatch; or fastcluster.
        data: see data_of.
        num: leaves.
        width: dimensions.
        weights: see weights_of.
    """
    x, weight_K = data_of(data, num, width), weights_of(weights, num)
    if method == "fastcluster":
        import fastcluster

        started = time.perf_counter()
        merges, found = fastcluster.linkage_vector(x, "ward"), {}
        seconds = time.perf_counter() - started
    else:
        from raydc.core.tree.linkage import agglomerate

        started = time.perf_counter()
        tree = agglomerate(x, weight_K, method=method)
        seconds = time.perf_counter() - started
        merges = tree.merges
        found = {
            "rounds": tree.num_rounds,
            "pairs_per_k2": round(tree.num_pairs / num**2, 3),
            "searches_per_k": round(tree.num_searches / num, 2),
            "cells": tree.num_cells,
        }
    TREES.mkdir(parents=True, exist_ok=True)
    np.save(_saved(method, data, num, width, weights), merges)
    return {
        "method": method,
        "data": data,
        "weights": weights,
        "leaves": num,
        "width": width,
        "seconds": round(seconds, 2),
        "peak_mib": _peak_mib(),
        **found,
    }


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """Return build(*arguments), from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.linkage", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    entry = json.loads(done.stdout)
    print(" ", json.dumps(entry), flush=True)
    return entry


def against_fastcluster() -> dict[str, Any]:
    """Exact at 20,000 leaves beside fastcluster, which knows no weights; each three times in turn, the median."""
    kinds = [("fastcluster", "unit"), *(("exact", w) for w in ("unit", "lognormal 0.5", "lognormal 1.5"))]
    turns = [[in_own_process(method, "tree", 20_000, 64, weights) for method, weights in kinds] for _ in range(3)]
    theirs, *ours = (sorted(runs, key=itemgetter("seconds"))[1] for runs in zip(*turns, strict=True))
    for entry in ours:
        entry["times_faster"] = round(theirs["seconds"] / entry["seconds"], 2)
    heights = [np.load(_saved(m, "tree", 20_000, 64, "unit"))[:, 2] for m in ("exact", "fastcluster")]
    difference = float(np.abs(heights[0] / heights[1] - 1).max())
    return {"trees": [theirs, *ours], "largest_relative_difference_of_heights": difference}


def exact() -> dict[str, Any]:
    """Exact at 100,000 leaves."""
    return {"trees": [in_own_process("exact", "tree", 100_000, 64)]}


def growth() -> dict[str, Any]:
    """Exact from 5,000 to 50,000 leaves; `exact` is the last point."""
    return {"trees": [in_own_process("exact", "tree", num, 64) for num in (5_000, 10_000, 20_000, 50_000)]}


def minibatch() -> dict[str, Any]:
    """Mini-batch beside exact on the same 100,000 leaves."""
    return beside_exact("tree", 100_000, 64)


def without_structure() -> dict[str, Any]:
    """The same where there is nothing to find: distances concentrate, and every neighbor is as good as another."""
    return beside_exact("none", 100_000, 64)


def million() -> dict[str, Any]:
    """Mini-batch at 1,000,000 leaves."""
    return {"trees": [in_own_process("minibatch", "tree", 1_000_000, 32)]}


LEAVES = {"cluster.num_leaves": 1000, "cluster.num_restarts": 2, "merge.levels": "[10, 100]"}
"""What differs from jobs/mnist.yaml; two starts of k-means, since each on the pixels takes a minute at 1,000 leaves."""

PIXELS = LEAVES | {"fit.objective": "kmeans"}


def mnist_network(folder: str) -> dict[str, Any]:
    """The same for the leaves of the learned code: jobs/mnist.yaml with 1,000 leaves."""
    return mnist(folder, LEAVES)


def mnist(folder: str, changes: dict[str, Any] = PIXELS) -> dict[str, Any]:
    """Dendrogram purity of 1,000 leaves on MNIST: trees of the same leaves, against the same table of leaf x digit."""
    from scipy.cluster.hierarchy import linkage

    from raydc.core.tree.levels import level_statistics
    from raydc.core.tree.linkage import agglomerate
    from raydc.core.tree.order import cut
    from raydc.core.tree.purity import dendrogram_purity
    from raydc.labeling.label_slice import num_groups
    from raydc.runfolder import artifacts
    from raydc.runfolder.artifacts import baselines_of
    from raydc.runfolder.folder import RunDir
    from raydc.storage.lake import Lake

    TREES.mkdir(parents=True, exist_ok=True)
    settings = changes | {"input.path": folder, "output": TREES / "runs", "merge.method": "exact"}
    overrides = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    run = RunDir(Lake(), str(TREES / "runs"), "mnist-1000")
    run.remove("")
    command = [sys.executable, "-m", "raydc", "run", "--config", "jobs/mnist.yaml", "--run-id", run.run_id, *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    leaves = artifacts.LEAVES.read(run)
    weights, means, sse = leaves.weights_K, leaves.means_KL, leaves.sse_K
    statistics = artifacts.STATISTICS.read(run, num_groups(artifacts.MODEL.load(run), baselines_of(run).values()))
    table, _ = statistics.tallies["leaf"].classes.table()
    cells = {"method": "minibatch", "cell_size": 50, "top_size": 50}
    found = {
        "exact": agglomerate(means, weights, sse, method="exact").merges,
        "mini-batch, cells of 50": agglomerate(means, weights, sse, **cells).merges,
        "scipy ward, every leaf weighs 1": linkage(means, "ward"),
    }
    purity = {name: round(dendrogram_purity(merges, table), 5) for name, merges in found.items()}
    errors = {n: [level_statistics(cut(m, k), weights, means, sse).sse for k in CUTS] for n, m in found.items()}
    return {
        "settings": changes,
        "num_leaves": len(weights),
        "dendrogram_purity": purity,
        "sse_over_exact": {
            name: {str(k): round(e / b, 5) for k, e, b in zip(CUTS, errors[name], errors["exact"], strict=True)}
            for name in found
        },
        "job": {"dendrogram_purity": run.lake.read_json(run.uri("metrics.json"))["quality"]["dendrogram_purity"]},
    }


def beside_exact(data: str, num: int, width: int) -> dict[str, Any]:
    """Return mini-batch and exact on the same leaves: seconds, and errors at cuts as shares of the exact tree's."""
    trees = [in_own_process(method, data, num, width) for method in ("minibatch", "exact")]
    mine, best = (sse_at_cuts(data, num, width, method) for method in ("minibatch", "exact"))
    return {
        "trees": trees,
        "times_faster": round(trees[1]["seconds"] / trees[0]["seconds"], 2),
        "sse_over_exact": {str(k): round(mine[k] / best[k], 5) for k in CUTS},
    }


def sse_at_cuts(data: str, num: int, width: int, method: str) -> dict[int, float]:
    """Return the sum of squared errors of the leaves around the means of their groups, at each of CUTS."""
    from raydc.core.tree.levels import level_statistics
    from raydc.core.tree.order import cut

    merges, x = np.load(_saved(method, data, num, width, "unit")), data_of(data, num, width)
    return {k: level_statistics(cut(merges, k), np.ones(num), x).sse for k in CUTS}


ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "fastcluster": against_fastcluster,
    "exact": exact,
    "growth": growth,
    "minibatch": minibatch,
    "without_structure": without_structure,
    "million": million,
    "mnist": mnist,
    "mnist_network": mnist_network,
}


def _saved(method: str, data: str, num: int, width: int, weights: str) -> Path:
    return TREES / f"{method}-{data}-{num}-{width}-{weights.replace(' ', '-')}.npy"


def _peak_mib() -> int | None:
    """Return the peak of resident memory of this process; unlike getrusage's, not inherited from the one before it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)


def _made() -> dict[str, Any]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip(),
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": {n: metadata.version(n) for n in ("numpy", "scipy", "fastcluster")}
        | {"python": platform.python_version()},
    }


def write_page(book: dict[str, Any]) -> None:
    """Write docs/linkage.md and docs/linkage.png from the rows that are there."""
    points = _growth_points(book)
    if len(points) > 1:
        _draw(points)
    lines = [
        "# Speed and memory of the tree",
        "",
        "Written by `python -m benchmarks linkage` (`--rows NAME ...` runs some of its rows). Every tree is built in a",
        "process of its own; peak is that process's resident memory, with Python, numpy, the data and the tree.",
        "Data `tree`: twelve nested levels of normal clouds that overlap; `none`: one normal cloud. `pairs / K^2`:",
        "distances evaluated by full searches; a look at every pair would be 0.5. fastcluster computes on one core,",
        "the others on all.",
        "",
    ]
    for name, row in ROWS.items():
        if name in book:
            lines += [f"## {(row.__doc__ or '').strip().rstrip('.')}", "", *_section(book[name]), ""]
    if len(points) > 1:
        lines += ["## Growth", "", "![seconds and memory of the exact tree by the number of leaves](linkage.png)", ""]
    (DOCS / "linkage.md").write_text("\n".join(lines))


def _section(entry: dict[str, Any]) -> list[str]:
    lines = _purities(entry) if "dendrogram_purity" in entry else _trees(entry)
    made = entry["made"]
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    lines.append(
        f"{made['cpu']}, {made['cores']} cores (load before: {made['load_before']}), commit {made['commit']}, "
        f"{made['date']}, {versions}."
    )
    return lines


def _purities(entry: dict[str, Any]) -> list[str]:
    lines = ["| tree | dendrogram purity | " + " | ".join(f"SSE / exact at {k}" for k in CUTS) + " |", "|---" * 5 + "|"]
    for name, purity in entry["dendrogram_purity"].items():
        ratios = " | ".join(f"{entry['sse_over_exact'][name][str(k)]:.4f}" for k in CUTS)
        lines.append(f"| {name} | {purity:.4f} | {ratios} |")
    settings = ", ".join(f"`{key}={value}`" for key, value in entry["settings"].items())
    text = f"`jobs/mnist.yaml` with {settings}; {entry['num_leaves']} leaves hold rows. The job's own tree: "
    return [*lines, "", f"{text}{entry['job']['dendrogram_purity']:.4f}.", ""]


def _trees(entry: dict[str, Any]) -> list[str]:
    lines = [
        "| method | data | weights | K | D | seconds | peak MiB | rounds | pairs / K^2 | fastcluster / this |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for t in entry["trees"]:
        cells = [t["method"], t["data"], t["weights"], f"{t['leaves']:,}", t["width"], f"{t['seconds']:.1f}"]
        cells += [f"{t['peak_mib']:,}" if t["peak_mib"] else "-", t.get("rounds", "-"), t.get("pairs_per_k2", "-")]
        lines.append("| " + " | ".join(map(str, [*cells, t.get("times_faster", "")])) + " |")
    lines.append("")
    if "sse_over_exact" in entry:
        ratios = ", ".join(f"{ratio:.4f} at {k}" for k, ratio in entry["sse_over_exact"].items())
        lines += [
            f"Mini-batch is {entry['times_faster']} times as fast; its squared error at cuts, over exact's: {ratios}.",
            "",
        ]
    if "largest_relative_difference_of_heights" in entry:
        difference = entry["largest_relative_difference_of_heights"]
        lines += [f"Heights differ from fastcluster's by at most {difference:.1e} of themselves (unit weights).", ""]
    return lines


def _growth_points(book: dict[str, Any]) -> list[tuple[int, float, int]]:
    trees = [t for name in ("growth", "exact") if name in book for t in book[name]["trees"]]
    return sorted((t["leaves"], t["seconds"], t["peak_mib"]) for t in trees)


def _draw(points: list[tuple[int, float, int]]) -> None:
    from matplotlib.figure import Figure

    leaves, seconds, peak = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(leaves, seconds, "o-", label="exact, D = 64")
    left.loglog(leaves, seconds[-1] * (leaves / leaves[-1]) ** 2, ":", color="grey", label="K squared")
    left.set(xlabel="leaves K", ylabel="seconds")
    left.legend(frameon=False)
    right.plot(leaves, peak, "o-")
    right.set(xlabel="leaves K", ylabel="peak resident MiB", ylim=(0, None))
    figure.savefig(DOCS / "linkage.png", dpi=130)


if __name__ == "__main__":
    print(json.dumps(build(*json.loads(sys.argv[1]))))
