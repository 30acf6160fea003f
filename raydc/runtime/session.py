"""The Ray cluster of a run: joining or starting it, leaving it, and what its errors say."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from raydc.config import Config
from raydc.errors import ClusterUnavailable, StageError
from raydc.runtime.environment import LOCAL_CLUSTER
from raydc.storage.secrets import masked

_RAYLET_SECONDS = 2.0
_READERS = ("iter_threaded", "StreamingExecutor")


@contextmanager
def connected(config: Config) -> Iterator[Callable[[], None]]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine for as long as the block lasts.

    Yields a function that leaves the cluster early, in the background. Call it when nothing in the block needs the
    cluster any more: leaving takes a second. A process that is connected already stays connected.
    """
    if ray.is_initialized():
        _quiet_data()
        yield lambda: None
        return
    address = _address(config)
    try:
        if address == "local":
            _start_local(config)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        # A head that is down may come back; an address that is none will not.
        kind = ClusterUnavailable if isinstance(error, ConnectionError) else StageError
        raise kind(
            f"ray: cannot reach the cluster at {address!r}: {masked(str(error))}. Check that it runs and can be "
            "reached from here, or set ray.address=local for one on this machine."
        ) from None
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


def can_grow(config: Config) -> bool:
    """Return whether nodes may join while a run works: it has joined a cluster, which may have an autoscaler.

    Whether there is one, and how far it goes, Ray does not tell; a cluster of this process alone never grows.
    """
    return _address(config) != "local"


def _address(config: Config) -> str:
    address = config.ray.address
    return os.environ.get("RAY_ADDRESS") or "local" if address == "auto" else address


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
    for name, value in LOCAL_CLUSTER.items():
        os.environ.setdefault(name, value)
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
