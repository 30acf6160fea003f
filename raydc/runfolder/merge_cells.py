"""The cells of merge, kept in the run folder as they finish: a merge whose driver dies does not do them again."""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from raydc.core.tree.cells import CellMerges, CellState, Runner
from raydc.errors import DataError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.storage.arrays import arrays_of

_HEADERS_BYTES = 4096
_ARRAYS = ("left_P", "right_P", "delta_P")
_COUNTS = ("num_rounds", "num_pairs", "num_searches", "num_exact_searches")


def kept(run: RunDir, run_cells: Runner) -> Runner:
    """Return a runner that runs only cells whose merges are not in the run folder yet, and leaves those of the others.

    A cell's file is named by the fingerprint of its round, so another linkage, eps or set of leaves never finds it. It
    is written where the cell was merged, not when the driver gets to it.
    """

    def runner(step: Callable[..., CellMerges], state: CellState, cells: Sequence[int]) -> Iterable[CellMerges]:
        of_round = fingerprint(step, state)
        for done, merges in enumerate(run_cells(partial(merge_once, step, run, of_round), state, cells), 1):
            run.tell(f"{len(state.weight_M):,} clusters, {done} of {len(cells)} cells")
            yield merges

    return runner


def merge_once(step: Callable[..., CellMerges], run: RunDir, of_round: str, state: CellState, cell: int) -> CellMerges:
    """Return the merges of a cell, from its file if it is there, else by `step`, which also writes the file."""
    file = artifacts.cell_merges(of_round, cell)
    if file.exists(run):
        try:
            return from_bytes(file.read(run), len(state.weight_M))
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{file.uri(run)}: damaged ({type(error).__name__}: {error}). Delete the file; the same command "
                "merges the cell again."
            ) from None
    merges = step(state, cell)
    run.check_owner()
    file.write(run, to_bytes(merges))
    return merges


def fingerprint(step: Callable[..., CellMerges], state: CellState) -> str:
    """Return a 16-digit hash of all that decides the merges of a round: its clusters, its cells and eps."""
    keywords = getattr(step, "keywords", {})
    found = hashlib.sha256(f"{state.kind!r} {keywords.get('eps')!r}".encode())
    for array in (state.center_MD, state.weight_M, state.spread_M, state.leaf_M, state.first_C):
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]


def to_bytes(merges: CellMerges) -> bytes:
    """Return the merges of a cell as npz."""
    buffer = io.BytesIO()
    counts = np.array([getattr(merges, name) for name in _COUNTS], np.int64)
    np.savez_compressed(buffer, counts=counts, **{name: getattr(merges, name) for name in _ARRAYS})
    return buffer.getvalue()


def from_bytes(data: bytes, num_clusters: int) -> CellMerges:
    """Return what `to_bytes` gave.

    Raises:
        LookupError, TypeError or ValueError: it is damaged, or has more merges than a round of so many clusters.
    """
    # Three numbers of eight bytes for each merge, of which a round has fewer than clusters.
    arrays = arrays_of(data, _HEADERS_BYTES + 24 * num_clusters)
    shapes = {arrays[name].shape for name in _ARRAYS}
    if len(shapes) > 1 or arrays[_ARRAYS[0]].ndim != 1:
        raise ValueError(f"arrays of shapes {sorted(shapes)}")
    counts = dict(zip(_COUNTS, arrays["counts"].tolist(), strict=True))
    fields: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    return CellMerges(**fields, **counts)
