"""The start of k-means from a tree: fine leaves of a sample, joined by Ward until as many are left as asked.

Letters: N rows, K leaves, M fine leaves, D width of a row.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from raydc.core.search.fine_leaves import FineLeaves, fine_leaves
from raydc.core.tree.linkage import agglomerate
from raydc.core.tree.order import cut
from raydc.core.tree.search import SearchOptions

log = logging.getLogger(__name__)

MOST_EXACT = 24_000
"""Fine leaves above which the tree is made cell by cell.

Exact, it looks at about 1.5 M^2 pairs: 20 s of one core at this size and D = 768."""


def tree_start(
    sample_ND: Tensor,
    num_leaves: int,
    *,
    num_fine: int,
    seed: int,
    weights_N: Tensor | None = None,
    num_threads: int = 1,
) -> Tensor | None:
    """Return the (K, D) float32 centers that the weighted Ward tree of fine leaves has at K groups.

    A seed of k-means is one row, and in many dimensions two rows of one cluster are about as far apart as two of
    neighboring clusters. So k-means++ gives some clusters two seeds and others none, and Lloyd's iterations cannot
    carry a center from one to another. Means of ten rows have a tenth of the noise, and Ward's tree tells the clusters
    apart. This is a start: Lloyd's iterations over all rows come after it.

    Memory is O(N + M) rows. Up to MOST_EXACT fine leaves the tree is exact; above, it is made by mini-batch cells,
    whose work grows like M.

    Args:
        sample_ND: (N, D) float32 on the CPU.
        num_leaves: K.
        num_fine: M; see `num_fine_leaves`.
        seed: of the fine leaves, and of the tree's cells.
        weights_N: (N,) float32 row weights; None for 1 each.
        num_threads: for the fine leaves and the tree; it changes nothing but the time.

    Returns:
        The centers; None where the rows with weight give fewer than K fine leaves.
    """
    fine = fine_leaves(sample_ND, num_fine, seed=seed, weights_N=weights_N, num_threads=num_threads)
    if len(fine.weights_M) < num_leaves:
        return None
    return cut_means(fine, num_leaves, seed=seed, num_threads=num_threads)


def cut_means(fine: FineLeaves, num_leaves: int, *, seed: int = 0, num_threads: int = 1) -> Tensor:
    """Return the (K, D) float32 weighted means of the groups of Ward's tree of fine leaves, cut at K.

    Args:
        fine: at least K fine leaves.
        num_leaves: K.
        seed: of the tree's cells, where it has some.
        num_threads: of the tree's search.
    """
    exact = len(fine.weights_M) <= MOST_EXACT
    tree = agglomerate(
        fine.means_MD.numpy(),
        fine.weights_M.numpy(),
        method="exact" if exact else "minibatch",
        seed=seed,
        options=SearchOptions(num_threads=num_threads),
    )
    group_M = torch.from_numpy(cut(tree.merges, num_leaves).astype(np.int64))
    weights_K = torch.zeros(num_leaves, dtype=torch.float64).index_add_(0, group_M, fine.weights_M)
    sums_KD = torch.zeros(num_leaves, fine.means_MD.shape[1], dtype=torch.float64)
    sums_KD.index_add_(0, group_M, fine.means_MD * fine.weights_M[:, None])
    log.info(
        "k-means start: Ward's tree (%s) of %d fine leaves, cut at %d", tree.method, len(fine.weights_M), num_leaves
    )
    return (sums_KD / weights_K[:, None]).float()
