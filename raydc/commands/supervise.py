"""`--retries`: the same command again after a failure that may pass, a bounded number of times.

The run itself works in a process of its own, so a driver that is killed, for want of memory say, is started again too.
A finished stage is skipped and a started one continues, so nothing is done twice.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import raydc

log = logging.getLogger(__name__)

EXIT_TRY_AGAIN = os.EX_TEMPFAIL
"""75: the same command may succeed later."""

FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 600.0


def may_pass(code: int) -> bool:
    """Return whether a process that ended so is to be started again: it said so, or something killed it."""
    return code == EXIT_TRY_AGAIN or code < 0


def pause_after(attempt: int) -> float:
    """Return the seconds to wait after the given failed attempt, the first being 1."""
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))


def supervised(
    arguments: Sequence[str],
    retries: int,
    *,
    program: Sequence[str] = (sys.executable, "-m", "raydc"),
    pause: Callable[[int], float] = pause_after,
) -> int:
    """Return the exit code of `raydc` with these arguments, after up to `retries` more tries.

    SIGTERM is handed on to the process at work and ends the tries. So does Ctrl-C, which a terminal sends to both.

    Args:
        arguments: with a fixed run id.
        retries: most tries after the first.
        program: what takes the arguments.
        pause: seconds to wait after the given failed attempt.
    """
    # With `-m` the package must be found where it is now, whatever the folder.
    found = os.pathsep.join(p for p in (str(Path(raydc.__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {"PYTHONPATH": found}
    command = [*program, *arguments]
    with _Signals() as signals:
        for attempt in range(1, retries + 2):
            code = signals.run(command, environment)
            if not may_pass(code) or signals.stopped or attempt > retries:
                break
            seconds = pause(attempt)
            log.warning(
                "attempt %d of %d ended with exit code %d, which may pass; the same run goes on in %g s",
                attempt,
                retries + 1,
                _exit_code(code),
                seconds,
            )
            if signals.wait(seconds):
                return _exit_code(-signals.stopped)
    return _exit_code(code)


class _Signals:
    """Runs processes, and hands on to them what ends this one."""

    def __init__(self) -> None:
        self.stopped = 0
        """The signal that asked to end; 0 for none."""

        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Return the exit code of a command, negative for the signal that killed it."""
        self._process = subprocess.Popen(command, env=environment)
        if self.stopped:
            self._process.send_signal(self.stopped)
        return self._process.wait()

    def wait(self, seconds: float) -> bool:
        """Wait; return whether a signal ended that."""
        until = time.monotonic() + seconds
        while not self.stopped and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
        return bool(self.stopped)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopped = number
        if number == signal.SIGTERM and self._process is not None:
            self._process.send_signal(number)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code
