"""Speed beside the peers and beside the bare machine: `python -m benchmarks speed [--rows NAME ...]`.

Ours is the command as users type it (`raydc run`, `raydc assign`), Ray included, unless the row says otherwise. Peers
run in their own environment, build/peers, which `make bench` makes. Runs of a row take turns; the figure is the median
of --repeats. Writes docs/benchmarks.json, docs/benchmarks.md and docs/benchmarks.png.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import planted
from benchmarks.record import ROOT, made
from benchmarks.speed_page import figure, page

BUILD = ROOT / "build" / "benchmarks"
PEERS = ROOT / "build" / "peers" / "bin" / "python"
THREADS = len(os.sched_getaffinity(0))
WIDTHS = [784, 500, 500, 2000, 10]
BATCH = 256

Run = Callable[[], dict[str, Any]]


def main(options: argparse.Namespace) -> None:
    """Run the rows that are named, or all, and write the page."""
    for name in options.rows or ROWS:
        if name in NEEDS_MNIST and not options.mnist:
            print(f"{name} skipped: give the folder of MNIST with --mnist or RAYDC_MNIST")
            continue
        for entry in ROWS[name](options):
            print(json.dumps(entry), flush=True)
            record({"name": name, **entry, "made": made()})


# ---- rows ----


def autoencoder_epoch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch of pretraining, MNIST, 784-500-500-2000-10, batch 256."""
    data, shape = mnist_array(options.mnist), {"widths": WIDTHS, "batch": BATCH, "threads": THREADS}
    found = in_turn(
        options.repeats,
        ours=lambda: epochs_of(options.mnist, "pretrain", {"fit.objective": "autoencoder", "pretrain.num_epochs": 4}),
        peer=lambda: peer("clustpy_autoencoder", data=data, epochs=2, **shape),
        limit=lambda: bare("autoencoder_epoch", data=data, epochs=3, arithmetic="bf16", **shape),
    )
    return [entry_of("autoencoder epoch", "MNIST 70k x 784", "s", found, peer_name="ClustPy")]


def dec_epoch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch of DEC with the exact global target, refreshed every epoch, on the same network."""
    data = mnist_array(options.mnist)
    shape = {"widths": WIDTHS, "batch": BATCH, "threads": THREADS, "clusters": 10}
    settings = {
        "pretrain.num_epochs": 1,
        "refine.num_epochs": 4,
        "refine.refreshes_per_epoch": 1,
        "refine.tolerance": 0,
    }
    found = in_turn(
        options.repeats,
        ours=lambda: epochs_of(options.mnist, "refine", {"fit.objective": "dec", **settings}),
        peer=lambda: peer("clustpy_dec", data=data, epochs=2, **shape),
        limit=lambda: bare("dec_epoch", data=data, epochs=3, **shape),
    )
    return [entry_of("DEC epoch", "MNIST 70k x 784, K = 10", "s", found, peer_name="ClustPy (target of the batch)")]


def lloyd(options: argparse.Namespace) -> list[dict[str, Any]]:
    """An iteration of Lloyd, 1,000,000 x 128 float32, K = 1024; ours is the worker's code in one process."""
    shape, start, ours = _lloyd()
    found = in_turn(
        options.repeats,
        ours=ours,
        limit=lambda: bare("lloyd", start=start, **shape),
        peer=lambda: peer("sklearn_lloyd", start=start, **shape),
    )
    return [entry_of("Lloyd iteration", "1M x 128, K = 1024", "s", found, peer_name="scikit-learn")]


def lloyd_spark(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same beside Spark MLlib, of which one iteration is timed: it takes minutes to come to it."""
    shape, _, ours = _lloyd()
    once = shape | {"iterations": 1}
    found = in_turn(options.repeats, ours=ours, peer=lambda: peer("spark_lloyd", clusters=1024, **once))
    return [entry_of("Lloyd iteration", "1M x 128, K = 1024", "s", found, peer_name="Spark MLlib")]


def _lloyd() -> tuple[dict[str, Any], str, Run]:
    """Return the arguments of an implementation, the centers from which it starts, and our run."""
    data, start = BUILD / "lloyd.npy", BUILD / "lloyd-start.npy"
    if not start.exists():
        rng = np.random.default_rng(0)
        centers_KD = rng.normal(size=(1024, 128)).astype(np.float32)
        x_ND = centers_KD[rng.integers(0, 1024, 1_000_000)] + rng.standard_normal((1_000_000, 128), dtype=np.float32)
        BUILD.mkdir(parents=True, exist_ok=True)
        np.save(data, x_ND)
        np.save(start, x_ND[rng.choice(len(x_ND), 1024, replace=False)])
    shape = {"data": str(data), "iterations": 4, "threads": THREADS}
    command = [sys.executable, "-m", "benchmarks.ours"]
    return shape, str(start), lambda: in_own_process(command, "lloyd", start=str(start), **shape)


def assign(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Parquet to label Parquet, 768 wide float16, K = 1000, without an encoder."""
    return [_assign(options, [])]


def assign_encoder(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same with the 768-500-500-2000-10 encoder."""
    return [_assign(options, [planted.DIM, 500, 500, 2000, 10])]


def _assign(options: argparse.Namespace, widths: list[int]) -> dict[str, Any]:
    folder = planted.write(BUILD / f"planted-{options.num_rows}", options.num_rows)
    centers = planted.centers() if not widths else np.random.default_rng(0).normal(size=(1000, 10)).astype(np.float32)
    np.save(BUILD / "assign-centers.npy", centers)
    model, output = BUILD / "assign-model", BUILD / "assign-labels"
    in_own_process([sys.executable, "-m", "benchmarks.ours"], "write_model", widths=widths, path=str(model))

    def ours() -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        command = ["assign", "--model", str(model), "--input", str(folder), "--output", str(output)]
        return watched([sys.executable, "-m", "raydc", *command])

    def limit() -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        centers = str(BUILD / "assign-centers.npy")
        return bare("assign", folder=str(folder), output=str(output), centers=centers, widths=widths, threads=THREADS)

    found = in_turn(options.repeats, ours=ours, limit=limit)
    for runs in found.values():
        runs["median"] = options.num_rows / runs["median"]
    work = "assign, Parquet to Parquet" + (", with the encoder" if widths else "")
    return entry_of(work, f"{options.num_rows:,} x 768 float16, K = 1000", "rows/s", found)


def shard(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Filling the resident shard of one worker through Ray Data, beside pyarrow alone."""
    folder = planted.write(BUILD / f"planted-{options.num_rows}", options.num_rows)
    settings = _kmeans_only(folder) | {"cluster.num_iterations": 1, "evaluate.baseline_rows": 2000}

    def ours() -> dict[str, Any]:
        _, stages = run_job("imagenet", settings, until="fit")
        return {"seconds": [stages["fit"]["metrics"]["load_seconds"]]}

    found = in_turn(options.repeats, ours=ours, limit=lambda: bare("read", folder=str(folder)))
    size = options.num_rows * planted.DIM * 2
    for runs in found.values():
        runs["median"] = size / 2**30 / runs["median"]
    return [entry_of("filling a resident shard", f"{size / 1e9:.2f} GB of float16", "GiB/s", found)]


def start_up(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds from the command to the first epoch and from the last label to the prompt, on digits."""

    def ours() -> dict[str, Any]:
        return in_own_process([sys.executable, "-m", "benchmarks.ours"], "start_up")

    def limit() -> dict[str, Any]:
        # From the start of its process to its end, as with ours.
        started = time.time()
        seen = bare("ray_alone")
        ended = time.time()
        return {
            "to_first_epoch": seen["entered"] - started,
            "after_fit": ended - seen["fitted"],
            "seconds": [ended - started],
        }

    found = in_turn(options.repeats, ours=ours, limit=limit)
    entries = []
    for key, work in (("to_first_epoch", "from the command to the first epoch"), ("after_fit", "from the last label")):
        part = {n: {"median": statistics.median(r[key] for r in runs["runs"])} for n, runs in found.items()}
        entries.append(entry_of(work, "digits", "s", part))
    return entries


def pipeline(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole job on planted clusters at three sizes: time by stage, memory by process, quality at each level.

    From them the seconds per million rows of an epoch and of the assign stage. One run of each.
    """
    entries = []
    for num_rows in options.sizes or (options.num_rows // 16, options.num_rows // 4, options.num_rows):
        # As many steps of pretraining at each size, and as many rows for the baselines: those of the smallest.
        settings = {
            "pretrain.num_epochs": _IMAGENET["pretrain.num_epochs"] * (options.num_rows // num_rows),
            "evaluate.baseline_rows": options.num_rows // 16,
        }
        whole, stages = _whole_job("the whole job", num_rows, settings)
        entries.append(whole)
        epochs = [h["seconds"] for h in stages["fit"]["metrics"]["history"] if h["phase"] == "pretrain"]
        for work, seconds in (("pretraining epoch", min(epochs)), ("assign stage", stages["assign"]["seconds"])):
            ours = {"ours": {"median": seconds / num_rows * 1e6}}
            entry = entry_of(f"{work}, seconds per million rows", f"{num_rows:,} x 768", "s", ours)
            entries.append(entry | {"rows": num_rows})
    return sorted(entries, key=lambda e: e["work"])


def pipeline_kmeans(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole job with k-means on the rows and no network; at the smallest size beside EVoC, which chooses its K."""
    work, small = "the whole job, k-means on the rows", options.num_rows // 16
    rows = str(planted.write(BUILD / f"planted-{small}", small))
    # Its first run on a machine compiles for half a minute, and keeps what it compiled.
    other = [peer("evoc", folder=rows, threads=THREADS) for _ in range(2)][-1]
    beside = {"median": other["seconds"][0], "peaks": {"process": other["peak_mib"]}}
    entry, _ = _whole_job(work, small, {"fit.objective": "kmeans"}, ("EVoC", beside))
    large, _ = _whole_job(work, options.num_rows, {"fit.objective": "kmeans"})
    return [entry | {"quality_of_peer": other["quality"]}, large]


def _whole_job(
    work: str, num_rows: int, settings: dict[str, Any], other: tuple[str, dict[str, Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entry of a run of jobs/cluster_imagenet.yaml, and the markers of its stages."""
    folder = planted.write(BUILD / f"planted-{num_rows}", num_rows)
    seen, stages = run_job("imagenet", {"input.path": folder, "input.label_column": "label", **settings})
    print(f"  {num_rows}: {json.dumps(seen)}", flush=True)
    found: dict[str, Any] = {"ours": {"median": seen["seconds"][0], "peaks": seen["peaks"]}}
    if other is not None:
        found["peer"] = other[1]
    entry = entry_of(work, f"{num_rows:,} x 768 float16, K = 1000", "s", found, peer_name=other[0] if other else None)
    found_run = BUILD / "job" / "bench"
    metrics = json.loads((found_run / "metrics.json").read_text())
    entry |= {"quality": planted.quality(found_run / "labels", folder), "baselines": metrics["baselines"]}
    entry["verdict"] = metrics["verdict"]["sentence"] if metrics["verdict"] else None
    return entry | {"seconds_by_stage": {n: s["seconds"] for n, s in stages.items()}, **_shard_of(num_rows)}, stages


def _shard_of(num_rows: int) -> dict[str, Any]:
    """Return the rows of a planted input, and the MiB of them that one worker holds."""
    return {"rows": num_rows, "shard_mib": round(num_rows * (2 * planted.DIM + 12) / 2**20)}


ROWS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    f.__name__: f
    for f in (
        autoencoder_epoch,
        dec_epoch,
        lloyd,
        lloyd_spark,
        assign,
        assign_encoder,
        shard,
        start_up,
        pipeline,
        pipeline_kmeans,
    )
}
NEEDS_MNIST = ("autoencoder_epoch", "dec_epoch")


# ---- running ----


def in_turn(repeats: int, **runs: Run) -> dict[str, dict[str, Any]]:
    """Return what each run gave: every one `repeats` times, in turn, so that all meet the same machine."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(run())
            print(f"  {name}: {json.dumps(found[name][-1])[:300]}", flush=True)
    return {
        name: {
            "median": statistics.median(statistics.median(r["seconds"]) for r in results),
            "runs": results,
            "peaks": results[-1].get("peaks") or {"process": results[-1].get("peak_mib")},
        }
        for name, results in found.items()
    }


def bare(name: str, **arguments: Any) -> dict[str, Any]:
    """Return what benchmarks/bare.py measured."""
    return in_own_process([sys.executable, "benchmarks/bare.py"], name, **arguments)


def peer(name: str, **arguments: Any) -> dict[str, Any]:
    """Return what benchmarks/peers.py measured in the peers' environment."""
    return in_own_process([str(PEERS), "benchmarks/peers.py"], name, **arguments)


def in_own_process(command: list[str], name: str, **arguments: Any) -> dict[str, Any]:
    """Return the JSON that `command name arguments` prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(
        [*command, name, json.dumps(arguments)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_job(config: str, settings: dict[str, Any], until: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a job of jobs/ into build/; return what watching it gave and the markers of its stages."""
    folder = BUILD / "job"
    shutil.rmtree(folder, ignore_errors=True)
    base = {"output": folder, "fit.cpus_per_worker": THREADS, **(_IMAGENET if config == "imagenet" else {}), **settings}
    overrides = [text for key, value in base.items() for text in ("--set", f"{key}={value}")]
    name = "cluster_imagenet" if config == "imagenet" else config
    command = [sys.executable, "-m", "raydc", "run", "--config", f"jobs/{name}.yaml", "--run-id", "bench", *overrides]
    seen = watched(command, stop_after=folder / "bench" / "stages" / f"{until}.json" if until else None)
    return seen, {p.stem: json.loads(p.read_text()) for p in (folder / "bench" / "stages").glob("*.json")}


_IMAGENET: dict[str, Any] = {
    "input.embedding_columns": "embedding",
    "input.id_column": "id",
    "input.carry_columns": "[]",
    "fit.num_workers": 1,
    "fit.use_gpu": False,
    "pretrain.num_epochs": 2,
    "pretrain.batch_rows": 512,
    "pretrain.learning_rate": 1e-3,
    "cluster.init_rows": 200_000,
    "cluster.num_restarts": 1,
    "refine.num_epochs": 1,
    "assign.num_actors": "null",
    "assign.cpus_per_actor": 1,
    "assign.use_gpu": False,
}
"""What differs from jobs/cluster_imagenet.yaml: no GPU, planted rows, and few epochs, which take minutes each here, of
smaller batches, so that the network takes 5,000 steps where the job itself takes 6,250."""


def _kmeans_only(folder: Path) -> dict[str, Any]:
    return {"input.path": folder, "fit.objective": "kmeans", "cluster.num_restarts": 1, "cluster.init_rows": 2000}


def epochs_of(mnist: str, phase: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of the epochs of a phase of a whole job on MNIST, but the first, which warms up."""
    base = {"input.path": mnist, "cluster.num_restarts": 1, "evaluate.baseline_rows": 2000}
    seen, stages = run_job("mnist", base | settings, until="fit")
    seconds = [h["seconds"] for h in stages["fit"]["metrics"]["history"] if h["phase"] == phase][1:]
    return {"seconds": seconds, "peaks": seen["peaks"]}


def watched(command: list[str], stop_after: Path | None = None) -> dict[str, Any]:
    """Run a command; return its seconds and the peak resident MiB of each kind of process below it.

    When the stage whose marker is `stop_after` is done, the command is told to stop.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks: dict[str, float] = {}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(2.0):
            if stop_after is not None and _is_done(stop_after):
                process.terminate()
                return
            for one in _family(process.pid):
                try:
                    kind = "driver" if one.pid == process.pid else _kind(one.cmdline())
                    # What the kernel counts anyhow: to walk through a process's pages holds that process up.
                    memory = one.memory_info()
                    peaks[kind] = max(peaks.get(kind, 0.0), (memory.rss - memory.shared) / 2**20)
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    process.wait()
    stop.set()
    watcher.join()
    stopped = stop_after is not None and _is_done(stop_after)
    if process.returncode and not stopped:
        raise RuntimeError(f"exit {process.returncode}: {' '.join(command)}")
    return {"seconds": [time.perf_counter() - started], "peaks": {k: round(v) for k, v in sorted(peaks.items())}}


def _is_done(marker: Path) -> bool:
    return marker.exists() and "metrics" in json.loads(marker.read_text())


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def _kind(command: list[str]) -> str:
    title = " ".join(command)
    for word, kind in (("RayTrainWorker", "training worker"), ("Labeler", "assign actor"), ("raylet", "raylet")):
        if word in title:
            return kind
    return "gcs" if "gcs_server" in title else "other"


def mnist_array(folder: str) -> str:
    """Return the path of MNIST as one (70000, 784) float32 array, written on the first call."""
    import pyarrow.dataset as ds

    path = BUILD / "mnist.npy"
    if not path.exists():
        column = ds.dataset(folder).to_table(columns=["embedding"])["embedding"].combine_chunks()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, column.flatten().to_numpy().reshape(len(column), -1).astype(np.float32))
    return str(path)


# ---- the page ----


def entry_of(work: str, size: str, unit: str, found: dict[str, Any], peer_name: str | None = None) -> dict[str, Any]:
    """Return a line of the table. A ratio above 1 is in our favor, whatever the unit."""
    ours = found["ours"]["median"]

    def ratio(name: str) -> float | None:
        if name not in found:
            return None
        other = found[name]["median"]
        return round(ours / other if unit.endswith("/s") else other / ours, 3)

    def value(name: str) -> float | None:
        return round(found[name]["median"], 4) if name in found else None

    return {
        "work": work,
        "size": size,
        "ours": round(ours, 4),
        "peer": value("peer"),
        "peer_name": peer_name,
        "ratio": ratio("peer"),
        "limit": value("limit"),
        "limit_ratio": ratio("limit"),
        "unit": unit,
        "peaks": {name: runs["peaks"] for name, runs in found.items() if runs.get("peaks")},
    }


def record(entry: dict[str, Any]) -> None:
    """Add a line to docs/benchmarks.json in the place of its elder, and write the page."""
    path = ROOT / "docs" / "benchmarks.json"
    book = json.loads(path.read_text()) if path.exists() else []
    key = ("work", "size", "peer_name")
    book = [e for e in book if any(e[k] != entry[k] for k in key)] + [entry]
    book.sort(key=lambda e: list(ROWS).index(e["name"]))
    path.write_text(json.dumps(book, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(book))
    figure(book).savefig(path.with_suffix(".png"), dpi=130)
