"""The sum of what labeling has counted, made from the files of the slices: up a tree of tasks where they are many.

Actors that label hand no statistics over. A slice's file says that it is complete, and is all that counts: each is read
once here, however often an actor died or a slice was done. So the driver's part does not grow with the slices.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import ray

from raydc.data.slices import Slice
from raydc.data.statistics import Statistics, summed
from raydc.errors import DataError, StageError
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runtime.session import in_one_line, root_cause

_Item = TypeVar("_Item")

FEW = 64
"""Slices that the driver sums itself: a task costs more to start."""

_SLICES_OF_A_TASK = 250
_FAN_IN = 16
_READERS = 8
_RETRIES = 5


def sum_of_slices(place: Place, parts: Sequence[Slice], num_exemplars: int) -> Statistics:
    """Return the sum of the statistics of complete slices; the same, bit for bit, whenever and wherever it is made.

    Args:
        place: the folder whose slices they are.
        parts: the slices, in order.
        num_exemplars: nearest rows kept for each leaf.

    Raises:
        DataError: a file is damaged.
        StageError: a file is missing, or a task failed for good.
    """
    if len(parts) <= FEW:
        return sum_of_files(place, parts, num_exemplars)
    here = Place(place.lake, place.root)
    try:
        sums = [_of_files.remote(here, group, num_exemplars) for group in _groups(parts, _SLICES_OF_A_TASK)]
        while len(sums) > _FAN_IN:
            sums = [_of_sums.remote(num_exemplars, *group) for group in _groups(sums, _FAN_IN)]
        return summed((ray.get(one) for one in sums), num_exemplars)
    except ray.exceptions.RayError as error:
        cause = root_cause(error)
        if isinstance(cause, DataError | StageError):
            raise cause from None
        raise StageError(
            f"assign: the sum of the statistics failed with {in_one_line(cause)}. The labels are kept; the same "
            "command continues."
        ) from error


def sum_of_files(place: Place, parts: Sequence[Slice], num_exemplars: int) -> Statistics:
    """Return the sum of the statistics of complete slices, read and summed in this process.

    Raises:
        DataError: a file is damaged.
        StageError: a file is missing.
    """
    return summed((_parsed(part, body) for part, body in _bodies(place, parts)), num_exemplars)


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _of_files(place: Place, parts: Sequence[Slice], num_exemplars: int) -> Statistics:
    return sum_of_files(place, parts, num_exemplars)


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _of_sums(num_exemplars: int, *sums: Statistics) -> Statistics:
    return summed(sums, num_exemplars)


def _bodies(place: Place, parts: Sequence[Slice]) -> Iterator[tuple[Slice, bytes]]:
    """Yield the files of the slices in order; some are read ahead, and no more than those are in memory."""
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[tuple[Slice, Future[bytes]]] = deque()
        for part in parts:
            ahead.append((part, pool.submit(_body, place, part)))
            if len(ahead) > _READERS:
                first, body = ahead.popleft()
                yield first, body.result()
        for first, body in ahead:
            yield first, body.result()


def _body(place: Place, part: Slice) -> bytes:
    file = artifacts.SLICES.of(part)
    try:
        return file.read(place)
    except FileNotFoundError:
        raise StageError(
            f"assign: {file.uri(place)} was removed while the run went on. Run the job again: that slice is done again."
        ) from None


def _parsed(part: Slice, body: bytes) -> Statistics:
    try:
        return Statistics.from_bytes(body)
    except DataError as error:
        raise DataError(f"assign: slice {part.name}: {error}") from None


def _groups(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
