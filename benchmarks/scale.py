"""How a run grows: `python -m benchmarks scale` writes docs/scale.md, each part of it by itself.

`--autoscaler` runs a job on a cluster that grows and shrinks. `--files N` simulates the driver of up to N files.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import fault_rig, scale_driver
from benchmarks.autoscaler_rig import Autoscaled
from benchmarks.record import made
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
NUM_FILES = 120
_NODES = 3
_WORKING_SECONDS = 25.0
_AUTOSCALER, _DRIVER = "Autoscaler", "Driver"
_SIZES = (1000, 10_000, 100_000)
_MOST_FILES = 100_000

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
    """Measure what is asked for, both parts by default, and write their sections of the page."""
    both = not options.autoscaler and options.files is None
    if options.autoscaler or both:
        with tempfile.TemporaryDirectory(prefix="raydc-scale-") as folder:
            found = grow_and_shrink(Path(folder))
        _put(_AUTOSCALER, autoscaler_section(found))
    if options.files is not None or both:
        most = options.files or _MOST_FILES
        sizes = [size for size in _SIZES if size < most] + [most]
        _put(_DRIVER, scale_driver.section(scale_driver.measured(sizes), made()))
    print(PAGE.read_text())


def _put(title: str, lines: list[str]) -> None:
    """Write one section of the page; the other one stays as it is."""
    text = PAGE.read_text() if PAGE.exists() else ""
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in text.split("\n## ")[1:]}
    sections[title] = "\n".join(lines).strip()
    parts = [f"## {name}\n\n{sections[name]}\n" for name in (_DRIVER, _AUTOSCALER) if name in sections]
    PAGE.write_text("\n".join(["# Scale\n", *parts]))


def grow_and_shrink(folder: Path) -> dict[str, Any]:
    """Run a job from zero nodes to three and back, losing one on the way; then a fit that asks for a GPU.

    Returns:
        events (seconds, text), rows_in, labels, rejects, most_nodes, gone (whether every node left), code (of the run),
        gpu (whether a node of the GPU pool came for the fit).
    """
    rows = fault_rig.write_rows(folder / "in", num_files=NUM_FILES, copies=80)
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
    grown: float | None = None

    def over() -> bool:
        nonlocal most, lost, grown
        most = max(most, cluster.nodes().count("cpu"))
        if most == _NODES and grown is None:
            grown = time.monotonic()
        # By then the node that came last has work.
        if grown is not None and not lost and time.monotonic() - grown > _WORKING_SECONDS:
            cluster.kill_node()
            lost = True
        return job.poll() is not None

    ended = cluster.wait(over, 1200)
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


def autoscaler_section(found: dict[str, Any]) -> list[str]:
    """Return the lines of the section."""
    about = made()
    return [
        "Written by `python -m benchmarks scale --autoscaler`: Ray's autoscaler (v2) on one machine.",
        "The head has no CPU. Up to three nodes of two CPUs and one with a GPU are raylets that it starts.",
        f"The job clusters {found['rows_in']:,} rows in {NUM_FILES} files.",
        "When three nodes of CPUs worked, the newest is killed.",
        "Once the pool of CPUs is at its most, Ray's autoscaler takes nodes with a GPU for work that needs none.",
        "`assign.num_actors` bounds what is asked for.",
        "No node has the GPU that it claims: the fit that asks for one shows the placement alone. It is then stopped.",
        "",
        f"{about['date']}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores for all nodes together, "
        f"ray {about['versions']['ray']}.",
        "",
        f"Rows in: {found['rows_in']:,}. Labels: {found['labels']:,}. Rejects: {found['rejects']:,}. "
        f"Most nodes of CPUs: {found['most_nodes']}. Nodes left at the end: {'none' if found['gone'] else 'some'}.",
        "",
        "| s | what happened |",
        "|---|---|",
        *(f"| {seconds:.0f} | {text.replace('|', '/')} |" for seconds, text in found["events"]),
    ]
