"""Whether a row is lost or doubled when something dies: every fault at every stage, for real, on two nodes.

A fault is injected into a job that runs in a process of its own (benchmarks/fault_rig.py), at the stage that is named,
and the job is finished, by the same command again where its driver died. Then the rows are counted: rows in = labels +
rejects, no id twice, every file that the manifest lists is there with its checksum, and the labels are those of a run
that nothing befell. A fault that did not hit (the stage was over) is injected again, not counted. Writes
docs/faults.json and docs/faults.md after every injection.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import faults_page
from benchmarks.fault_rig import (
    ACTOR,
    CELL,
    ROOT,
    TRAINER,
    Driver,
    MissedError,
    Place,
    Run,
    TwoNodes,
    broken,
    check,
    prune,
    reached,
    still_at,
    until,
    write_rows,
)
from benchmarks.record import made
from raydc.runfolder import artifacts

_MOST_ATTEMPTS = 8
_BURST_SECONDS = 2.0
_BOOKED_SECONDS = 22.0
_AS_GOOD = 0.01

# What differs from SETTINGS in the runs that are not like the others.
KINDS: dict[str, dict[str, Any]] = {
    "disk": {},
    "s3": {"fit": {"num_workers": 1}},
    # So many leaves that the merge has dozens of cells; without a network, whose training would say nothing about it.
    "cells": {
        "fit": {"objective": "kmeans", "num_workers": 1},
        "cluster": {"num_leaves": 64},
        "merge": {"levels": [10]},
    },
    # Where fit, which has to be done after it, is not what is looked at.
    "plain": {"fit": {"objective": "kmeans", "num_workers": 1}, "merge": {"method": "exact"}},
}


class Rig:
    """The cluster, the places and the unbroken runs, made when they are first asked for and kept."""

    def __init__(self, folder: Path, kinds: dict[str, dict[str, Any]] = KINDS) -> None:
        """Start the cluster.

        Args:
            folder: for the input, the runs and the logs.
            kinds: what differs from SETTINGS in the runs of each kind.
        """
        self.folder, self._kinds = folder, kinds
        folder.mkdir(parents=True, exist_ok=True)
        before = dict(os.environ)
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        # A node that starts on a busy machine may take its time, and should not start processes that nobody asked for.
        os.environ |= {"RAY_raylet_start_wait_time_s": "180", "RAY_prestart_worker_first_driver": "0"}
        # Ray's workers have the environment of the raylet that starts them.
        os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1", "PYTHONPATH": str(ROOT)}
        self._stack = contextlib.ExitStack()
        self._stack.callback(os.environ.update, before)
        self._stack.callback(os.environ.clear)
        self.nodes = TwoNodes()
        self._stack.callback(self.nodes.shutdown)
        self.input = folder / "input"
        if not self.input.exists():
            write_rows(self.input)
        self._s3: Place | None = None
        self._unbroken: dict[str, tuple[Path, dict[str, Any]]] = {}

    def close(self) -> None:
        """Stop all that was started."""
        self._stack.close()

    def place(self, kind: str) -> Place:
        """Return where the runs of a kind read and write."""
        return self._bucket() if kind == "s3" else Place(str(self.input), str(self.folder / "runs"))

    def run(self, kind: str, run_id: str, **sections: Any) -> Run:
        """Return a run of a kind that has not begun."""
        values = {name: dict(section) for name, section in self._kinds[kind].items()}
        for name, changes in sections.items():
            values[name] = values.get(name, {}) | changes
        return Run(self.place(kind), run_id, self.folder, self.nodes.address, **values)

    def unbroken(self, kind: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder (a local copy) of a run of this kind that nothing befell, and what was found in it."""
        if kind not in self._unbroken:
            # Of this code alone: another may have other settings, and other results.
            run = self.run(kind, f"unbroken-{kind}-{_commit('raydc')}")
            lake, copy = run.place.lake, self.folder / "unbroken" / run.run_id
            if (copy / artifacts.MANIFEST.path).exists():
                lake.upload_folder(copy, run.root)
            else:
                run.finish(run.start(), most_commands=2)
                lake.download_folder(run.root, copy)
            self._unbroken[kind] = copy, check(run)
        return self._unbroken[kind]

    def before(self, kind: str, stage: str, run_id: str, **sections: Any) -> Run:
        """Return a run that has done the stages before `stage`: the files of the unbroken one, under another name."""
        run = self.run(kind, run_id, **sections)
        run.place.lake.remove(run.root)
        first = stage.partition(" ")[0]
        if first not in ("profile", "fit"):
            copy = self.folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.unbroken(kind)[0], copy)
            prune(copy, first)
            run.place.lake.upload_folder(copy, run.root)
        return run

    def _bucket(self) -> Place:
        if self._s3 is None:
            from moto.server import ThreadedMotoServer

            from tests.faulty_s3 import FaultyS3

            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            self._stack.callback(server.stop)
            host, port = server.get_host_and_port()
            endpoint = f"http://{host}:{port}"
            proxy = self._stack.enter_context(FaultyS3(endpoint, seed=1))
            self._s3 = Place("s3://faults/input", "s3://faults/runs", proxy, endpoint)
            fs, _ = self._s3.lake.file_system("s3://faults")
            fs.mkdir("faults")
            self._s3.lake.upload_folder(self.input, self._s3.input)
        return self._s3


Inject = Callable[[Rig, Run, Driver, str], None]


@dataclass(frozen=True, eq=False)
class Case:
    """One fault at one stage."""

    fault: str
    stage: str
    inject: Inject
    kind: str = "disk"
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What `--only` matches."""
        return f"{self.fault}/{self.stage}"


def _kill(rig: Rig, victims: list[int], run: Run, driver: Driver, stage: str) -> None:
    """Kill processes that are held in the middle of the stage, and let the others go on."""
    still_at(run, driver, stage)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    rig.nodes.heal()


def training_worker(how_many: int) -> Inject:
    """Kill one training worker, or both."""

    def inject(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
        reached(run, driver, stage)
        victims = rig.nodes.hold(TRAINER)
        _kill(rig, victims[:how_many], run, driver, stage)
        if len(victims) < how_many:
            raise MissedError(f"{len(victims)} training workers")
        # The group that went on says so.
        until(lambda: driver.text().count(" resident on ") > 1, driver, "the restart of the worker group")

    return inject


def assign_actor(how_often: int) -> Inject:
    """Kill an actor while it labels, and the next ones after some more slices."""

    def inject(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
        reached(run, driver, stage)
        for _ in range(how_often):
            victims = until(lambda: rig.nodes.hold(ACTOR), driver, "an actor")
            enough = run.slices_done() + 3
            _kill(rig, victims[:1], run, driver, stage)
            while run.slices_done() < enough and driver.process.poll() is None:
                time.sleep(0.05)

    return inject


def cell_task(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Kill the process that merges a cell."""
    reached(run, driver, stage)
    victims = until(lambda: rig.nodes.hold(CELL), driver, "a cell")
    _kill(rig, victims[:1], run, driver, stage)


def node(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Kill the second node with all that works on it; another takes its place soon after."""
    names = {"fit pretrain": TRAINER, "fit refine": TRAINER, "merge": CELL, "assign": ACTOR}
    reached(run, driver, stage)
    if stage in names:
        until(lambda: rig.nodes.hold(names[stage], on_second_node=True), driver, f"{names[stage]} on the second node")
    still_at(run, driver, stage)
    try:
        rig.nodes.kill_node()
        if stage in names:
            still_at(run, driver, stage)
        time.sleep(2)
    finally:
        rig.nodes.heal()
    if stage in ("fit pretrain", "fit refine"):
        until(lambda: driver.text().count(" resident on ") > 1, driver, "the restart of the worker group")


def preemption(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Announce that the second node goes, and kill it three seconds later; another takes its place."""
    reached(run, driver, stage)
    still_at(run, driver, stage)
    rig.nodes.preempt_node(3.0)
    still_at(run, driver, stage)
    time.sleep(2)
    rig.nodes.heal()
    if stage != "assign":
        until(lambda: driver.text().count(" resident on ") > 1, driver, "the restart of the worker group")


def driver_dies(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Kill the driver."""
    reached(run, driver, stage)
    driver.kill()
    still_at(run, driver, stage)


def bad_slice(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Break the bytes of input files; the run has to stop with their name, and to go on once they are mended."""
    # In assign before its first slice: the actors take seconds to come up.
    until(lambda: run.state(stage.partition(" ")[0]), driver, f"the start of {stage}")
    files = sorted(rig.input.glob("*.parquet"))[-6:]
    with contextlib.ExitStack() as stack:
        for path in files:
            stack.enter_context(broken(path))
        code = driver.wait()
        if code == 0:
            raise MissedError("all slices were read before")
        name = re.search(r"DataError: .*(part-\d+\.parquet)", driver.text())
        assert code == 2 and name, f"exit code {code}:\n{driver.text()[-2000:]}"


def storage(*kinds: str) -> Inject:
    """Let every request of some seconds fail."""

    def inject(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
        proxy = run.place.proxy
        reached(run, driver, stage)
        before = sum(proxy.faults.values())
        for kind in kinds:
            proxy.burst(kind, seconds=_BURST_SECONDS / len(kinds))
            time.sleep(_BURST_SECONDS / len(kinds))
        try:
            if sum(proxy.faults.values()) == before:
                raise MissedError("no request in these seconds")
        finally:
            proxy.heal()

    return inject


def in_turn(*injects: Inject) -> Inject:
    """Inject one fault after the other into the same run."""

    def inject(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
        for one in injects:
            one(rig, run, driver, stage)

    return inject


def at(stage: str, inject: Inject) -> Inject:
    """Inject a fault at this stage, whichever stage the case names."""
    return lambda rig, run, driver, _: inject(rig, run, driver, stage)


def turned_away(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Give the same command while the first one is at the stage: it has to be turned away.

    The first one crawls meanwhile, a few milliseconds a second, enough for its heartbeat: the second has to read its
    settings and its input before it asks who drives the run, and most stages here would be over by then.
    """
    reached(run, driver, stage)
    driver.signal(signal.SIGSTOP)
    try:
        still_at(run, driver, stage)
        second = run.start()
        while second.process.poll() is None:
            if "lease: waiting" in second.text():
                driver.signal(signal.SIGCONT)
                time.sleep(0.02)
                driver.signal(signal.SIGSTOP)
            time.sleep(0.8)
        if second.process.returncode == 0:
            raise MissedError("the first one was through before the second asked")
        text = second.text()
        assert second.process.returncode == 75 and "which is alive" in text, f"no refusal:\n{text[-2000:]}"
    finally:
        driver.signal(signal.SIGCONT)


def second_submission(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Give the same command while the first one is at the stage; the first one has to live through it."""
    turned_away(rig, run, driver, stage)
    code = driver.wait()
    assert code == 0, f"the first one did not live through it: exit code {code}\n{driver.text()[-2000:]}"


def stopped_driver(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Stop the driver until it is taken for dead, let a second one finish the run, and wake the first one up."""
    reached(run, driver, stage)
    driver.signal(signal.SIGSTOP)
    try:
        still_at(run, driver, stage)
        second = run.start()
        code = second.wait()
        assert code == 0 and "lease: taken over" in second.text(), f"exit code {code}:\n{second.text()[-2000:]}"
    finally:
        driver.signal(signal.SIGCONT)
    code = driver.wait()
    assert code != 0 and "has taken this run over" in driver.text(), f"exit code {code}:\n{driver.text()[-2000:]}"


def elastic(rig: Rig, run: Run, driver: Driver, stage: str) -> None:
    """Take the second node away, wait for the fit to go on with one worker, and give it back."""
    # Told when it is over; the checkpoint of the epoch before is there by then.
    phase = stage.removeprefix("fit ")
    until(lambda: re.search(rf"fit: {phase} +epoch 2/", driver.text()), driver, "the second epoch")
    if "resident on 2 worker" not in driver.text():
        raise MissedError("the fit began with one worker")
    # Train notes a checkpoint seconds after the epoch, and the job, a small one, would be through by then. One of the
    # two workers has to be noted, and one of the lone worker.
    noted = Path(run.root, "checkpoints", "fit", "checkpoint_manager_snapshot.json")
    rig.nodes.crawl(rig.nodes.workers(TRAINER), noted.exists)
    still_at(run, driver, stage)
    rig.nodes.kill_node()
    until(lambda: "resident on 1 worker" in driver.text(), driver, "one worker")
    lone, before = rig.nodes.workers(TRAINER), time.time()
    rig.nodes.crawl(lone, lambda: noted.exists() and noted.stat().st_mtime > before)
    still_at(run, driver, stage)
    # Ray books the CPUs of a new node within 20 s.
    rig.nodes.hold(TRAINER)
    rig.nodes.add_node()
    time.sleep(_BOOKED_SECONDS)
    # Until they are gone, for two others.
    rig.nodes.crawl(lone, lambda: driver.process.poll() is not None)
    rig.nodes.heal()
    until(lambda: driver.text().count("resident on 2 worker") > 1, driver, "two workers again")


_ELASTIC = {"fit": {"num_workers": [1, 2], "resize_seconds": 3}}

CASES = (
    *(Case("training worker SIGKILL", s, training_worker(1)) for s in ("fit pretrain", "fit refine")),
    Case("both training workers SIGKILL", "fit pretrain", training_worker(2)),
    Case("assign actor SIGKILL", "assign", assign_actor(1)),
    Case("assign actor SIGKILL, three times", "assign", assign_actor(3)),
    Case("cell task SIGKILL", "merge", cell_task, "cells"),
    Case("node SIGKILL", "profile", node, "plain"),
    *(Case("node SIGKILL", s, node) for s in ("fit pretrain", "fit refine")),
    Case("node SIGKILL", "merge", node, "cells"),
    *(Case("node SIGKILL", s, node) for s in ("assign", "evaluate", "report", "publish")),
    *(Case("node preempted", s, preemption, sections=_ELASTIC) for s in ("fit pretrain", "fit refine")),
    Case("driver SIGKILL", "profile", driver_dies, "plain"),
    *(Case("driver SIGKILL", s, driver_dies) for s in ("fit pretrain", "fit refine")),
    Case("driver SIGKILL", "merge", driver_dies, "cells"),
    *(Case("driver SIGKILL", s, driver_dies) for s in ("assign", "evaluate", "report", "publish")),
    Case("exception in a slice", "profile", bad_slice, "plain"),
    *(Case("exception in a slice", s, bad_slice) for s in ("fit pretrain", "assign")),
    *(
        Case(fault, s, storage(*kinds), "s3")
        for fault, kinds in (("S3 503 burst", ("slow_down",)), ("S3 connection cut", ("cut", "reset")))
        for s in ("profile", "fit pretrain", "fit refine", "merge", "assign", "evaluate", "report", "publish")
    ),
    Case("second submission", "profile", second_submission, "plain"),
    *(
        Case("second submission", s, second_submission)
        for s in ("fit pretrain", "fit refine", "merge", "assign", "report", "publish")
    ),
    *(Case("driver stopped, taken over, woken", s, stopped_driver) for s in ("assign", "report", "publish")),
    *(Case("elastic 2 -> 1 -> 2", s, elastic, sections=_ELASTIC) for s in ("fit pretrain", "fit refine")),
)


def inject(rig: Rig, case: Case) -> dict[str, Any]:
    """Return the row of one fault that did hit, and of the run that it befell.

    Raises:
        AssertionError: the run could not be finished, or what it left is not whole.
        MissedError: the stage was over before the fault, every time.
    """
    whole = rig.unbroken(case.kind)[1]
    for attempt in range(_MOST_ATTEMPTS):
        rig.nodes.heal()
        run = rig.before(
            case.kind, case.stage, f"{re.sub('[^a-z0-9]+', '-', case.name.lower())}-{attempt}", **case.sections
        )
        started = time.monotonic()
        try:
            driver = run.start()
            case.inject(rig, run, driver, case.stage)
            # A driver that was stopped and taken over has ended, and what it left was finished by the other.
            if run.state("publish") != "done":
                run.finish(driver)
            found = check(run)
            if case.inject is elastic and {(2, 1), (1, 2)} != {
                tuple(r["num_workers"]) for r in found["fit"]["resizes"]
            }:
                raise MissedError(f"resizes: {found['fit']['resizes']}")
            seconds = time.monotonic() - started
            break
        except MissedError as error:
            print(f"{case.name}: not hit, again: {error}", flush=True)
        finally:
            run.end()
    else:
        raise MissedError(f"{case.name}: not hit in {_MOST_ATTEMPTS} attempts")
    run.place.lake.remove(run.root)
    table, expected = found.pop("table"), whole["table"]
    fit = found.pop("fit")
    row = {"fault": case.fault, "stage": case.stage, **found, "labels_equal": bool(table.equals(expected))}
    row |= {
        "acc_unbroken": whole["acc"],
        "seconds": round(seconds, 1),
        "commands": run.commands,
        "attempts": attempt + 1,
    }
    if case.fault.startswith("elastic"):
        row["resizes"] = [r["num_workers"] for r in fit["resizes"]]
    return row


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the cases that have no row."""
    done = {(r["fault"], r["stage"]) for r in rows}
    return [c.name for c in CASES if (c.fault, c.stage) not in done]


def wrong(row: dict[str, Any]) -> list[str]:
    """Return what is not as it must be after a fault."""
    found = []
    if row["labels"] + row["rejects"] != row["rows_in"]:
        found.append("rows in are not labels + rejects")
    if row["duplicates"] or row["lost"]:
        found.append(f"{row['duplicates']} ids twice, {row['lost']} lost")
    resumed_fit = row["stage"] in ("profile", "fit pretrain", "fit refine")
    if not row["labels_equal"] and not resumed_fit:
        found.append("other labels than those of the unbroken run")
    if row["acc"] < row["acc_unbroken"] - _AS_GOOD:
        found.append(f"ACC {row['acc']}, unbroken {row['acc_unbroken']}")
    return found


def main(options: argparse.Namespace) -> None:
    """Inject every fault that is named and not in docs/faults.json yet."""
    patterns = options.only or ["*"]
    book = ROOT / "docs" / "faults.json"
    rows: list[dict[str, Any]] = json.loads(book.read_text()) if book.exists() and not options.afresh else []
    done = {(r["fault"], r["stage"]) for r in rows}
    named = dict.fromkeys(c for p in patterns for c in CASES if fnmatch.fnmatch(c.name, p))
    cases = [c for c in named if (c.fault, c.stage) not in done]
    folder = Path(options.folder or tempfile.mkdtemp(prefix="raydc-faults-"))
    failures = []
    turns = _Turns(options.lock, options.turn_seconds)
    turns.take()
    rig = Rig(folder)
    # As Ctrl-C does: the nodes are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for case in cases:
            turns.take()
            try:
                row = inject(rig, case)
            except (AssertionError, MissedError, TimeoutError) as error:
                failures.append(f"{case.name}: {error}")
                print(f"FAILED {failures[-1]}", flush=True)
                continue
            problems = wrong(row)
            failures += [f"{case.name}: {problem}" for problem in problems]
            print(json.dumps(row) + "".join(f"  WRONG: {p}" for p in problems), flush=True)
            rows.append(row | {"made": made()})
            rows.sort(key=_order)
            book.write_text(json.dumps(rows, indent=1) + "\n")
            (ROOT / "docs" / "faults.md").write_text(faults_page.page(rows, missing(rows)))
    finally:
        rig.close()
    if failures:
        raise SystemExit("\n".join(["faults that were not survived:", *failures]))


class _Turns:
    """Turns on a machine that is shared: an advisory lock, given back between two injections when a turn was long."""

    def __init__(self, path: str | None, seconds: float) -> None:
        self._handle = open(path, "a") if path else None  # noqa: SIM115
        self._seconds, self._since = seconds, -math.inf

    def take(self) -> None:
        """Go on with the turn, or wait for the next one."""
        if self._handle is None or time.monotonic() - self._since < self._seconds:
            return
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        # Long enough for another who waits to get it.
        time.sleep(1)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        self._since = time.monotonic()


def _order(row: dict[str, Any]) -> int:
    names = [(c.fault, c.stage) for c in CASES]
    return names.index((row["fault"], row["stage"])) if (row["fault"], row["stage"]) in names else len(names)


def _commit(folder: str) -> str:
    """Return the last commit that touched a folder."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", folder]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
