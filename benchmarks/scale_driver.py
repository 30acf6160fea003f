"""What a run of many files costs its driver: the real functions on synthetic records, in a process for each size.

No label is computed and no footer is read. The rest is real: the plan, Ray Data with its actors, the tree of sums, the
manifest, the commits. A slice's statistics are one body of bytes, for all slices; a listing is made up.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.record import ROOT
from raydc.config import Config, parse_config
from raydc.core.metrics.partition_stats import Tally
from raydc.core.models.preprocess import Moments, Preprocess
from raydc.core.objectives.kernel import Kernel
from raydc.data import label_files
from raydc.data.footers import Footer
from raydc.data.profile import Profile
from raydc.data.schema import labels_schema
from raydc.data.slices import Column, InputSpec, plan_slices
from raydc.data.statistics import Statistics
from raydc.labeling.label_slice import Labeling
from raydc.model import Model
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.formats import Place
from raydc.runtime import session
from raydc.runtime.board import bounded
from raydc.stages import publish
from raydc.stages.assign import label_all
from raydc.storage.lake import Lake, StoredFile

ROWS = 100
LEAVES = 100
_LEVELS = {10: np.arange(LEAVES, dtype=np.int32) // 10}
_SPEC = InputSpec(columns=(Column(name="embedding", dim=2, dtype="float32"),), id_column="id", id_type="int64")

STEPS = {
    "plan": "plan of slices from footers",
    "profile": "profile.json written, and read once",
    "assign": "assign: hand out, gather, sum",
    "publish": "publish: listing, manifest",
    "delta": "publish with a Delta table",
    "iceberg": "publish with an Iceberg table",
}


class CompleteSlices(Lake):
    """A lake in which each slice is found complete by whoever opens it, and by no listing."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._body = body

    def exists(self, uri: str) -> bool:
        """Return True."""
        return True

    def read_bytes(self, uri: str) -> bytes:
        """Return the statistics of a slice."""
        return self._body

    def find(self, uri: str) -> list[StoredFile]:
        """Return nothing."""
        return []


class ListedLabels(Lake):
    """A lake whose listing has label files that are not there."""

    def __init__(self, files: list[StoredFile]) -> None:
        super().__init__()
        self._files = files

    def find(self, uri: str) -> list[StoredFile]:
        """Return what is there, and the label files."""
        return super().find(uri) + self._files


def measured(sizes: list[int]) -> list[dict[str, Any]]:
    """Return what each number of files costs the driver, each in a process of its own."""
    found = []
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.scale_driver", str(size)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{size:,} files: {found[-1]}", file=sys.stderr)
    return found


def section(found: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    sizes = [one["files"] for one in found]
    lines = [
        "Written by `python -m benchmarks scale --files N`: a simulation. One process is the driver of N files, each",
        "one slice. The functions are those of a run; the records they work on are made up. No row is labeled, no",
        f"footer is read, nothing goes over a network. K = {LEAVES}, {ROWS} rows a slice, two actors. CPU is that of",
        "the driver's process, with its threads. Growth is the exponent of CPU in the number of files, over the last",
        "two sizes.",
        "",
        f"{about['date']}, commit {about['commit']}, {about['cpu']}, {about['cores']} cores, "
        f"ray {about['versions']['ray']}.",
        "",
        "| driver CPU, s (ms a slice) | " + " | ".join(f"{size:,} files" for size in sizes) + " | growth |",
        "|---|" + "---|" * (len(sizes) + 1),
    ]
    for step, text in STEPS.items():
        cells = [f"{one[step]['cpu']:.2f} ({1000 * one[step]['cpu'] / one['files']:.3f})" for one in found]
        lines.append(f"| {text} | " + " | ".join(cells) + f" | {_growth(found, step)} |")
    seconds = [f"{sum(one[step]['seconds'] for step in STEPS):.0f} s" for one in found]
    memory = [f"{one['peak_bytes'] / 2**30:.2f} GiB" for one in found]
    lines += [f"| wall time of all steps | {' | '.join(seconds)} | |", f"| peak memory | {' | '.join(memory)} | |"]
    return lines


def _growth(found: list[dict[str, Any]], step: str) -> str:
    if len(found) < 2:
        return ""
    first, last = found[-2:]
    return f"{math.log(last[step]['cpu'] / first[step]['cpu']) / math.log(last['files'] / first['files']):.2f}"


def driver(num_files: int, folder: Path) -> dict[str, Any]:
    """Return CPU seconds and seconds of each step, and the peak of memory."""
    found: dict[str, Any] = {"files": num_files}

    def timed(step: str, call: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        found[step] = {"cpu": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
        return result

    run = RunDir(Lake(), str(folder / "runs"), "r1")
    footers = [
        Footer(uri=f"/in/part-{i:06d}.parquet", size=1, num_rows=ROWS, row_groups=((ROWS, 8 * ROWS),))
        for i in range(num_files)
    ]
    slices = timed("plan", lambda: plan_slices(footers, 2**28))
    profile = Profile(spec=_SPEC, slices=slices, fingerprint="0", moments=Moments(1, np.zeros(2), np.ones(2)))
    timed("profile", lambda: (artifacts.PROFILE.write(run, profile), artifacts.PROFILE.read(run)))
    noted = _noted(folder)
    _assign(timed, _settings(), slices, _statistics(noted).to_bytes())
    artifacts.MODEL.save(run, _model())
    paths = [artifacts.LABELS.of(part).path for part in slices]
    table = noted.take(pa.array(np.zeros(num_files, np.int64))).set_column(0, "path", pa.array(paths))
    artifacts.LABEL_FILES.write(run, table)
    size = noted["bytes"][0].as_py()
    lake = ListedLabels([StoredFile(run.uri(path), size, modified=0.0) for path in paths])
    tables: dict[str, dict[str, Any]] = {"publish": {}, "delta": {"delta": {}}, "iceberg": {"iceberg": {}}}
    for step, settings in tables.items():
        listed = RunDir(lake, str(folder / "runs"), "r1")
        timed(step, partial(publish.run, _settings(publish=settings), listed))
        artifacts.MANIFEST.remove(run)
    return found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _assign(timed: Callable[[str, Callable[[], Any]], Any], config: Config, slices: list[Any], body: bytes) -> None:
    lake = CompleteSlices(body)
    job = Labeling(lake=lake, output="/out", spec=_SPEC, model=_model())
    with session.connected(config), bounded("assign", config, Place(lake, "/out")) as bound:
        total = timed("assign", lambda: label_all(config, lambda: job, slices, 10, bound, Place(lake, "/out")))
    assert total.rows == ROWS * len(slices) and total.files.num_rows == len(slices)


def _settings(**sections: Any) -> Config:
    values = {"input": {"path": "/in"}, "cluster": {"num_leaves": LEAVES}, "assign": {"num_actors": 2}}
    return parse_config(values | sections)


def _model() -> Model:
    centers = torch.from_numpy(np.random.default_rng(0).normal(size=(LEAVES, 2)).astype(np.float32))
    return Model(
        preprocess=Preprocess("none", [(0, 2, 1.0)]),
        encoder=None,
        centers_KL=centers,
        kernel=Kernel(1.0, 4.0),
        widths=(2,),
        levels=_LEVELS,
    )


def _noted(folder: Path) -> pa.Table:
    """Return what is noted of a label file."""
    schema = labels_schema(pa.int64(), list(_LEVELS))
    columns = {field.name: pa.array(range(ROWS), pa.int64()).cast(field.type) for field in schema}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema), folder / "labels.parquet")
    return label_files.record("labels/a.parquet", folder / "labels.parquet")


def _statistics(noted: pa.Table) -> Statistics:
    """Return what labeling counts in one slice: a hundred rows, ten of them near enough for exemplars."""
    leaf = np.arange(ROWS) % LEAVES
    distance = np.linspace(0.1, 1.0, ROWS)
    tallies = {"leaf": Tally(num_groups=LEAVES), "level_10": Tally(num_groups=10)}
    tallies["leaf"].add(leaf, distance, 2 * distance, None)
    tallies["level_10"].add(leaf // 10, distance, 2 * distance, None)
    exemplars = pa.table({"leaf": leaf, "key": leaf, "id": leaf, "distance": distance}).slice(0, 10)
    return Statistics(rows=ROWS, labels=ROWS, tallies=tallies, exemplars=exemplars, files=noted)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="raydc-scale-") as name:
        print(json.dumps(driver(int(sys.argv[1]), Path(name))))
