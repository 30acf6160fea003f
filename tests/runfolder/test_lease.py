"""One writer: races for a lease, take-over from the dead, and a driver that wakes after it was taken for dead."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from raydc.config import parse_config
from raydc.errors import ConfigError, StageError
from raydc.runfolder import lease
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import Lease, LeaseLost, Owner, acquire, holder
from raydc.runfolder.signals import EXIT_STOPPED, Stopped, stoppable
from raydc.storage.lake import Lake

ROOT = Path(__file__).resolve().parents[2]


def take(root, *, lake=None, heartbeat=0.05, stale=0.6, progress=None):
    """Return the lease of a run, with times that suit a test."""
    lake = lake or Lake()
    return acquire(lake, str(root), heartbeat_seconds=heartbeat, stale_seconds=stale, progress=progress)


def on_another_machine(found):
    """Give a lease an owner whose process nobody here can look at; it never writes a sign of life by itself."""
    elsewhere = replace(found.fence.owner, host="elsewhere", process_space="elsewhere", token="theirs")
    uri = f"{found.fence.folder}/{found.fence.generation:08d}.json"
    body = found.fence.lake.read_json(uri)
    found.fence.lake.write_json(uri, body | {"owner": vars(elsewhere)})
    found.fence.owner = elsewhere
    return found


def test_the_first_driver_gets_the_lease_and_gives_it_back(tmp_path):
    with take(tmp_path) as first:
        assert first.fence.generation == 1
        found = holder(Lake(), str(tmp_path))
        assert (found.owner, found.beat.released, found.is_free) == (first.fence.owner, None, False)
        assert found.owner.pid == os.getpid()
    assert holder(Lake(), str(tmp_path)).beat.released == "finished"
    with take(tmp_path, stale=60) as second:
        assert second.fence.generation == 2


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path):
    with take(tmp_path) as first:
        started = time.monotonic()
        with pytest.raises(StageError, match=rf"is driven by .*, pid {os.getpid()}, which is alive. A run has one"):
            take(tmp_path, stale=60)
        # It is refused at the next heartbeat, not after stale_seconds.
        assert time.monotonic() - started < 30
        first.fence.check()
    assert sorted(p.name for p in (tmp_path / "lease").iterdir()) == ["00000001.beat.json", "00000001.json"]


@pytest.mark.parametrize("num", [2, 8])
def test_of_many_at_once_one_wins(tmp_path, num):
    barrier = threading.Barrier(num)

    def attempt(_):
        barrier.wait()
        try:
            return take(tmp_path, stale=30).__enter__()
        except StageError:
            return None

    with ThreadPoolExecutor(num) as pool:
        won = [found for found in pool.map(attempt, range(num)) if found]
    assert len(won) == 1
    won[0].release("finished")


@pytest.mark.s3
def test_of_many_at_once_one_wins_in_s3(bucket):
    barrier, lake = threading.Barrier(6), Lake()

    def attempt(number):
        barrier.wait()
        return lake.create(f"{bucket}/run/lease/1.json", f"caller {number}".encode())

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(attempt, range(6)))
    assert sum(won) == 1
    assert lake.read_bytes(f"{bucket}/run/lease/1.json") == f"caller {won.index(True)}".encode()
    with take(f"{bucket}/run2", lake=lake) as first:
        with pytest.raises(StageError, match="which is alive"):
            take(f"{bucket}/run2", stale=60)
        first.fence.advance("publish")
    with take(f"{bucket}/run2", stale=60) as second:
        assert second.fence.generation == 3


def test_two_that_take_over_from_the_same_dead_driver_cannot_both_win(tmp_path):
    on_another_machine(take(tmp_path))
    barrier = threading.Barrier(4)

    def attempt(_):
        barrier.wait()
        try:
            return take(tmp_path, stale=0.5).__enter__()
        except StageError:
            return None

    with ThreadPoolExecutor(4) as pool:
        won = [found for found in pool.map(attempt, range(4)) if found]
    assert [found.fence.generation for found in won] == [2]
    won[0].release("finished")


def test_a_silent_driver_of_another_machine_is_followed_after_stale_seconds_and_not_before(tmp_path):
    on_another_machine(take(tmp_path))
    started = time.monotonic()
    with take(tmp_path, stale=0.8) as second:
        assert time.monotonic() - started >= 0.8
        assert second.fence.generation == 2


def test_clocks_that_disagree_decide_nothing(tmp_path):
    class YearsBefore(Lake):
        """The driver's clock stands years before ours, in the object and in the file's own time."""

        def write_json(self, uri, value):
            assert "time" in value
            super().write_json(uri, value | {"time": "1999-01-01T00:00:00Z"})
            os.utime(uri, (0, 0))

    with take(tmp_path, lake=YearsBefore()):
        for path in (tmp_path / "lease").iterdir():
            os.utime(path, (0, 0))
        with pytest.raises(StageError, match="which is alive"):
            take(tmp_path, stale=30)


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path):
    code = f"""
        import os
        from raydc.storage.lake import Lake
        from raydc.runfolder.lease import acquire
        acquire(Lake(), {str(tmp_path)!r}, heartbeat_seconds=1, stale_seconds=600).__enter__()
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False)
    assert done.returncode == 9
    started = time.monotonic()
    with take(tmp_path, stale=600) as second:
        assert second.fence.generation == 2
    assert time.monotonic() - started < 60


def test_a_process_is_known_by_more_than_its_number():
    here = Owner.here()
    assert not here.is_dead_here()
    assert replace(here, started="1").is_dead_here()
    # The same number in another container or on another machine says nothing.
    assert not replace(here, started="1", process_space="elsewhere").is_dead_here()
    assert str(here) == f"{socket.gethostname()}, pid {os.getpid()}"


def test_who_was_taken_over_may_not_write_or_publish_any_more(tmp_path):
    run = RunDir(Lake(), str(tmp_path), "r1")
    first = on_another_machine(take(run.root))
    run.fence = first.fence
    run.mark_done("profile", {}, 1.0, {})
    with take(run.root, stale=0.3):
        for write in (
            lambda: run.begin("fit", {}),
            lambda: run.mark_done("fit", {}, 1.0, {}),
            lambda: run.remove("labels"),
            lambda: first.fence.advance("publish"),
        ):
            with pytest.raises(LeaseLost, match=f"pid {os.getpid()} has taken this run over"):
                write()
    assert run.marker("fit") is None and run.marker("profile") is not None


@pytest.mark.parametrize("seed", range(5))
def test_publishing_and_taking_over_at_the_same_moment_exclude_each_other(tmp_path, seed):
    barrier = threading.Barrier(2)
    first = on_another_machine(take(tmp_path))

    def publish():
        barrier.wait()
        time.sleep(0.002 * seed)
        try:
            first.fence.advance("publish")
        except LeaseLost:
            return False
        return True

    def follow():
        barrier.wait()
        return lease._take(Lake(), first.fence.folder, 2, "run", Owner.here())

    with ThreadPoolExecutor(2) as pool:
        outcome = [future.result() for future in (pool.submit(publish), pool.submit(follow))]
    assert sum(outcome) == 1


def test_a_driver_that_publishes_keeps_its_lease_and_its_heartbeat(tmp_path):
    with take(tmp_path) as first:
        first.fence.advance("publish")
        time.sleep(0.3)
        assert first.lost is None
        found = holder(Lake(), str(tmp_path))
        assert (found.generation, found.kind, found.beat.released) == (2, "publish", None)
        with pytest.raises(StageError, match="which is alive"):
            take(tmp_path, stale=60)
    assert holder(Lake(), str(tmp_path)).is_free


def test_the_heartbeat_carries_the_progress(tmp_path):
    run = RunDir(Lake(), str(tmp_path), "r1")
    with take(run.root, progress=run.progress):
        run.tell("epoch 3/10")
        time.sleep(0.3)
        assert holder(Lake(), run.root).beat.progress == {"line": "epoch 3/10"}


def test_a_heartbeat_that_fails_is_tried_again(tmp_path, caplog):
    class Weak(Lake):
        calls = 0

        def write_json(self, uri, value):
            self.calls += 1
            if self.calls in (2, 3):
                raise OSError("no route")
            super().write_json(uri, value)

    with take(tmp_path, lake=Weak()) as first:
        time.sleep(0.5)
        assert first.lost is None
    assert "heartbeat failed, tried again in 0.05 s: no route" in caplog.text
    assert holder(Lake(), str(tmp_path)).beat.released == "finished"


def test_sigterm_gives_the_lease_back_and_exits_with_143(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stop, take(tmp_path) as found, stoppable(found):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert stop.value.code == EXIT_STOPPED == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert holder(Lake(), str(tmp_path)).beat.released.startswith("Stopped")


def test_an_exit_that_lost_its_code_on_the_way_is_known_for_a_stop(tmp_path):
    told = []
    with pytest.raises(Stopped), take(tmp_path) as found, stoppable(found, lambda: told.append(found.lost)):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except SystemExit:
            # As ray.get does.
            raise SystemExit(1) from None
    assert told == [None]
    with pytest.raises(SystemExit) as other, take(tmp_path) as found, stoppable(found):
        sys.exit(3)
    assert other.value.code == 3 and not isinstance(other.value, Stopped)


def test_a_lost_lease_interrupts_the_main_thread(tmp_path):
    with pytest.raises(LeaseLost), take(tmp_path) as first, stoppable(first):
        assert lease._take(Lake(), first.fence.folder, 2, "run", Owner.here())
        time.sleep(10)
    # The other's heartbeat is its own; ours says nothing more.
    assert holder(Lake(), str(tmp_path)).beat is None


DRIVER = """
    import sys, time
    from raydc.storage.lake import Lake
    from raydc.runfolder.lease import acquire
    from raydc.runfolder.folder import RunDir
    from raydc.runfolder.signals import stoppable
    run = RunDir(Lake(), sys.argv[1], "r1")
    lease = acquire(run.lake, run.root, heartbeat_seconds=0.1, stale_seconds=1)
    run.fence = lease.fence
    with lease, stoppable(lease):
        for number in range(10000):
            run.mark_done("fit", {"number": number}, 1.0, {"by": sys.argv[2]})
            print(number, flush=True)
            time.sleep(0.01)
"""


def test_a_stopped_driver_that_wakes_after_the_take_over_writes_nothing_more(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), "first"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        run = RunDir(Lake(), str(tmp_path), "r1")
        with take(run.root, stale=1) as second:
            assert second.fence.generation == 2
            run.fence = second.fence
            run.mark_done("fit", {}, 1.0, {"by": "second"})
            process.send_signal(signal.SIGCONT)
            _, errors = process.communicate(timeout=60)
            assert "LeaseLost" in errors and "has taken this run over" in errors
            assert run.metrics("fit") == {"by": "second"}
            second.fence.advance("publish")


def test_settings_that_would_lose_the_lease_by_one_late_heartbeat_are_refused():
    values = {"input": {"path": "x"}, "lease": {"heartbeat_seconds": 30}}
    with pytest.raises(ConfigError, match=r"lease.stale_seconds=60 must be at least three times lease.heartbeat_sec"):
        parse_config(values)
    parsed = parse_config({"input": {"path": "x"}, "lease": {"heartbeat_seconds": 1}})
    assert "lease" not in parsed.settings("publish")


def test_a_lease_whose_writer_was_killed_in_the_middle_is_followed(tmp_path):
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000001.json").touch()
    with take(tmp_path, stale=0.3) as second:
        assert second.fence.generation == 2


def test_the_lease_may_be_let_go_twice(tmp_path):
    found = take(tmp_path)
    assert isinstance(found, Lease)
    with found:
        found.release("stopped by SIGTERM")
    assert holder(Lake(), str(tmp_path)).beat.released == "stopped by SIGTERM"
