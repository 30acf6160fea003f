"""Many small leaves of a sample, by k-means in two levels: cells first, then leaves inside each cell.

Letters: N rows, K leaves, M fine leaves, C cells, D width of a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydc.core.search.kmeans import LeafSums, faiss_kmeans
from raydc.core.search.nearest import nearest
from raydc.core.tree.search import in_threads

import faiss  # isort: skip

_ITERATIONS = 8
"""Both levels make as many. More of them move the fine leaves' means little, and their tree not at all."""

_ROWS_PER_CELL = 256
"""Rows of the sample from which the cells are made; all rows of the sample then go to their cell."""

_BLOCK_ROWS = 16384

MOST_PER_LEAF = 8
"""Fine leaves for each leaf. 4 were enough for separated clusters at 64 dimensions, 8 at 768."""

_ROWS_PER_FINE_LEAF, _FEWEST_ROWS_PER_FINE_LEAF = 10, 4
"""A mean of ten rows has a tenth of a row's noise. Two fine leaves for each leaf may have as few as four."""


@dataclass(frozen=True)
class FineLeaves:
    """Means and weights of disjoint groups of rows; every group has weight."""

    means_MD: Tensor
    """(M, D) float64."""

    weights_M: Tensor
    """(M,) float64, positive."""


def num_fine_leaves(num_rows: int, num_leaves: int) -> int:
    """Return how many fine leaves a sample of this size can give: up to eight for each leaf.

    With fewer than twice as many as leaves a tree above them decides nothing; then the answer is 0.
    """
    most = min(MOST_PER_LEAF * num_leaves, num_rows // _ROWS_PER_FINE_LEAF)
    if most < 2 * num_leaves:
        most = 2 * num_leaves if num_rows >= 2 * num_leaves * _FEWEST_ROWS_PER_FINE_LEAF else 0
    return most


def fine_leaves(
    sample_ND: Tensor, num_fine: int, *, seed: int, weights_N: Tensor | None = None, num_threads: int = 1
) -> FineLeaves:
    """Return about `num_fine` small leaves of a sample, the same for any number of threads.

    C = sqrt(M) cells are made first, and each is then divided alone: a pass costs N (C + M / C) D instead of N M D.
    A cell gets leaves in proportion to its weight, at most one for each of its rows.

    Args:
        sample_ND: (N, D) float32 on the CPU; rows of weight 0 are left out.
        num_fine: M, at most N.
        seed: of the cells and of the leaves in them.
        weights_N: (N,) float32 row weights; None for 1 each.
        num_threads: cells that are divided at a time.

    Raises:
        ValueError: no row has weight.
    """
    if weights_N is None:
        weights_N = torch.ones(len(sample_ND))
    elif bool((weights_N == 0).any()):
        sample_ND, weights_N = sample_ND[weights_N > 0], weights_N[weights_N > 0]
    if not len(sample_ND):
        raise ValueError("the sample for the fine leaves has no row with weight")
    centers_CD = _cells(sample_ND, weights_N, max(1, round(num_fine**0.5)), seed)
    cell_N = torch.cat([nearest(block, centers_CD)[0][:, 0] for block in sample_ND.split(_BLOCK_ROWS)])
    rows_of_cell = cell_N.argsort(stable=True).split(torch.bincount(cell_N, minlength=len(centers_CD)).tolist())
    share_C = torch.zeros(len(centers_CD), dtype=torch.float64).index_add_(0, cell_N, weights_N.double())
    quota_C = (share_C * (num_fine / float(share_C.sum()))).round().clamp_min(1).long().tolist()
    found: list[LeafSums | None] = [None] * len(centers_CD)

    def divide(cell: int) -> None:
        rows = rows_of_cell[cell]
        with _faiss_alone():
            found[cell] = _divided(sample_ND[rows], weights_N[rows], centers_CD[cell], quota_C[cell], seed + 1 + cell)

    in_threads(divide, (cell for cell, rows in enumerate(rows_of_cell) if len(rows)), max(1, num_threads))
    parts = [sums for sums in found if sums is not None]
    weights_M = torch.cat([sums.weights_K for sums in parts])
    sums_MD = torch.cat([sums.sums_KD for sums in parts])
    used = weights_M > 0
    return FineLeaves(sums_MD[used] / weights_M[used, None], weights_M[used])


def _cells(sample_ND: Tensor, weights_N: Tensor, num_cells: int, seed: int) -> Tensor:
    """Return the (C, D) centers of the cells, from evenly spread rows of the sample."""
    size = min(len(sample_ND), _ROWS_PER_CELL * num_cells)
    picked = torch.from_numpy(np.linspace(0, len(sample_ND) - 1, size).astype(np.int64))
    rows = sample_ND[picked]
    shift = rows.double().mean(dim=0).float()
    weights = weights_N[picked]
    return shift + faiss_kmeans(
        rows - shift, min(num_cells, size), weights_N=weights, num_iterations=_ITERATIONS, seed=seed, init="random"
    )


def _divided(rows_ND: Tensor, weights_N: Tensor, cell_D: Tensor, num: int, seed: int) -> LeafSums:
    """Return the sums of the leaves of one cell."""
    if num >= len(rows_ND):
        ids, num = torch.arange(len(rows_ND)), len(rows_ND)
    else:
        near = rows_ND - cell_D
        centers = faiss_kmeans(near, num, weights_N=weights_N, num_iterations=_ITERATIONS, seed=seed, init="random")
        ids = nearest(near, centers)[0][:, 0]
    sums = LeafSums.zeros(num, rows_ND.shape[1], rows_ND.device)
    sums.add(rows_ND, ids, torch.zeros(len(rows_ND)), weights_N)
    return sums


@contextmanager
def _faiss_alone() -> Iterator[None]:
    """Let FAISS use one thread in the thread that enters: the cells themselves lie side by side."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
