"""SIGTERM as an exception in the main thread: a run stops where it is, gives its lease back and says how to go on.

`ray job stop`, Kubernetes and batch systems send SIGTERM and, seconds later, SIGKILL.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raydc.lease import Lease

EXIT_STOPPED = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """The process was asked to end; it exits with 143 unless someone catches this."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


@contextmanager
def stoppable(lease: Lease) -> Iterator[Callable[[], None]]:
    """Raise Stopped in the main thread on SIGTERM, and LeaseLost if the lease is lost, while the block lasts.

    Yields a function that installs the handler again: `ray.init` puts its own in place. In another thread than the main
    one nothing is installed, and the steps of the run look at the lease themselves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(signum: int, frame: object) -> None:
        # A second signal while the first is being dealt with must not break off the giving back of the lease.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if lease.lost is not None:
            raise lease.lost
        raise Stopped

    def install() -> None:
        signal.signal(signal.SIGTERM, handle)

    main = threading.get_ident()
    before = signal.getsignal(signal.SIGTERM)
    install()
    # The main thread may be waiting for workers for hours.
    lease.on_lost = lambda: signal.pthread_kill(main, signal.SIGTERM)
    try:
        yield install
    finally:
        lease.on_lost = None
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
