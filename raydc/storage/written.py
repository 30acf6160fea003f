"""How many bytes this process has written through the door to the lake; a number for the metrics of a run."""

import threading

_lock = threading.Lock()
_bytes = 0


def add(num_bytes: int) -> None:
    """Count bytes that have been written."""
    global _bytes
    with _lock:
        _bytes += num_bytes


def total() -> int:
    """Return the bytes that this process has written by now."""
    return _bytes
