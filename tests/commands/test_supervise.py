"""Exit codes, and `--retries`: the same run again after what may pass, never after what lasts."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from raydc import cli
from raydc.commands.supervise import LONGEST_PAUSE_SECONDS, may_pass, pause_after, supervised
from raydc.errors import Busy, ClusterUnavailable, ConfigError, DataError, StageError, StorageUnavailable
from raydc.runfolder.lease import LeaseLost


def counting(folder, codes: list[int]) -> list[str]:
    """Return a program that notes its arguments and ends with one code after the other, negative for a signal."""
    (folder / "program.py").write_text(
        f"""
import os, pathlib, sys
seen = pathlib.Path({str(folder)!r}) / "seen"
lines = seen.read_text().splitlines() if seen.exists() else []
seen.write_text(chr(10).join([*lines, " ".join(sys.argv[1:])]))
code = {codes}[len(lines)]
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
    )
    return [sys.executable, str(folder / "program.py")]


@pytest.mark.parametrize(
    ("codes", "retries", "expected", "tries"),
    [
        ([0], 5, 0, 1),
        ([75, 0], 5, 0, 2),
        ([2], 5, 2, 1),
        ([75, 2], 5, 2, 2),
        ([1], 5, 1, 1),
        ([130], 5, 130, 1),
        ([143], 5, 143, 1),
        ([75, 75, 75], 2, 75, 3),
        ([-9, 0], 1, 0, 2),
        ([-9, -9], 1, 137, 2),
        ([75], 0, 75, 1),
    ],
)
def test_what_may_pass_is_tried_again_and_nothing_else(tmp_path, codes, retries, expected, tries):
    program = counting(tmp_path, codes)
    assert supervised(["run", "--run-id", "a"], retries, program=program, pause=lambda _: 0.0) == expected
    assert (tmp_path / "seen").read_text().splitlines() == ["run --run-id a"] * tries


def test_the_pauses_grow_and_end():
    pauses = [pause_after(attempt) for attempt in range(1, 101)]
    assert pauses[:3] == [30, 60, 120] and pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE_SECONDS
    assert [may_pass(code) for code in (0, 1, 2, 75, 130, 143, -9)] == [False, False, False, True, False, False, True]


def test_sigterm_ends_the_pause_between_two_tries(tmp_path):
    program = counting(tmp_path, [75, 0])

    def stop(attempt: int) -> float:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return 60.0

    started = time.monotonic()
    assert supervised(["run"], 5, program=program, pause=stop) == 143
    assert time.monotonic() - started < 30
    assert (tmp_path / "seen").read_text() == "run"


def test_sigterm_reaches_the_process_at_work(tmp_path):
    (tmp_path / "program.py").write_text(
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(120)\n"
    )
    script = (
        "import sys\nfrom raydc.commands.supervise import supervised\n"
        f"sys.exit(supervised([], 5, program=[sys.executable, {str(tmp_path / 'program.py')!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        until = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < until:
            time.sleep(0.05)
        parent.terminate()
        assert parent.wait(60) == 143


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageUnavailable, 75),
        (ClusterUnavailable, 75),
        (LeaseLost, 75),
        (Busy, 75),
        (ConfigError, 2),
        (DataError, 2),
        (StageError, 2),
    ],
)
def test_the_exit_code_tells_what_may_pass_from_what_lasts(monkeypatch, capsys, error, code):
    def fail(options):
        raise error("it is so.")

    monkeypatch.setattr(cli, "add_run_arguments", lambda parser: parser.set_defaults(command=fail))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run"])
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{error.__name__}: it is so.\n"


@pytest.mark.parametrize("number", ["-1", "101", "many"])
def test_the_number_of_retries_is_bounded(capsys, number):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--set", "input.path=x", "--retries", number])
    assert stop.value.code == 2
    assert "--retries" in capsys.readouterr().err


def test_a_supervised_run_without_an_id_keeps_the_one_of_its_first_try(tmp_path, monkeypatch):
    program = counting(tmp_path, [75, 75])
    monkeypatch.setattr(cli, "supervised", partial(supervised, program=program, pause=lambda _: 0.0))
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--set", "input.path=x", "--retries", "1"])
    assert stop.value.code == 75
    first, second = (tmp_path / "seen").read_text().splitlines()
    assert first == second
    assert re.fullmatch(r"run --set input.path=x --retries 1 --retries 0 --run-id \d{8}-\d{6}", first)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "pattern"),
    [
        (Terminal(), r"fit: done\nodd\n"),
        (io.StringIO(), r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO fit: done\n\d{4}-\S+Z WARNING odd\n"),
    ],
)
def test_lines_carry_time_and_level_unless_a_person_watches(stream, pattern):
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        cli.set_up_logging(stream)
        logging.getLogger("raydc.test").info("fit: %s", "done")
        logging.getLogger("raydc.test").warning("odd")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert re.fullmatch(pattern, stream.getvalue())
