"""Runs on clusters that grow and shrink: `python -m benchmarks scale --autoscaler` writes docs/scale.md."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import fault_rig
from benchmarks.autoscaler_rig import Autoscaled
from benchmarks.record import made
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
_NODES = 3

# Rows enough, in blocks small enough, that a slice lasts seconds: the autoscaler needs some for a node.
_SETTINGS: dict[str, Any] = {
    "fit": {"objective": "kmeans", "precision": "float32"},
    "cluster": {"num_leaves": 10, "num_restarts": 1},
    "merge": {"levels": [5]},
    "assign": {"block_rows": 4},
    "evaluate": {"baseline_rows": 2000, "map_rows": 100},
    "input": {"on_bad_rows": "quarantine"},
}


def main(options: argparse.Namespace) -> None:
    """Measure a run on an autoscaled cluster and write the page."""
    with tempfile.TemporaryDirectory(prefix="raydc-scale-") as folder:
        found = grow_and_shrink(Path(folder))
    PAGE.write_text(page(found))
    print(PAGE.read_text())


def grow_and_shrink(folder: Path) -> dict[str, Any]:
    """Run a job from zero nodes to three and back, losing one on the way; then a fit that asks for a GPU.

    Returns:
        events (seconds, text), rows_in, labels, rejects, most_nodes, gone (whether every node left), code (of the run),
        gpu (whether a node of the GPU pool came for the fit).
    """
    rows = fault_rig.write_rows(folder / "in", num_files=48, copies=20)
    values = {k: dict(v) for k, v in _SETTINGS.items()}
    values["input"] |= {"path": str(folder / "in"), "label_column": "label"}
    config = folder / "job.yaml"
    config.write_text(yaml.safe_dump(values | {"output": str(folder / "runs")}))
    cluster = Autoscaled()
    try:
        return {"rows_in": rows, **_grow(cluster, config, folder), **_ask_for_a_gpu(cluster, config)}
    finally:
        cluster.close()


def _grow(cluster: Autoscaled, config: Path, folder: Path) -> dict[str, Any]:
    job = cluster.run(config, "grown")
    most = 0
    lost = False

    def over() -> bool:
        nonlocal most, lost
        most = max(most, len(cluster.nodes()))
        if most == _NODES and not lost:
            cluster.kill_node()
            lost = True
        return job.poll() is not None

    ended = cluster.wait(over, 900)
    if not ended:
        job.terminate()
    code = job.wait(60)
    cluster.say(f"the run ended with code {code}")
    gone = cluster.wait(lambda: not cluster.nodes(), 120)
    metrics = RunDir(Lake(), str(folder / "runs"), "grown").metrics("assign") if code == 0 else {}
    return {
        "labels": metrics.get("labels"),
        "rejects": metrics.get("rejects"),
        "most_nodes": most,
        "lost": lost,
        "gone": gone,
        "code": code,
    }


def _ask_for_a_gpu(cluster: Autoscaled, config: Path) -> dict[str, Any]:
    """Ask for a worker on a GPU, which the node claims and does not have: the run can only fail after it came."""
    cluster.say("a fit on a GPU is asked for")
    job = cluster.run(config, "on_gpu", "fit.use_gpu=true")
    found = cluster.wait(lambda: "gpu" in cluster.nodes() or job.poll() is not None, 240) and "gpu" in cluster.nodes()
    job.terminate()
    job.wait(60)
    gone = cluster.wait(lambda: not cluster.nodes(), 120)
    return {"gpu": found, "gone_again": gone, "events": cluster.events}


def page(found: dict[str, Any]) -> str:
    """Return docs/scale.md."""
    about = made()
    lines = [
        "# Scale",
        "",
        "## Autoscaler",
        "",
        "Written by `python -m benchmarks scale --autoscaler`: Ray's autoscaler (v2) on one machine.",
        "The head has no CPU. Up to three nodes of two CPUs and one with a GPU are raylets that it starts.",
        f"The job clusters {found['rows_in']:,} rows in 48 files. When three nodes are there, the newest is killed.",
        "No node has the GPU that it claims: the fit that asks for one shows the placement alone. It is then stopped.",
        "",
        f"{about['date']}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores for all nodes together, "
        f"ray {about['versions']['ray']}.",
        "",
        f"Rows in: {found['rows_in']:,}. Labels: {found['labels']:,}. Rejects: {found['rejects']:,}. "
        f"Most nodes: {found['most_nodes']}. Nodes left at the end: {'none' if found['gone'] else 'some'}.",
        "",
        "| s | what happened |",
        "|---|---|",
        *(f"| {seconds:.0f} | {text.replace('|', '/')} |" for seconds, text in found["events"]),
    ]
    return "\n".join(lines) + "\n"
