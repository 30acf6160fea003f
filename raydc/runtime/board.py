"""The board on which the workers of a stage post progress for the person who watches.

Ray's own log forwarding prefixes every line and repeats it per worker; a run says one line per fact instead. The board
also keeps the first permanent failure: an error of the data or the settings is the same on the second try, so a worker
group that is restarted after one returns at once.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@ray.remote(num_cpus=0)
class Board:
    """Lines and the first permanent failure of the workers of one stage."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: tuple[str, str] | None = None

    def post(self, line: str) -> None:
        """Add a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """Return the lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, failure: tuple[str, str]) -> None:
        """Record the kind and text of a failure that another try would meet again."""
        self._failure = self._failure or failure

    def failure(self) -> tuple[str, str] | None:
        """Return the first recorded failure."""
        return self._failure


@contextmanager
def watched(stage: str, tell: Callable[[str], None] | None = None) -> Iterator[Any]:
    """Yield a board whose lines are logged, as `<stage>: <line>`, and told, while the block lasts."""
    # Beside the driver, with which it lives and dies: elsewhere a lost node would take the board along, and every
    # restarted worker asks it.
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=beside).remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def drain() -> None:
        try:
            for line in ray.get(board.take.remote(), timeout=30):
                log.info("%s: %s", stage, line)
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
