"""Warnings of a worker reach the log of the job: they are posted to the board, a bounded number of each process.

Ray's own forwarding of logs is off: it repeats every line for each worker.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raydc.storage.secrets import masked

MOST_WARNINGS = 20
"""Warnings of one process that are posted; the log files of the workers have all."""

_LONGEST = 500


class _ToBoard(logging.Handler):
    """Posts each warning once, without waiting."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.board: Any = None
        self.blocks = 0
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        board = self.board
        if board is None or len(self._told) > MOST_WARNINGS:
            return
        line = masked(" ".join(_text(record).split()))[:_LONGEST]
        if line in self._told:
            return
        self._told.add(line)
        if len(self._told) > MOST_WARNINGS:
            line = "a worker has more warnings than are shown here; its own log has all of them"
        board.post.remote(line, record.levelno)


# One for each process: the bound counts over all pieces that it works on.
_HANDLER = _ToBoard()
_LOCK = threading.Lock()


@contextmanager
def warnings_to(board: Any) -> Iterator[None]:
    """Post the warnings of raydc in this process to a board while the block lasts."""
    logger = logging.getLogger("raydc")
    # Blocks need not end in the order in which they began: a reader may be set aside while another one works.
    with _LOCK:
        _HANDLER.blocks += 1
        _HANDLER.board = board
        logger.addHandler(_HANDLER)
    try:
        yield
    finally:
        with _LOCK:
            _HANDLER.blocks -= 1
            if not _HANDLER.blocks:
                _HANDLER.board = None
                logger.removeHandler(_HANDLER)


def _text(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    return f"{record.getMessage()}{f': {type(error).__name__}: {error}' if error is not None else ''}"
