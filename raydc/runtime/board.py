"""The board on which the workers of a stage post progress for the person who watches.

Ray's own log forwarding prefixes every line and repeats it per worker; a run says one line per fact instead. The board
also keeps the first permanent failure: an error of the data or the settings is the same on the second try, so a worker
group that is restarted after one returns at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydc.config import Config
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runtime.attempts import Attempts, Bound, Ledger, known_attempts
from raydc.runtime.gauges import Gauges
from raydc.runtime.session import node_is_gone

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_BOARD_RESTARTS = 10


@ray.remote(num_cpus=0)
class Board:
    """Lines, lost attempts and the first permanent failure of the workers of one stage."""

    def __init__(
        self,
        known: dict[str, Attempts] | None = None,
        stall_seconds: float | None = None,
        gauges: Gauges | None = None,
    ) -> None:
        self._gauges, self._num_lost = gauges, 0
        self._lines: list[tuple[int, str]] = []
        self._failure: tuple[str, str] | None = None
        self._ledger = Ledger(known or {}, node_is_gone)
        self._stall_seconds = stall_seconds

    def post(self, line: str, level: int = logging.INFO) -> None:
        """Add a line."""
        self._lines.append((level, line))

    def take(self) -> list[tuple[int, str]]:
        """Return the lines since the last call, each with the level at which it is logged; kill what hangs."""
        if self._stall_seconds is not None:
            self._kill_hung(self._stall_seconds)
        lines, self._lines = self._lines, []
        return lines

    def fail(self, failure: tuple[str, str]) -> None:
        """Record the kind and text of a failure that another try would meet again."""
        self._failure = self._failure or failure

    def failure(self) -> tuple[str, str] | None:
        """Return the first recorded failure."""
        return self._failure

    def begin(self, piece: str, task: str, worker: str, node: str, actor: Any = None) -> Attempts:
        """Note that a task is at a piece of work, and return the attempts at it that were lost (see Ledger)."""
        lost, line = self._ledger.begin(piece, task, worker, node, now=time.monotonic(), actor=actor)
        if line is not None:
            self.post(line, logging.WARNING)
            self._num_lost += 1
            if self._gauges is not None:
                self._gauges.set(raydc_attempts_lost=self._num_lost)
        return lost

    def progressed(self, task: str) -> None:
        """Note that a task gets on with its piece of work."""
        self._ledger.progressed(task, time.monotonic())

    def _kill_hung(self, stall_seconds: float) -> None:
        for piece, actor in self._ledger.hung(time.monotonic(), stall_seconds):
            self.post(f"{piece}: no progress for {stall_seconds:g} s; its process is replaced", logging.WARNING)
            ray.kill(actor, no_restart=False)

    def leave_out(self, piece: str, line: str) -> bool:
        """Note that the run goes on without a piece; return whether that is new, in which case the line is posted."""
        if fresh := self._ledger.leave_out(piece):
            self.post(line, logging.WARNING)
        return fresh

    def done(self, task: str, worker: str) -> None:
        """Note that a task has ended what it was at."""
        self._ledger.done(task, worker)


@contextmanager
def bounded(
    stage: str,
    config: Config,
    place: Place,
    tell: Callable[[str], None] | None = None,
    *,
    stall_seconds: float | None = None,
) -> Iterator[Bound]:
    """Yield the bound on the attempts of a stage, with a board as of `watched`, while the block lasts.

    Args:
        stage: its counts go on from those that earlier drivers have kept.
        config: for ray.max_attempts.
        place: the run folder.
        tell: called with each line of the board.
        stall_seconds: an actor that is at a piece without progress for as long is killed.
    """
    folder = artifacts.attempts(stage).uri(place)
    gauges = Gauges(place.root.rstrip("/").rpartition("/")[2], stage)
    with watched(stage, tell, known_attempts(place.lake, folder), stall_seconds, gauges) as board:
        yield Bound(
            board=board,
            most=config.ray.max_attempts,
            lake=place.lake,
            folder=folder,
            stall_seconds=stall_seconds,
            gauges=gauges,
        )


@contextmanager
def watched(
    stage: str,
    tell: Callable[[str], None] | None = None,
    known: dict[str, Attempts] | None = None,
    stall_seconds: float | None = None,
    gauges: Gauges | None = None,
) -> Iterator[Any]:
    """Yield a board whose lines are logged, as `<stage>: <line>`, and told, while the block lasts.

    Args:
        stage: for the log.
        tell: called with each line.
        known: attempts that were lost before.
        stall_seconds: see `bounded`.
        gauges: told of lost attempts.
    """
    # Beside the driver, with which it lives and dies: elsewhere a lost node would take the board along, and every
    # restarted worker asks it. Should its process be killed, it starts again from what was known at first.
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": _BOARD_RESTARTS, "max_task_retries": _BOARD_RESTARTS}
    board = Board.options(scheduling_strategy=beside, **options).remote(known, stall_seconds, gauges)  # type: ignore[attr-defined]
    stop = threading.Event()

    def drain() -> None:
        try:
            for level, line in ray.get(board.take.remote(), timeout=30):
                log.log(level, "%s: %s", stage, line)
                if tell is not None:
                    tell(line)
        except (ray.exceptions.RayError, TimeoutError):
            # A lost board costs progress lines, never the run.
            return

    def follow() -> None:
        while not stop.wait(_POLL_SECONDS):
            drain()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        drain()
        ray.kill(board)
