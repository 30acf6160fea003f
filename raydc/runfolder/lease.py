"""One writer: the lease of a run folder, and the fence that keeps a driver that lost it from writing.

A lease is a row of objects `lease/<n>.json`, each created if absent and never changed or removed. Who creates the next
number drives the run, so of two that try at once one wins (`Lake.create`). The driver's sign of life is
`lease/<n>.beat.json`, a counter and its progress, rewritten every few seconds by a thread.

**No clock is compared with another.** A contender watches the counter: if it moves, the driver lives and the
contender is refused; if it stands still for `stale_seconds` of the contender's own monotonic clock, the driver is taken
for dead. Machines may disagree about the time by hours, and a slow heartbeat is in time if it comes within
`stale_seconds`. A driver of the same machine whose process is gone is dead at once, and a released lease is free.

**A driver that is not dead but was taken for dead** (stopped, cut off from storage) finds the next number taken when it
wakes: its heartbeat thread interrupts it, and every durable step looks first (`Fence.check`). A look and a write are
two steps, and a process may be stopped between them. Before the manifest that is harmless: what a stage writes is
decided by its settings, the writes are whole, and no reader trusts them yet. The right to publish is taken in one step:
a driver publishes under a number of its own, created like any other (`Fence.advance`). Either it gets the number after
its lease, and no one took the run over; or another has that number, and it never publishes.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from raydc.errors import Busy, StageError, TryAgain
from raydc.runfolder import artifacts
from raydc.storage.lake import Lake, join

log = logging.getLogger(__name__)

FOLDER = artifacts.LEASE.path

# Whole files, and the temporary ones that `Lake` writes beside them.
_LEASE_FILE = re.compile(r"\d{8,}(\.beat)?\.json|\.\d{8,}(\.beat)?\.json\.\d+\.[0-9a-f]{8}\.tmp")


class LeaseLost(TryAgain):
    """Another driver has taken the run over; this one must not write any more."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A driver process, and how to tell on its own machine whether it still lives."""

    host: str
    pid: int
    started: str
    """Start of the process in clock ticks since boot: a pid alone may have been given to another process."""

    process_space: str
    """Boot and pid namespace; pids mean something only to processes that share both. Empty where Linux is not."""

    token: str
    """Random; tells two leases of one process apart."""

    @classmethod
    def here(cls) -> "Owner":
        """Return this process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            started=_process_start(pid) or "",
            process_space=_process_space(),
            token=os.urandom(8).hex(),
        )

    def is_dead_here(self) -> bool:
        """Return whether this is a process of this machine that has ended; False where that cannot be told."""
        here = _process_space()
        return bool(here) and self.process_space == here and _process_start(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a driver."""

    count: int
    time: str
    """UTC by the driver's clock; for people, decides nothing."""

    released: str | None = None
    """Why the lease was given back; None while it is held."""

    progress: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Holder:
    """The newest lease of a run: its number, its driver and the driver's last heartbeat."""

    generation: int
    kind: str
    owner: Owner
    beat: Beat | None

    @property
    def is_free(self) -> bool:
        """Return whether the run may be taken without waiting."""
        return (self.beat is not None and self.beat.released is not None) or self.owner.is_dead_here()


@dataclass
class Fence:
    """The number under which a process may write to a run; travels to workers, which look at it too."""

    lake: Lake
    folder: str
    """URI of the lease folder."""

    generation: int
    owner: Owner

    def check(self) -> None:
        """Return if no other driver has taken the run over.

        Raises:
            LeaseLost: one has.
        """
        later = self.generation + 1
        while (body := _read(self.lake, _generation_uri(self.folder, later))) is not None:
            if (other := _owner(body)).token != self.owner.token:
                raise _lost(other)
            later += 1

    def advance(self, kind: str) -> None:
        """Take the next number, in one step that fails if another driver took the run over.

        Raises:
            LeaseLost: one did.
        """
        self.check()
        if not _take(self.lake, self.folder, self.generation + 1, kind, self.owner):
            self.check()
        self.generation += 1


class Looks:
    """A check that looks no more often than every so many seconds; travels to workers, where each begins with a look.

    Thousands of workers that look before each slice would ask the store for one key as often as it answers at all.
    """

    def __init__(self, check: Callable[[], None], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._check, self._seconds, self._clock = check, seconds, clock
        self._last: float | None = None

    def __call__(self) -> None:
        """Check, if the last look is long enough ago."""
        now = self._clock()
        if self._last is None or now - self._last >= self._seconds:
            self._check()
            self._last = now


class Lease:
    """The lease that this process holds, with its heartbeat; a context manager that gives it back."""

    def __init__(self, fence: Fence, *, heartbeat_seconds: float, progress: dict[str, str]) -> None:
        self.fence = fence
        self.progress = progress
        """Written with every heartbeat; filled by others."""

        self.lost: LeaseLost | None = None
        self.on_lost: Callable[[], None] | None = None
        """Called by the heartbeat thread, once, when another driver has taken the run over."""

        self._seconds = heartbeat_seconds
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raydc-lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._beat(None)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release("finished" if error is None else f"{type(error).__name__}: {error}"[:500])

    def release(self, reason: str) -> None:
        """Stop the heartbeat and give the lease back, once; a lost lease is only let go."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self._seconds + 1)
        if self.lost is None:
            try:
                self._beat(reason)
            except (OSError, StageError) as error:
                log.warning("lease: could not be given back (%s); it expires by itself", error)

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.fence.check()
                self._beat(None)
            except LeaseLost as error:
                self.lost = error
                log.error("%s", error)
                if self.on_lost is not None:
                    self.on_lost()
                return
            except Exception as error:
                log.warning("lease: heartbeat failed, tried again in %g s: %s", self._seconds, error)

    def _beat(self, released: str | None) -> None:
        self._count += 1
        beat = Beat(self._count, _utc(), released, dict(self.progress))
        self.fence.lake.write_json(_beat_uri(self.fence.folder, self.fence.generation), asdict(beat))


def acquire(
    lake: Lake, root: str, *, heartbeat_seconds: float, stale_seconds: float, progress: dict[str, str] | None = None
) -> Lease:
    """Return the lease of a run folder, not yet beating: enter it as a context.

    Args:
        lake: storage.
        root: URI of the run folder.
        heartbeat_seconds: between two signs of life.
        stale_seconds: a driver without a sign of life for as long is taken for dead.
        progress: goes with every heartbeat.

    Raises:
        Busy: another driver lives.
    """
    folder, owner = join(root, FOLDER), Owner.here()
    while True:
        last = holder(lake, root)
        if last is not None:
            _wait_until_free(lake, root, last, stale_seconds)
        generation = 1 if last is None else last.generation + 1
        if _take(lake, folder, generation, "run", owner):
            break
        time.sleep(0.1)
    if last is not None and (last.beat is None or last.beat.released is None):
        log.warning("lease: taken over from %s, which is gone", last.owner)
    fence = Fence(lake, folder, generation, owner)
    return Lease(fence, heartbeat_seconds=heartbeat_seconds, progress={} if progress is None else progress)


def is_lease_file(name: str) -> bool:
    """Return whether a name in the lease folder is one that a driver gave, or left when it was killed."""
    return _LEASE_FILE.fullmatch(name) is not None


def holder(lake: Lake, root: str) -> Holder | None:
    """Return who drives a run, or drove it last; None if no one has yet."""
    folder = join(root, FOLDER)
    names = [f.uri.rpartition("/")[2].removesuffix(".json") for f in lake.find(folder)]
    numbers = sorted(int(name) for name in names if name.isdigit())
    if not numbers:
        return None
    body = _read(lake, _generation_uri(folder, numbers[-1]))
    if body is None:
        return None
    beat = _read(lake, _beat_uri(folder, numbers[-1]))
    return Holder(numbers[-1], body.get("kind", "run"), _owner(body), Beat(**beat) if beat else None)


def _wait_until_free(lake: Lake, root: str, last: Holder, stale_seconds: float) -> None:
    """Return when `last` has let go, is dead, or was itself followed.

    Raises:
        Busy: it gives a sign of life.
    """
    if last.is_free:
        return
    first = None if last.beat is None else last.beat.count
    log.info("lease: waiting up to %g s for a sign of life of %s", stale_seconds, last.owner)
    until = time.monotonic() + stale_seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, stale_seconds / 20))
        now = holder(lake, root)
        if now is None or now.is_free:
            return
        alive = now.generation != last.generation or (now.beat is not None and now.beat.count != first)
        if alive:
            raise Busy(
                f"run: {root} is driven by {now.owner}, which is alive. A run has one driver: wait until it ends, or "
                f"stop it. Once it is dead, the same command takes over, {stale_seconds:g} s after its last heartbeat."
            )


def _take(lake: Lake, folder: str, generation: int, kind: str, owner: Owner) -> bool:
    body = {"generation": generation, "kind": kind, "created": _utc(), "owner": asdict(owner)}
    return lake.create(_generation_uri(folder, generation), (json.dumps(body, indent=1) + "\n").encode())


def _lost(owner: Owner) -> LeaseLost:
    return LeaseLost(
        f"run: {owner} has taken this run over, because this driver gave no sign of life for too long. It goes on "
        "there; nothing more is written from here."
    )


def _read(lake: Lake, uri: str) -> dict[str, Any] | None:
    """Return an object, None if it is not there, nothing in it if its writer was killed on a disk without links."""
    try:
        return json.loads(lake.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _owner(body: dict[str, Any]) -> Owner:
    if "owner" in body:
        return Owner(**body["owner"])
    return Owner(host="an unknown host", pid=0, started="", process_space="", token="")


def _generation_uri(folder: str, generation: int) -> str:
    return join(folder, f"{generation:08d}.json")


def _beat_uri(folder: str, generation: int) -> str:
    return join(folder, f"{generation:08d}.beat.json")


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _process_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Return when a process of this machine started, None if it has ended."""
    try:
        # The name, in brackets, may hold anything; the fields after it are counted from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
