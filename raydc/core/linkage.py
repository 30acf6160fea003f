"""Exact weighted Ward linkage of centroids, in O(K D) memory.

Two clusters that are each other's nearest are merges of the tree whatever the order (Ward is reducible), so every round
merges all such pairs at once. Neighbour lists follow the merges, and a cluster searches again only when its list can no
longer prove who is nearest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from raydc.core.linkage_rounds import Trail, merge_all
from raydc.core.linkage_search import Clusters, Kind, SearchOptions

log = logging.getLogger(__name__)

# Letters in this module: K leaves, D width, T merges.


@dataclass(frozen=True)
class Linkage:
    """A merge tree over the leaves that carry weight."""

    merges: np.ndarray
    """(K-1, 4) float64, scipy's linkage matrix: two node ids (smaller first), height sqrt(2 delta), leaf count."""
    weights: np.ndarray
    """(2K-1,) float64 mass of each node; leaves first, then merges in the order of their rows."""
    sse: np.ndarray
    """(2K-1,) float64 sum of squared errors of each node around its mean; the leaves' own as given, or zero."""
    leaves: np.ndarray
    """(K,) int64 row of the input that is leaf i. All rows, unless some weigh nothing."""
    left_out: np.ndarray
    """int64 rows of the input left out because they weigh nothing."""
    num_rounds: int
    num_pairs: int
    """Distances evaluated by full searches; K(K-1)/2 would be one look at every pair."""
    num_searches: int
    """Full searches, of one cluster against all."""
    num_exact_searches: int
    """Those that needed float64 differences, because of near ties."""
    num_inversions: int
    """Merges that lay under a child by more than rounding, and were raised to it. None in an exact tree."""


def ward(
    centers_KD: np.ndarray,
    weights_K: np.ndarray | None = None,
    sse_K: np.ndarray | None = None,
    *,
    num_neighbours: int = 16,
    block_rows: int = 256,
    block_cols: int = 16384,
) -> Linkage:
    """Return the exact Ward tree of weighted centroids.

    delta(A, B) = w_A w_B / (w_A + w_B) |c_A - c_B|^2, the rise of the sum of squared errors; the height is
    sqrt(2 delta), which for two single rows is their distance. With the weights of a k-means these are the top K - 1
    merges of the Ward tree of all its rows, given its clusters.

    Ties are broken by a total order: distance to 40 bits, then the smallest leaf in either cluster. Neither block
    sizes nor threads change the tree. Identical centroids merge first, at height 0. Memory is O(K (D +
    num_neighbours)) plus one tile of block_rows x block_cols float32.

    Args:
        centers_KD: (K, D) finite; float64 is kept, anything else is cast to it.
        weights_K: (K,) masses, at least one positive; one each by default. Leaves of weight 0 are left out of the tree.
        sse_K: (K,) sum of squared errors inside each leaf; zero by default. It does not change the tree.
        num_neighbours: length of the neighbour lists. Speed only.
        block_rows: queries per tile of the search. Speed and memory only.
        block_cols: clusters per tile of the search. Speed and memory only.

    Returns:
        The linkage; with one leaf it has no merges.

    Raises:
        ValueError: wrong shapes, values that are not finite, a negative weight or SSE, or no weight at all.

    Source: Murtagh, "A survey of recent advances in hierarchical clustering algorithms", Comput. J. 26(4), 1983
    (reciprocal nearest neighbours); Sumengen et al., "Scaling Hierarchical Agglomerative Clustering to Billion-sized
    Datasets", arXiv:2105.11653 (rounds). The lists, their floors and the tile search are ours.
    """
    centers_KD, weights_K, sse_K = _checked(centers_KD, weights_K, sse_K)
    leaves = np.flatnonzero(weights_K > 0)
    left_out = np.flatnonzero(weights_K == 0)
    if len(left_out):
        log.warning("ward: %d of %d leaves weigh nothing and are left out of the tree", len(left_out), len(weights_K))
    weight_K = weights_K[leaves]
    center_KD = centers_KD[leaves]
    center_KD = center_KD - np.average(center_KD, axis=0, weights=weight_K)
    clusters = Clusters("ward", center_KD, weight_K.copy(), np.zeros(len(leaves)))
    trail = Trail()
    merge_all(clusters, trail, options=SearchOptions(num_neighbours, block_rows, block_cols))
    return assemble(trail, "ward", weight_K, sse_K[leaves], leaves, left_out)


def _checked(centers_KD, weights_K, sse_K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centers_KD = np.asarray(centers_KD, dtype=np.float64)
    if centers_KD.ndim != 2 or centers_KD.shape[0] < 1 or centers_KD.shape[1] < 1:
        raise ValueError(f"centers must be (K, D) with K and D at least 1, got shape {centers_KD.shape}")
    given = []
    for name, values in (("weights", weights_K), ("sse", sse_K)):
        default = 1.0 if name == "weights" else 0.0
        values = np.full(len(centers_KD), default) if values is None else np.asarray(values, dtype=np.float64)
        if values.shape != (len(centers_KD),):
            raise ValueError(f"{name} must have shape ({len(centers_KD)},), one for each center, got {values.shape}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} must be finite and not negative")
        given.append(values)
    if not np.isfinite(centers_KD).all():
        bad = np.flatnonzero(~np.isfinite(centers_KD).all(axis=1))
        raise ValueError(f"{len(bad)} centers are not finite, the first is row {bad[0]}")
    if not (given[0] > 0).any():
        raise ValueError("no center has a positive weight")
    return centers_KD, given[0], given[1]


def assemble(
    trail: Trail, kind: Kind, weight_K: np.ndarray, sse_K: np.ndarray, leaves: np.ndarray, left_out: np.ndarray
) -> Linkage:
    """Return the linkage of a trail: heights made monotone, merges in height order, nodes numbered as scipy does.

    Merges of equal height come in an order that does not depend on how they were found: children before parents, then
    by smallest leaf.
    """
    num_leaves = len(weight_K)
    left, right, delta = trail.merges()
    node_of_leaf = list(range(num_leaves))
    # One plain loop over lists: children are made before their parents, and a leaf stands for the cluster it leads.
    height, depth = [0.0] * num_leaves, [0] * num_leaves
    first, second = [], []
    inversions = 0
    for a, b, d in zip(left.tolist(), right.tolist(), delta.tolist(), strict=True):
        node_a, node_b = node_of_leaf[a], node_of_leaf[b]
        below = max(height[node_a], height[node_b])
        inversions += d < below * (1 - 1e-9)
        d = max(d, below)
        deep_a = depth[node_a] + 1 if node_a >= num_leaves and height[node_a] == d else 0
        deep_b = depth[node_b] + 1 if node_b >= num_leaves and height[node_b] == d else 0
        first.append(node_a)
        second.append(node_b)
        node_of_leaf[a] = len(height)
        height.append(d)
        depth.append(max(deep_a, deep_b))
    height_T, depth_T = np.array(height[num_leaves:]), np.array(depth[num_leaves:], dtype=np.int64)
    order_T = np.lexsort((right, left, depth_T, height_T))
    new_id = np.arange(num_leaves + len(order_T))
    new_id[num_leaves + order_T] = num_leaves + np.arange(len(order_T))
    children = np.stack([new_id[np.array(first, dtype=np.int64)], new_id[np.array(second, dtype=np.int64)]], axis=1)
    children = np.sort(children[order_T], axis=1)
    merges = np.empty((len(order_T), 4))
    merges[:, :2] = children
    merges[:, 2] = np.sqrt(2 * height_T[order_T]) if kind == "ward" else height_T[order_T]
    count, mass, sse = [1] * num_leaves, weight_K.tolist(), sse_K.tolist()
    for (a, b), d in zip(children.tolist(), height_T[order_T].tolist(), strict=True):
        count.append(count[a] + count[b])
        mass.append(mass[a] + mass[b])
        sse.append(sse[a] + sse[b] + d)
    merges[:, 3] = count[num_leaves:]
    return Linkage(
        merges=merges,
        weights=np.array(mass),
        sse=np.array(sse),
        leaves=leaves,
        left_out=left_out,
        num_rounds=trail.num_rounds,
        num_pairs=trail.num_pairs,
        num_searches=trail.num_searches,
        num_exact_searches=trail.num_exact_searches,
        num_inversions=inversions,
    )
