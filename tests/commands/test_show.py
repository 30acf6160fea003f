"""`raydc show` of a run that is under way, or was left: from its files alone."""

import datetime
import os
from dataclasses import replace

import pytest

from raydc.commands import show
from raydc.runfolder import lease
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake
from tests import shards


@pytest.fixture
def run(tmp_path):
    """A run that has finished profile and is in its fit."""
    run = RunDir(Lake(), str(tmp_path), "r1")
    run.write_header(shards.settings("in"))
    run.mark_done("profile", {}, 1.25, {})
    run.begin("fit", {})
    run.progress.update(stage="fit", started="2026-01-01T00:00:00Z", line="pretrain epoch 3/40  loss 0.5  9 s left")
    return run


def acquire(run):
    return lease.acquire(run.lake, run.root, heartbeat_seconds=5, stale_seconds=60, progress=run.progress)


def change_beat(run, **changes):
    uri = run.uri("lease", "00000001.beat.json")
    run.lake.write_json(uri, run.lake.read_json(uri) | changes)


def test_a_run_under_way_says_who_drives_it_and_what_it_does(run):
    with acquire(run):
        text = "\n".join(show.lines(run))
    assert "run         r1, fit started, not finished" in text
    assert f", pid {os.getpid()}, heartbeat 0 s ago" in text or f"pid {os.getpid()}, heartbeat 1 s ago" in text
    assert "doing       fit since 2026-01-01T00:00:00Z: pretrain epoch 3/40  loss 0.5  9 s left" in text
    assert "left        fit, merge, assign, evaluate, report, publish" in text
    assert "profile 1.2 s, fit running, merge -" in text
    assert "continue" not in text


def test_a_run_that_was_stopped_says_why_and_how_to_continue(run):
    with acquire(run) as found:
        found.release("stopped by SIGTERM")
    text = "\n".join(show.lines(run))
    assert ": stopped by SIGTERM" in text and "let go at 20" in text
    assert "last        fit since 2026-01-01T00:00:00Z: pretrain epoch 3/40" in text
    assert f"continue    raydc resume {run.root}" in text


def test_a_run_whose_driver_was_killed_here_is_seen_at_once(run):
    acquire(run).__enter__().release("x")
    change_beat(run, released=None)
    uri = run.uri("lease", "00000001.json")
    body = run.lake.read_json(uri)
    run.lake.write_json(uri, body | {"owner": vars(replace(lease.Owner(**body["owner"]), started="1"))})
    text = "\n".join(show.lines(run))
    assert ", dead; last heartbeat at 20" in text and f"continue    raydc resume {run.root}" in text


def test_a_driver_of_another_machine_without_a_heartbeat_is_told(run):
    acquire(run).__enter__().release("x")
    change_beat(run, released=None, time="2020-01-01T00:00:00Z")
    text = "\n".join(show.lines(run))
    assert "no heartbeat for" in text and "dead, or cut off" in text and "continue    raydc resume" in text


@pytest.mark.parametrize(("stale_seconds", "alive"), [(20.0, False), (600.0, True)])
def test_a_driver_is_taken_for_dead_by_the_lease_settings_of_its_own_run(run, stale_seconds, alive):
    run.write_header(shards.settings("in", lease={"stale_seconds": stale_seconds}))
    acquire(run).__enter__().release("x")
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=100)
    change_beat(run, released=None, time=then.strftime("%Y-%m-%dT%H:%M:%SZ"))
    # As another machine sees it, which cannot look for the process.
    uri = run.uri("lease", "00000001.json")
    body = run.lake.read_json(uri)
    run.lake.write_json(uri, body | {"owner": body["owner"] | {"process_space": "elsewhere"}})
    text = "\n".join(show.lines(run))
    assert ("heartbeat 10" in text and "dead, or cut off" not in text) == alive
    assert ("continue    raydc resume" in text) != alive


def test_a_run_that_no_one_ever_drove_is_shown_as_well(run):
    text = "\n".join(show.lines(run))
    assert "driver" not in text and f"continue    raydc resume {run.root}" in text
