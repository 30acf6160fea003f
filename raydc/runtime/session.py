"""The Ray cluster of a run, and the board on which its workers post progress for the person who watches.

Ray's own log forwarding prefixes every line and repeats it per worker; a run says one line per fact instead. The board
also keeps the first permanent failure: an error of the data or the settings is the same on the second try, so a worker
group that is restarted after one returns at once.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydc.config import Config
from raydc.errors import StageError
from raydc.runfolder import attempts
from raydc.runfolder.attempts import Attempts, Bound, Ledger, known_attempts
from raydc.storage.lake import Lake, join
from raydc.storage.secrets import masked

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_RAYLET_SECONDS = 2.0
_BOARD_RESTARTS = 10
_READERS = ("iter_threaded", "StreamingExecutor")


@ray.remote(num_cpus=0)
class Board:
    """Lines, lost attempts and the first permanent failure of the workers of one stage."""

    def __init__(self, known: dict[str, Attempts] | None = None) -> None:
        self._lines: list[tuple[int, str]] = []
        self._failure: tuple[str, str] | None = None
        self._ledger = Ledger(known or {}, node_is_gone)

    def post(self, line: str, level: int = logging.INFO) -> None:
        """Add a line."""
        self._lines.append((level, line))

    def take(self) -> list[tuple[int, str]]:
        """Return the lines since the last call, each with the level at which it is logged."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, failure: tuple[str, str]) -> None:
        """Record the kind and text of a failure that another try would meet again."""
        self._failure = self._failure or failure

    def failure(self) -> tuple[str, str] | None:
        """Return the first recorded failure."""
        return self._failure

    def begin(self, piece: str, task: str, worker: str, node: str) -> Attempts:
        """Note that a task is at a piece of work, and return the attempts at it that were lost (see Ledger)."""
        lost, line = self._ledger.begin(piece, task, worker, node)
        if line is not None:
            self.post(line, logging.WARNING)
        return lost

    def leave_out(self, piece: str, line: str) -> bool:
        """Note that the run goes on without a piece; return whether that is new, in which case the line is posted."""
        if fresh := self._ledger.leave_out(piece):
            self.post(line, logging.WARNING)
        return fresh

    def done(self, task: str, worker: str) -> None:
        """Note that a task has ended what it was at."""
        self._ledger.done(task, worker)


@contextmanager
def connected(config: Config) -> Iterator[Callable[[], None]]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine for as long as the block lasts.

    Yields what may be called when nothing in the block needs the cluster any more: it is left, which takes a second,
    beside what follows. A process that is connected already stays as it is.
    """
    if ray.is_initialized():
        _quiet_data()
        yield lambda: None
        return
    address = config.ray.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            _start_local(config)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StageError(f"ray: cannot reach the cluster at {address!r}: {error}") from None
    _quiet_data()
    leaving = threading.Thread(target=_leave)

    def leave() -> None:
        if leaving.ident is None:
            leaving.start()

    try:
        yield leave
    finally:
        if leaving.ident is None:
            _leave()
        else:
            leaving.join()


def _leave() -> None:
    await_readers()
    ray.shutdown()


def await_readers(seconds: float = 30.0) -> None:
    """Wait until the threads in which Ray Data reads ahead and schedules have ended, at most for some seconds.

    One that speaks to Ray after `ray.shutdown` ends the process there and then, with exit code 1, and the error that
    stopped the run would not be told.
    """
    deadline = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name.startswith(_READERS):
            thread.join(max(0.0, deadline - time.monotonic()))


def _start_local(config: Config) -> None:
    # Only this process talks to the cluster, over the loopback interface; a token file in the user's home would
    # change how later clusters of the same user start.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray warns, at the level of errors, about how its own actor pools pass their arguments: nothing that a person who
    # watches could act on. Setting this variable brings the messages back.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Train's controller fetches a report every two seconds by default, and a worker waits for that before its next
    # epoch: most of the time of a small job.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # A process that looks for nodes about to be taken away, of which there are none: it costs a second of a small job's
    # start, and wakes up a hundred times a second beside the training. And gauges for a dashboard that is not there.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Train workers keep their CPUs for the whole fit; Ray Data needs a whole spare one or it waits for ever.
    needed = max(
        config.fit.fewest_workers * config.fit.cpus_per_worker + 1,
        config.merge.cpus_per_cell,
        config.assign.cpus_per_actor,
    )
    ray.init(
        address="local",
        num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, needed),
        object_store_memory=config.ray.object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _quiet_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The training loop may compute for long between two reads; this guard would take that for a stall.
    context.execution_no_progress_timeout_s = -1
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def bounded(
    stage: str, config: Config, lake: Lake, root: str, tell: Callable[[str], None] | None = None
) -> Iterator[Bound]:
    """Yield the bound on the attempts of a stage, with a board as of `watched`, while the block lasts.

    Args:
        stage: its counts go on from those that earlier drivers have kept below `root`.
        config: for ray.max_attempts.
        lake: storage.
        root: URI of the run folder.
        tell: called with each line of the board.
    """
    folder = join(root, attempts.FOLDER, stage)
    with watched(stage, tell, known_attempts(lake, folder)) as board:
        yield Bound(board, config.ray.max_attempts, lake, folder)


@contextmanager
def watched(
    stage: str, tell: Callable[[str], None] | None = None, known: dict[str, Attempts] | None = None
) -> Iterator[Any]:
    """Yield a board whose lines are logged, as `<stage>: <line>`, and told, while the block lasts.

    Args:
        stage: for the log.
        tell: called with each line.
        known: attempts that were lost before.
    """
    # Beside the driver, with which it lives and dies: elsewhere a lost node would take the board along, and every
    # restarted worker asks it. Should its process be killed, it starts again from what was known at first.
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": _BOARD_RESTARTS, "max_task_retries": _BOARD_RESTARTS}
    board = Board.options(scheduling_strategy=beside, **options).remote(known)  # type: ignore[attr-defined]
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


def nodes_with_cpus() -> dict[str, str] | None:
    """Return the label selector that keeps work which books no CPU off nodes that offer none, such as a bare head."""
    bare = [n["NodeID"] for n in ray.nodes() if n["Alive"] and not n["Resources"].get("CPU")]
    return {"ray.io/node-id": f"!in({','.join(bare)})"} if bare else None


def node_is_gone(node: str) -> bool:
    """Return whether a node is lost: the cluster says so, or nothing answers where its raylet listened.

    The cluster takes seconds to miss a node; whoever asks after a death wants to know now.
    """
    found = next((n for n in ray.nodes() if n["NodeID"] == node), None)
    if found is None or not found["Alive"]:
        return True
    try:
        with socket.create_connection((found["NodeManagerAddress"], found["NodeManagerPort"]), _RAYLET_SECONDS):
            return False
    except OSError:
        return True


def root_cause(error: BaseException) -> BaseException:
    """Return the error at the bottom of Ray's wrappers."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        # `controller_failure` is of Train's controller, whose other wrappers are lost on the way from its process.
        inner = getattr(error, "controller_failure", None) or getattr(error, "cause", None) or error.__cause__
        failures = getattr(error, "worker_failures", None)
        if failures:
            inner = next(iter(failures.values()))
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def in_one_line(error: BaseException) -> str:
    """Return the kind and the text of an error as one line without credentials."""
    return masked(f"{type(error).__name__}: {' '.join(str(error).split())}")
