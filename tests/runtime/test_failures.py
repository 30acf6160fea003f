"""Which failure of the workers may pass, and which warnings of theirs reach the job's log."""

import logging

import pytest
import ray.exceptions

from raydc.errors import ClusterUnavailable, DataError, StageError, StorageUnavailable
from raydc.runfolder.lease import LeaseLost
from raydc.runtime.failures import error_of
from raydc.runtime.remedies import remedy
from raydc.runtime.worker_log import MOST_WARNINGS, warnings_to


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (ray.exceptions.ActorDiedError(), ClusterUnavailable),
        (ray.exceptions.WorkerCrashedError(), ClusterUnavailable),
        (ray.exceptions.NodeDiedError("gone"), ClusterUnavailable),
        (ray.exceptions.ObjectLostError("00" * 28, None, ""), ClusterUnavailable),
        ("WorkerCrashedError", ClusterUnavailable),
        ("WorkerGroupStartupTimeoutError", ClusterUnavailable),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:2"), ClusterUnavailable),
        (StorageUnavailable("storage: 503"), StorageUnavailable),
        ("StorageUnavailable", StorageUnavailable),
        ("LeaseLost", LeaseLost),
        ("DataError", DataError),
        (ray.exceptions.OutOfMemoryError("killed"), StageError),
        (ray.exceptions.RuntimeEnvSetupError("no package"), StageError),
        (ValueError("the loss is not finite"), StageError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), StageError),
        ("ValueError", StageError),
    ],
)
def test_lost_workers_and_stores_may_pass_and_nothing_else(cause, kind):
    error = error_of(cause, "assign: it failed.")
    assert type(error) is kind
    assert str(error) == "assign: it failed."


def test_workers_that_had_too_little_memory_would_have_it_again():
    lost = ray.exceptions.WorkerCrashedError()
    told = "Task was killed due to the node running low on memory"
    text = f"fit: the workers failed 4 times, at last with {told}.{remedy('fit', told)}"
    assert type(error_of(lost, text)) is StageError


class Board:
    """What a handle of the board looks like to who posts."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.post = self

    def remote(self, line: str, level: int) -> None:
        self.lines.append((line, level))


def test_warnings_of_a_worker_are_posted_once_each_masked_and_bounded(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "wJalrXUtnFEMI")
    log, board = logging.getLogger("raydc.somewhere"), Board()
    log.warning("before")
    with warnings_to(board):
        log.info("a fact")
        log.warning("slow\nstore")
        log.warning("slow store")
        try:
            raise ValueError("wJalrXUtnFEMI is wrong")
        except ValueError:
            log.exception("slice %s", "a")
        assert board.lines == [("slow store", logging.WARNING), ("slice a: ValueError: *** is wrong", logging.ERROR)]
        with warnings_to(board):
            for number in range(1000):
                log.warning("number %d", number)
    log.warning("after")
    assert len(board.lines) == MOST_WARNINGS + 1
    assert board.lines[-1][0] == "a worker has more warnings than are shown here; its own log has all of them"
    assert not logging.getLogger("raydc").handlers


def test_blocks_that_end_in_another_order_leave_nothing_behind():
    first, second = warnings_to(Board()), warnings_to(Board())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.getLogger("raydc").handlers
    second.__exit__(None, None, None)
    assert not logging.getLogger("raydc").handlers
