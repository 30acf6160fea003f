"""Where k-means ends from each start: restarts, a tree of fine leaves, and moves after either, on planted clusters.

Each case runs in a process of its own with one thread, so that its CPU seconds are its own. Some cases can be run
alone with `--rows`; docs/kmeans.json keeps the others. Writes docs/kmeans.json and docs/kmeans.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.planted import centers
from benchmarks.record import ROOT, made

DOCS = ROOT / "docs"
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Planted clusters."""

    text: str
    num_rows: int = 80_000
    dim: int = 64
    noise: float = 0.6
    """Deviation of a dimension of a row around its center."""

    power: float = 0.0
    """Clusters have sizes in proportion to rank^-power."""

    num_clusters: int = 1000


DATA = {
    "starts_64": Data(text="64 dimensions, separated"),
    "starts_64_overlapping": Data(text="64 dimensions, overlapping", noise=1.0),
    "starts_64_uneven": Data(text="64 dimensions, sizes rank^-0.7", power=0.7),
    "starts_64_zipf": Data(text="64 dimensions, sizes rank^-1", power=1.0),
    "starts_768": Data(text="768 dimensions, separated", dim=768, noise=1.5),
    "starts_768_uneven": Data(
        text="768 dimensions, 200 clusters, sizes rank^-0.7", dim=768, noise=1.5, power=0.7, num_clusters=200
    ),
}

STARTS = {
    "planted": "planted means",
    "restarts": "FAISS, AFK-MC2, 1 run",
    "restarts_all": "FAISS, then all moves",
    "tree": "tree",
    "tree_separated": "tree, then separated moves",
    "tree_all": "tree, then all moves",
}


def main(options: argparse.Namespace) -> None:
    """Run the cases that are named, or all, and write the page."""
    for name in options.rows or DATA:
        if name not in DATA:
            continue
        command = [sys.executable, "-m", "benchmarks.starts", name]
        done = subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=_environment()
        ).stdout
        path = DOCS / "kmeans.json"
        book = json.loads(path.read_text()) if path.exists() else {}
        book[name] = {"made": made(), **json.loads(done.splitlines()[-1])}
        print(name, json.dumps(book[name]), flush=True)
        path.write_text(json.dumps({n: book[n] for n in DATA if n in book}, indent=1) + "\n")
        (DOCS / "kmeans.md").write_text(page(book))


def _environment() -> dict[str, str]:
    return {**os.environ, **_THREADS}


def rows_of(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, D) float32 rows that float16 holds exactly, and the cluster of each."""
    center_KD = centers(data.dim)[: data.num_clusters]
    rng = np.random.default_rng([1, 0])
    share = 1.0 / np.arange(1, len(center_KD) + 1) ** data.power
    # Sizes have nothing to do with the place in the hierarchy.
    share = rng.permutation(share / share.sum())
    label = rng.choice(len(center_KD), data.num_rows, p=share)
    x = center_KD[label] + data.noise * rng.standard_normal((data.num_rows, data.dim), dtype=np.float32)
    return x.astype(np.float16).astype(np.float32), label


def run_case(data: Data) -> dict[str, Any]:
    """Return where k-means ends from each start, beside the planted means."""
    import torch

    from raydc.core.search.merge_split import merge_and_split
    from raydc.core.search.starts import first_centers, least_share

    torch.set_num_threads(1)
    x, label = rows_of(data)
    z, num_leaves = torch.from_numpy(x), len(np.unique(label))
    truth = torch.zeros(data.num_clusters, data.dim, dtype=torch.float64).index_add_(
        0, torch.from_numpy(label), z.double()
    )
    sizes = np.bincount(label, minlength=data.num_clusters)
    truth = (truth / torch.from_numpy(sizes).clamp_min(1)[:, None]).float()
    owners = zip(z.split(8192), torch.from_numpy(label).split(8192), strict=True)
    least = sum(float((part - truth[own]).double().square().sum()) for part, own in owners)

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((part, torch.ones(len(part))) for part in z.split(8192))

    planted = truth[torch.from_numpy(sizes > 0)]
    found: dict[str, Any] = {"nearest_planted": _scored(z, label, planted, least)}
    hows: tuple[Any, ...] = ("planted", "restarts", "tree")
    kinds: tuple[Any, ...] = ("none", "separated", "all")
    for how in hows:
        started = time.process_time()
        first = planted
        if how != "planted":
            first = first_centers(z, num_leaves, seed=0, how=how, num_restarts=1)
        start_seconds = time.process_time() - started
        for moves in kinds:
            name = how if moves == "none" else f"{how}_{moves}"
            if name not in STARTS:
                continue
            started, rounds = time.process_time(), []
            second, share = first, least_share(moves, how, num_leaves)
            if share is not None:
                moved = merge_and_split(blocks, first, all_sum=_alone, least_share=share)
                second, rounds = moved.centers_KD, [[r.num_moves, r.kept] for r in moved.rounds]
            ended, iterations = _lloyd(blocks, second)
            seconds = time.process_time() - started
            found[name] = {
                **_scored(z, label, ended, least),
                "start_seconds": round(start_seconds, 2),
                "seconds": round(start_seconds + seconds, 2),
                "iterations": iterations,
                "rounds": rounds,
            }
    return {
        "rows": len(z),
        "width": data.dim,
        "leaves": num_leaves,
        "sizes": [int(sizes[sizes > 0].min()), int(sizes.max())],
        "ends": found,
    }


def _alone(values: Any) -> Any:
    return values


def _lloyd(blocks: Callable[[], Any], first: Any) -> tuple[Any, int]:
    import torch

    from raydc.core.search.kmeans import lloyd

    generator = torch.Generator().manual_seed(0)
    ended = lloyd(blocks, first, all_sum=_alone, generator=generator, num_iterations=50, tolerance=1e-5)
    return ended.centers_KD, ended.num_iterations


def _scored(z: Any, label: np.ndarray, center_KD: Any, least: float) -> dict[str, float]:
    from raydc.core.metrics.scores import counted, external
    from raydc.core.search.nearest import nearest

    parts = [nearest(part, center_KD) for part in z.split(8192)]
    leaf = np.concatenate([ids[:, 0].numpy() for ids, _ in parts])
    scores = external(counted(leaf, label))
    sse = sum(float(squared.double().sum()) for _, squared in parts)
    return {"acc": round(scores["acc"], 4), "nmi": round(scores["nmi"], 4), "sse_ratio": round(sse / least, 5)}


def page(book: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    lines = [
        "# Where k-means ends from each start",
        "",
        "Made by `python -m benchmarks starts`, from docs/kmeans.json. Planted clusters in a hierarchy of 10 x 10 x 10 "
        "(200 clusters: the first two branches), float16. One thread. Every start is followed by Lloyd's iterations "
        "until the error falls by less than 1e-5.",
        "",
        "SSE is divided by that of the planted means. Seconds are CPU seconds of start, moves and Lloyd together. "
        "*planted means* as a start show what Lloyd's iterations make of the best start there is.",
        "",
        "| data | sizes | start | ACC | NMI | SSE | start s | all s | moves |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, data in DATA.items():
        if name not in book:
            continue
        case = book[name]
        ends = case["ends"]
        text, sizes = f"{case['rows']:,} rows, {data.text}", "{} - {:,}".format(*case["sizes"])
        planted = ends["nearest_planted"]
        lines.append(
            f"| {text} | {sizes} | (nearest planted mean) | {planted['acc']:.4f} | {planted['nmi']:.4f} | "
            f"{planted['sse_ratio']:.4f} | | | |"
        )
        for start, said in STARTS.items():
            end = ends[start]
            moves = ", ".join(str(n) if kept else f"({n})" for n, kept in end["rounds"])
            lines.append(
                f"| | | {said} | {end['acc']:.4f} | {end['nmi']:.4f} | {end['sse_ratio']:.4f} | "
                f"{end['start_seconds']:.1f} | {end['seconds']:.1f} | {moves} |"
            )
    lines += [
        "",
        "*moves*: merges and splits in each round; in parentheses those that were undone.",
        "",
        "Where sizes are very uneven, the least squared error is not the planted partition: splitting the largest "
        "cluster lowers it more than telling two small ones apart. *all* moves do so. *separated* moves split a leaf "
        "only where its two parts lie farther apart than rows spread evenly along a line.",
        "",
    ]
    for name, entry in book.items():
        stamp = entry["made"]
        lines.append(f"{name}: {stamp['date']}, commit {stamp['commit']}, {stamp['cpu']}, {stamp['cores']} cores.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(run_case(DATA[sys.argv[1]])))
