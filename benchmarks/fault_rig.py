"""A two-node Ray cluster on one machine, drivers as processes of their own, and ways to see and to break them.

Nothing here is a hook in the product: what a run does is read from its log, its run folder and its S3 requests, and
what breaks is a process, a file or a connection. benchmarks/faults.py and tests/benchmarks/test_faults.py stand on it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sklearn.datasets import load_digits

from raydc.pipeline import STAGES
from raydc.storage.lake import Lake

ROOT = Path(__file__).resolve().parent.parent

# Names of Ray's worker processes while they are at it, as the process list shows them.
TRAINER, ACTOR, CELL = "ray::RayTrainWorker", "ray::MapWorker(MapBatches(Labeler))", "ray::_run_cell"

NUM_FILES = 24

_NODE_CPUS = 2
_POLL_SECONDS = 0.001
_PATIENCE_SECONDS = 900.0

SETTINGS: dict[str, Any] = {
    "preprocess": {"method": "scale"},
    "autoencoder": {"hidden_dims": [64, 64], "latent_dim": 10},
    "pretrain": {"num_epochs": 12, "batch_rows": 128, "learning_rate": 2e-3},
    "cluster": {"num_leaves": 10, "num_restarts": 3},
    "fit": {"objective": "dec", "precision": "float32", "num_workers": 2},
    "refine": {"num_epochs": 10, "batch_rows": 128, "tolerance": 0.0},
    # Cells of two clusters: so few leaves would be merged without tasks otherwise.
    "merge": {"levels": [5], "method": "minibatch", "cell_size": 2, "top_size": 1},
    # Small blocks make a slice last.
    "assign": {"num_actors": 2, "block_rows": 16},
    "evaluate": {"baseline_rows": 2000, "map_rows": 100},
    # Shorter than in earnest, so that a driver that stands still is taken for dead in seconds.
    "lease": {"heartbeat_seconds": 1.0, "stale_seconds": 10.0},
}


class MissedError(Exception):
    """The fault did not hit: the stage was over, or what should have died was not there."""


def write_rows(folder: Path, *, num_files: int = NUM_FILES, copies: int = 5, num_bad: int = 2) -> int:
    """Write digits, each `copies` times with noise, in `num_files` files with `num_bad` rows of NaN each.

    Returns:
        The number of rows.
    """
    x, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    x = np.tile(x / 16.0, (copies, 1)) + generator.normal(0, 0.02, (copies * len(x), x.shape[1]))
    y = np.tile(y, copies)
    order = generator.permutation(len(x))
    x, y = x[order].astype(np.float32), y[order]
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(x)), num_files)):
        part = x[rows].copy()
        part[generator.choice(len(part), num_bad, replace=False), 3] = np.nan
        table = pa.table(
            {
                "id": pa.array(rows, pa.int64()),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1]),
                "label": pa.array(y[rows], pa.int64()),
            }
        )
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    return len(x)


class TwoNodes:
    """A head with one CPU, on which drivers run, and a node with two that may die and come back."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 120 * 2**20},
        )
        self.held: list[int] = []
        self.add_node()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return str(self.cluster.address)

    def add_node(self) -> None:
        """Start the second node."""
        # The bigger object store is what Ray fills first.
        self.node = self.cluster.add_node(num_cpus=_NODE_CPUS, object_store_memory=160 * 2**20)

    def crawl(self, victims: list[int], condition: Callable[[], Any]) -> Any:
        """Return the first true value of `condition`; until then these workers work a few hundredths of the time.

        None once they are gone. Ray itself is not slowed, and comes to do what it does seconds after an epoch.
        """
        while not (found := condition()) and any(_title(pid) for pid in victims):
            for number, seconds in ((signal.SIGSTOP, 0.9), (signal.SIGCONT, 0.05)):
                for pid in victims:
                    _signal(pid, number)
                time.sleep(seconds)
        return found

    def kill_node(self) -> None:
        """Kill the second node's raylet and all its workers, as when a machine goes."""
        raylet = self._raylets()[1]
        for pid in [raylet, *_children(raylet)]:
            _signal(pid, signal.SIGKILL)
        self.cluster.remove_node(self.node, allow_graceful=False)

    def preempt_node(self, seconds: float) -> None:
        """Tell Ray, as a cloud does, that the second node will go, and kill it after so many seconds."""
        from ray import _raylet
        from ray.core.generated import autoscaler_pb2

        # Ray's compiled modules tell type checkers nothing of what is in them.
        compiled: Any = _raylet
        protocol: Any = autoscaler_pb2
        reason = protocol.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = time.time_ns() // 10**6 + int(1000 * seconds)
        accepted, why = compiled.GcsClient(address=self.address).drain_node(self.node.node_id, reason, "", deadline_ms)
        assert accepted, why
        time.sleep(seconds)
        self.kill_node()

    def heal(self) -> None:
        """Let go what is still held, and start the second node again if it is not there."""
        for pid in self.held:
            _signal(pid, signal.SIGCONT)
        self.held.clear()
        if not self.cluster.worker_nodes:
            self.add_node()

    def hold(self, name: str, *, on_second_node: bool = False) -> list[int]:
        """Return the workers whose title begins with `name`, stopped in the middle of what it says, until `heal`.

        Stopped first and looked at again then: between a look and a kill a short task would be over.
        """
        found = []
        for pid in self.workers(name, on_second_node=on_second_node):
            _signal(pid, signal.SIGSTOP)
            if _title(pid).startswith(name):
                found.append(pid)
            else:
                _signal(pid, signal.SIGCONT)
        self.held += found
        return found

    def workers(self, name: str, *, on_second_node: bool = False) -> list[int]:
        """Return the workers whose title begins with `name`."""
        raylets = self._raylets()[on_second_node:]
        return [pid for r in raylets for pid in _children(r) if _title(pid).startswith(name)]

    def shutdown(self) -> None:
        """Stop both nodes."""
        self.cluster.shutdown()

    def _raylets(self) -> list[int]:
        return [n.all_processes["raylet"][0].process.pid for n in self.cluster.list_all_nodes()]


def _children(pid: int) -> list[int]:
    return [int(p.name) for p in os.scandir("/proc") if p.name.isdigit() and _parent(p.name) == pid]


def _parent(pid: str) -> int | None:
    try:
        # The name, in brackets, may hold anything; state and parent come after it.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass
class Place:
    """Where the input lies and runs are written: local folders, or a bucket behind a proxy that may fail."""

    input: str
    output: str
    proxy: Any = None
    """A tests.faulty_s3.FaultyS3."""

    endpoint: str | None = None
    """The server behind the proxy."""

    @property
    def lake(self) -> Lake:
        """The door to it; not through the proxy."""
        return Lake(endpoint_url=self.endpoint)

    def values(self) -> dict[str, Any]:
        """Return the settings that name it."""
        storage = {"storage": {"endpoint_url": self.proxy.url}} if self.proxy is not None else {}
        section = {"path": self.input, "label_column": "label", "image_shape": [8, 8], "on_bad_rows": "quarantine"}
        return {"input": section, "output": self.output, **storage}


class Run:
    """One run folder and the drivers that work on it, one after the other or at once."""

    def __init__(self, place: Place, run_id: str, folder: Path, address: str, **sections: Any) -> None:
        self.place, self.run_id, self.folder = place, run_id, folder
        self.root = f"{place.output}/{run_id}"
        self.commands = 0
        self._address = address
        values = {name: dict(section) for name, section in SETTINGS.items()} | place.values()
        for name, changes in sections.items():
            values[name] = values.get(name, {}) | changes
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / f"{run_id}.yaml"
        self._config.write_text(yaml.safe_dump(values))
        self._drivers: list[Driver] = []

    def start(self) -> "Driver":
        """Give the command in a process of its own."""
        self.commands += 1
        log = self.folder / f"{self.run_id}-{self.commands}.log"
        command = [sys.executable, "-m", "raydc", "run", "--config", str(self._config), "--run-id", self.run_id]
        environment = dict(os.environ) | {"RAY_ADDRESS": self._address, "PYTHONPATH": str(ROOT)}
        environment["PYTHONUNBUFFERED"] = "1"
        with open(log, "w") as handle:
            process = subprocess.Popen(command, env=environment, stdout=handle, stderr=handle, cwd=self.folder)
        self._drivers.append(Driver(process, log))
        return self._drivers[-1]

    def finish(self, driver: "Driver", *, most_commands: int = 3) -> None:
        """Wait for the driver, and give the same command again as long as one ends early.

        Raises:
            AssertionError: the last one failed too.
        """
        while driver.wait() != 0:
            assert self.commands < most_commands, (
                f"{self.commands} commands failed, at last with\n{driver.text()[-3000:]}"
            )
            driver = self.start()

    def end(self) -> None:
        """Kill what is left of the drivers."""
        for driver in self._drivers:
            driver.kill()

    def state(self, stage: str) -> str | None:
        """Return what the stage's marker says now: running, done, or None before the stage has begun."""
        uri = f"{self.root}/stages/{stage}.json"
        if self.place.proxy is None:
            try:
                return str(json.loads(Path(uri).read_bytes())["state"])
            except FileNotFoundError:
                return None
        lake = self.place.lake
        return str(lake.read_json(uri)["state"]) if lake.exists(uri) else None

    def slices_done(self) -> int:
        """Return how many slices assign has completed."""
        return len(self.place.lake.find(f"{self.root}/slices"))


class Driver:
    """A process that runs the job."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self.log = process, log

    def text(self) -> str:
        """Return what it has written so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = _PATIENCE_SECONDS) -> int:
        """Return its exit code.

        Raises:
            TimeoutError: it still runs; the message ends with its log.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end after {seconds:.0f} s:\n{self.text()[-3000:]}") from None

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def until(
    condition: Callable[[], Any],
    driver: Driver,
    what: str,
    seconds: float = _PATIENCE_SECONDS,
    *,
    pause: float = _POLL_SECONDS,
) -> Any:
    """Return the first true value of `condition`.

    Args:
        condition: asked again and again.
        driver: that is to bring it about.
        what: the condition in words, for messages.
        seconds: to wait at most.
        pause: seconds between two questions.

    Raises:
        MissedError: the driver ended before.
        TimeoutError: it never came.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if driver.process.poll() is not None:
            raise MissedError(f"the driver ended (exit code {driver.process.returncode}) before {what}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come in {seconds:.0f} s:\n{driver.text()[-3000:]}")
        time.sleep(pause)
    return found


def reached(run: Run, driver: Driver, stage: str) -> None:
    """Wait until the driver works on a stage: in a phase of fit past an epoch, in assign past some slices."""
    phase = stage.removeprefix("fit ")
    if phase != stage:
        until(lambda: re.search(rf"fit: {phase} +epoch ", driver.text()), driver, f"an epoch of {stage}")
        return

    until(lambda: run.state(stage), driver, f"the start of {stage}")
    if stage == "assign":
        # A listing costs more than what else is asked, and slices take longer.
        until(lambda: run.slices_done() >= 3, driver, "three slices", pause=0.02)


def still_at(run: Run, driver: Driver, stage: str) -> None:
    """Raise MissedError unless the stage (or phase) that was to be hit is not over yet."""
    if stage == "fit pretrain":
        over = "fit: k-means" in driver.text()
    else:
        over = run.state(stage.removesuffix(" refine")) != "running"
    if stage == "assign":
        over = over or run.slices_done() >= NUM_FILES - 2
    if over:
        raise MissedError(f"{stage} was over before the fault")


@contextlib.contextmanager
def broken(path: Path) -> Iterator[None]:
    """Overwrite the data of a Parquet file, not its footer, and put it back at the end."""
    body = path.read_bytes()
    half = len(body) // 2
    # In place: a reader has the file mapped, or is about to open it.
    with open(path, "r+b") as handle:
        handle.write(b"\xff" * half)
    try:
        yield
    finally:
        with open(path, "r+b") as handle:
            handle.write(body)


def prune(run_root: Path, stage: str) -> None:
    """Leave of a finished run what it had when `stage` was about to start."""
    shutil.rmtree(run_root / "lease", ignore_errors=True)
    names = [s.name for s in STAGES]
    for later in STAGES[names.index(stage) :]:
        for written in [*later.writes, f"stages/{later.name}.json"]:
            path = run_root / written
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check(run: Run) -> dict[str, Any]:
    """Return what a finished run holds: rows in, labels, rejects, ids that come twice or not at all, ACC, the labels.

    Raises:
        AssertionError: the manifest is not complete, or a file is not the one that it lists.
    """
    lake, prefix = run.place.lake, run.root + "/"
    manifest = lake.read_json(prefix + "_MANIFEST.json")
    listed = {entry["path"]: entry for entry in manifest["files"]}
    stored = {f.uri.removeprefix(prefix) for f in lake.find(run.root)}
    assert set(listed) <= stored, f"listed, but not there: {sorted(set(listed) - stored)}"
    told = ("labels/", "exemplars.parquet", "metrics.json", "rejects/", "model/", "tree/", "report/")
    unlisted = {p for p in stored - set(listed) if p.startswith(told)}
    assert not unlisted, f"there, but not listed: {sorted(unlisted)}"
    tables: dict[str, list[pa.Table]] = {"labels": [], "rejects": []}
    for path, entry in listed.items():
        body = lake.read_bytes(prefix + path)
        assert hashlib.sha256(body).hexdigest() == entry["sha256"], f"{path} is not the file that the manifest lists"
        folder = path.partition("/")[0]
        if folder in tables:
            tables[folder].append(pq.read_table(pa.BufferReader(body)))
    labels, rejects = (pa.concat_tables(tables[name]) for name in ("labels", "rejects"))
    ids = np.concatenate([labels["id"].to_numpy(), rejects["id"].to_numpy()])
    metrics = lake.read_json(prefix + "metrics.json")
    rows_in = _rows_of_input(run)
    assert metrics["rows"] == {"input": rows_in, "labels": len(labels), "rejects": len(rejects)}, metrics["rows"]
    return {
        "rows_in": rows_in,
        "labels": len(labels),
        "rejects": len(rejects),
        "duplicates": len(ids) - len(np.unique(ids)),
        "lost": rows_in - len(np.unique(ids)),
        "acc": round(metrics["quality"]["leaf"]["acc"], 4),
        "fit": metrics["fit"],
        "table": labels.sort_by("id"),
    }


def _rows_of_input(run: Run) -> int:
    """Return the rows of the input, from the input's own footers."""
    lake, rows = run.place.lake, 0
    for stored in lake.list_parquet(run.place.input):
        with lake.open_parquet(stored.uri) as handle:
            rows += pq.ParquetFile(handle).metadata.num_rows
    return rows
