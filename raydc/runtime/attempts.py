"""The attempts at a piece of work: how often it took its process along, and when it is left alone.

Ray starts a lost task or actor again without end and without a word. So a slice that takes more memory than there is
would kill one process after the other. An error that is raised is another thing: it is told, and ends the work.

The board of the stage knows which piece each task is at. If the same task begins again in another process, the former
one is dead, and the piece it was at is charged. No other piece is: what another process was at goes on uncharged. A
process that died with its node is counted apart, with a wider bound, because the node says little against the piece.

Counts are kept in the run folder (`attempts/<stage>/<piece>.json`), so a driver that starts again goes on counting.
A file is written after a death alone; a piece that works costs one call to the board and no request to the store.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from raydc.data.slices import Slice
from raydc.errors import DataError, StageError
from raydc.runtime.gauges import Gauges
from raydc.runtime.worker_log import warnings_to
from raydc.storage import written
from raydc.storage.lake import Lake, join

_LOSSES = 4
"""A piece may lose its node this many times as often as it may kill its process."""

_LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Attempts:
    """How the attempts at a piece of work ended that did not end by themselves."""

    deaths: int = 0
    """Processes that died while their node lived on."""

    losses: int = 0
    """Processes that were lost with their node."""

    left_out: bool = False
    """Whether the run goes on without the piece."""

    def beyond(self, most: int) -> int:
        """Return how many attempts were lost since the bound was reached; below zero, the piece may be tried again."""
        return max(self.deaths - most, self.losses - _LOSSES * most)

    def __str__(self) -> str:
        if self.deaths or not self.losses:
            return f"killed its process {_times(self.deaths)}"
        return f"was lost with its node {_times(self.losses)}"


@dataclass(kw_only=True)
class _Work:
    piece: str
    worker: str
    node: str
    seen: float
    """Time of its last sign of progress."""

    actor: Any
    """Handle, if it may be killed when it hangs."""


class Ledger:
    """Which piece each task is at, and the attempts at each piece; lives on the stage's board."""

    def __init__(self, known: dict[str, Attempts], is_gone: Callable[[str], bool]) -> None:
        self._attempts = dict(known)
        self._is_gone = is_gone
        self._work: dict[str, _Work] = {}
        # By the hash of the handle: a handle that is kept would keep its actor from being given back.
        self._task_of: dict[int, str] = {}

    def begin(
        self, piece: str, task: str, worker: str, node: str, *, now: float = 0.0, actor: Any = None
    ) -> tuple[Attempts, str | None]:
        """Note that a task is at a piece.

        Args:
            piece: name of the work.
            task: id that stays the same when Ray runs the task again.
            worker: id of the process.
            node: id of its node.
            now: time of this sign of progress.
            actor: handle of the process, if it may be killed when it hangs.

        Returns:
            The attempts at the piece that were lost, and a line to tell if this call has learned of one.
        """
        line = None
        former = self._work.get(task)
        if former is not None and former.worker != worker:
            line = self._charge(former)
        if actor is not None:
            # An actor that begins something does not hang at what it was at before, in a process that died.
            before = self._task_of.get(hash(actor), task)
            if before != task and before in self._work:
                self._work[before].actor = None
            self._task_of[hash(actor)] = task
        self._work[task] = _Work(piece=piece, worker=worker, node=node, seen=now, actor=actor)
        return self._attempts.get(piece, Attempts()), line

    def done(self, task: str, worker: str) -> None:
        """Note that a task has ended what it was at, well or with an error."""
        work = self._work.get(task)
        if work is not None and work.worker == worker:
            del self._work[task]

    def progressed(self, task: str, now: float) -> None:
        """Note a sign of progress of a task."""
        if task in self._work:
            self._work[task].seen = now

    def hung(self, now: float, stall_seconds: float) -> list[tuple[str, Any]]:
        """Return piece and handle of each actor without progress for as long; each again after as long again."""
        found = [w for w in self._work.values() if w.actor is not None and now - w.seen > stall_seconds]
        for work in found:
            work.seen = now
        return [(work.piece, work.actor) for work in found]

    def leave_out(self, piece: str) -> bool:
        """Note that the run goes on without a piece; return whether that is new."""
        before = self._attempts.get(piece, Attempts())
        self._attempts[piece] = replace(before, left_out=True)
        return not before.left_out

    def _charge(self, work: _Work) -> str:
        before = self._attempts.get(work.piece, Attempts())
        if self._is_gone(work.node):
            after = replace(before, losses=before.losses + 1)
            line = f"{work.piece}: its node was lost ({after.losses} by now)"
        else:
            after = replace(before, deaths=before.deaths + 1)
            line = f"{work.piece}: its process died without a word ({after.deaths} by now)"
        self._attempts[work.piece] = after
        return line


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The bound on the attempts of one stage; goes to whatever works for it."""

    board: Any
    """Handle of the stage's Board."""

    most: int
    """Deaths of its process that a piece may cause."""

    lake: Lake | None = None
    folder: str | None = None
    """URI of the stage's counts; None keeps them in memory, for as long as the stage lasts."""

    stall_seconds: float | None = None
    """An actor without progress for as long is killed, which counts as a death; None waits for ever."""

    gauges: Gauges | None = None
    """Told what a process has written."""

    pause_seconds: float = 0.5
    """Longest pause before the second attempt is twice this; it doubles with each attempt after."""

    @property
    def retries(self) -> int:
        """Return the bound to give to Ray's own retries: out of reach for a process that gets as far as to ask."""
        return (1 + _LOSSES) * self.most + 5

    @contextmanager
    def attempt(self, piece: str, *, task: str | None = None) -> Iterator[Attempts]:
        """Yield the lost attempts at a piece while it is worked on; the caller looks at `beyond` before it begins.

        After a death there is a pause, another one for each piece, so that two pieces that do not fit into memory
        together do not meet each time.

        Args:
            piece: name of the work, unique in the stage.
            task: what stays the same when Ray runs the work again. Default: the id of Ray's task, which an actor's
                retries do not keep.
        """
        context = ray.get_runtime_context()
        task, worker = task or context.get_task_id(), context.get_worker_id()
        actor = None if self.stall_seconds is None else context.current_actor
        lost: Attempts = ray.get(self.board.begin.remote(piece, task, worker, context.get_node_id(), actor))
        try:
            if lost.deaths or lost.losses:
                self.note(piece, lost)
                longest = min(self.pause_seconds * 2**lost.deaths, _LONGEST_PAUSE)
                time.sleep(_share(piece) * longest if lost.beyond(self.most) < 0 else 0.0)
            with warnings_to(self.board):
                yield lost
        finally:
            self.board.done.remote(task, worker)
            if self.gauges is not None:
                self.gauges.set(raydc_written_bytes=written.total())

    def note(self, piece: str, attempts: Attempts) -> None:
        """Keep the count of a piece for the next driver."""
        if self.lake is not None and self.folder is not None:
            self.lake.write_json(join(self.folder, f"{piece}.json"), {"piece": piece, **asdict(attempts)})

    def progress(self, task: str) -> Callable[[], None]:
        """Return what is called after each step of an attempt, so that it is not taken for hung."""
        every = 0.1 * (self.stall_seconds or 0.0)
        told = time.monotonic()

        def tell() -> None:
            nonlocal told
            if self.stall_seconds is not None and time.monotonic() - told > every:
                told = time.monotonic()
                self.board.progressed.remote(task)

        return tell

    def is_left_out(self, part: Slice, lost: Attempts, on_bad_files: str) -> bool:
        """Return whether the run goes on without the rows of a slice, and say so; False if it may be tried.

        Raises:
            DataError: it may not be tried again, under on_bad_files=fail.
        """
        if lost.beyond(self.most) < 0:
            return False
        if on_bad_files == "fail":
            rows = f"rows {part.first_row} to {part.first_row + part.num_rows - 1}"
            raise DataError(
                f"{part.uri} ({rows}) {self.ending(lost)} Look at the file, or give each process more memory; under "
                "a new --run-id, input.on_bad_files=quarantine leaves such a slice out."
            )
        self.leave_out(part.name, lost, f"its {part.num_rows:,} rows are left out")
        return True

    def leave_out(self, piece: str, lost: Attempts, line: str) -> None:
        """Note that the run goes on without a piece, and say so once."""
        if ray.get(self.board.leave_out.remote(piece, f"{piece} {lost}: {line}")):
            self.note(piece, replace(lost, left_out=True))

    def require(self, lost: Attempts, what: str, remedy: str) -> None:
        """Return if work that the run cannot do without may be tried.

        Args:
            lost: attempts at it.
            what: it is, for the message.
            remedy: a sentence: what to do.

        Raises:
            StageError: it may not be tried again.
        """
        if lost.beyond(self.most) >= 0:
            raise StageError(f"{what} {self.ending(lost)} {remedy}")

    def ending(self, lost: Attempts) -> str:
        """Return what a piece did and how it may be tried again, as the end of a sentence that names it."""
        kept = "" if self.folder is None else f", or delete its count below {self.folder}"
        return f"{lost} and is not tried again. To try it again, raise ray.max_attempts={self.most}{kept}."


def known_attempts(lake: Lake, folder: str) -> dict[str, Attempts]:
    """Return the counts that earlier drivers have kept: one for each piece that lost a process."""
    found = {}
    for stored in lake.find(folder):
        body = lake.read_json(stored.uri)
        found[body["piece"]] = Attempts(body["deaths"], body["losses"], body["left_out"])
    return found


def _times(number: int) -> str:
    return f"{number} time{'' if number == 1 else 's'}"


def _share(piece: str) -> float:
    """Return a number from 0 to 1 that differs between pieces."""
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=4).digest()) / 2**32
