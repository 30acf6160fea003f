"""SIGTERM as an exception in the main thread: a run stops where it is, gives its lease back and says how to go on.

`ray job stop`, Kubernetes and batch systems send SIGTERM and, seconds later, SIGKILL.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raydc.runfolder.lease import Lease

EXIT_STOPPED = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """The process was asked to end; it exits with 143 unless someone catches this."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


@contextmanager
def stoppable(lease: Lease, on_stop: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise Stopped on SIGTERM, and LeaseLost if the lease is lost, out of the block in the main thread.

    `ray.init` installs a handler of its own, so this is entered again after it. In another thread than the main one
    nothing is installed, and the steps of the run look at the lease themselves.

    Args:
        lease: its loss interrupts the block.
        on_stop: called before Stopped is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(signum: int, frame: object) -> None:
        nonlocal asked
        # A second signal while the first is being dealt with must not break off the giving back of the lease.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        asked = True
        # Inside ray.get, only SystemExit and KeyboardInterrupt come through, and as new ones.
        raise SystemExit(EXIT_STOPPED)

    main = threading.get_ident()
    before = signal.getsignal(signal.SIGTERM)
    before_lost = lease.on_lost
    signal.signal(signal.SIGTERM, handle)
    # The main thread may be waiting for workers for hours.
    lease.on_lost = lambda: signal.pthread_kill(main, signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        # Ray's own handler exits with the number of the signal.
        if not asked and error.code != signal.SIGTERM:
            raise
        if lease.lost is not None:
            raise lease.lost from error
        on_stop()
        raise Stopped from error
    finally:
        lease.on_lost = before_lost
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
