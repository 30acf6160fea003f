"""Merge trees over weighted centroids: Ward and its relatives, exact, certified or by mini-batches, in O(K D) memory.

`ward` is the exact tree on plain arrays. `agglomerate` chooses linkage, metric and method. The work is done by
reciprocal (reciprocal nearest neighbors), search (who is nearest) and cells (cell by cell).

Linkages. ward: height sqrt(2 delta). average: the mean squared Euclidean distance between the rows of two clusters;
under cosine and pearson the mean of 1 - cosine. With sse, average linkage counts the spread inside the leaves. single
and complete: by scipy on all distances between centroids, for at most MAX_PAIRWISE_LEAVES leaves.

Metrics. cosine scales each centroid to length 1; pearson subtracts the mean of each centroid first. For the means of
unit rows, which are shorter than 1, use euclidean with their sse: average linkage then is twice the mean of 1 - cosine.

Methods. exact. certified: by cells with eps = 0, equal to exact merge for merge; with eps > 0 a merge in a cell may be
up to 1 + eps times farther than what lies outside, and is reported as relaxed. minibatch: eps infinite. auto: the first
of exact, certified, minibatch that `choose_method` expects to stay within the budget.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raydc.core.tree.cells import CellCost, Runner, merge_by_cells, run_here
from raydc.core.tree.limits import MAX_PAIRWISE_LEAVES
from raydc.core.tree.order import merge_sse
from raydc.core.tree.reciprocal import Trail, merge_all
from raydc.core.tree.search import Clusters, Kind, SearchOptions

log = logging.getLogger(__name__)

# Letters in this module: K leaves, D width, T merges.

LinkageName = Literal["ward", "average", "single", "complete"]
Metric = Literal["euclidean", "cosine", "pearson"]
Method = Literal["auto", "exact", "certified", "minibatch"]


@dataclass(frozen=True, kw_only=True)
class Linkage:
    """A merge tree over the leaves that carry weight."""

    merges: np.ndarray
    """(K-1, 4) float64, scipy's linkage matrix: two node ids (smaller first), height, leaf count."""
    weights: np.ndarray
    """(2K-1,) float64 mass of each node; leaves first, then merges in the order of their rows."""
    sse: np.ndarray
    """(2K-1,) float64 sum of squared errors of each node around its mean; the leaves' own as given, or zero."""
    leaves: np.ndarray
    """(K,) int64 row of the input that is leaf i. All rows, unless some weigh nothing."""
    left_out: np.ndarray
    """int64 rows of the input left out because they weigh nothing."""
    method: str
    """exact, certified, relaxed, minibatch or pairwise."""
    reason: str
    """Why this method, in words."""
    num_rounds: int
    num_pairs: int
    """Distances evaluated by full searches; K(K-1)/2 would be one look at every pair."""
    num_searches: int
    """Full searches, of one cluster against all."""
    num_exact_searches: int
    """Those that needed float64 differences, because of near ties."""
    num_inversions: int
    """Merges that lay under a child by more than rounding, and were raised to it. None in an exact tree."""
    num_cells: int
    num_cell_merges: int
    """Merges made inside cells. Proven to be the exact tree's if the method is certified, not proven otherwise."""


def ward(
    centers_KD: np.ndarray,
    weights_K: np.ndarray | None = None,
    sse_K: np.ndarray | None = None,
    *,
    num_neighbors: int = 16,
    block_rows: int = 256,
    block_cols: int = 16384,
    num_threads: int = 0,
    device: str = "cpu",
) -> Linkage:
    """Return the exact Ward tree of weighted centroids.

    delta(A, B) = w_A w_B / (w_A + w_B) |c_A - c_B|^2, the rise of the sum of squared errors; the height is
    sqrt(2 delta), which for two single rows is their distance. With the weights of a k-means these are the top K - 1
    merges of the Ward tree of all its rows, given its clusters.

    Ties are broken by a total order: distance to 40 bits, then a hash of the two smallest leaves. Neither block sizes
    nor threads nor the device change the tree. Identical centroids merge first, at height 0. Memory is
    O(K (D + num_neighbors)) plus one tile of block_rows x block_cols float32.

    Args:
        centers_KD: (K, D) finite; float64 is kept, anything else is cast to it.
        weights_K: (K,) masses, at least one positive; one each by default. Leaves of weight 0 are left out of the tree.
        sse_K: (K,) sum of squared errors inside each leaf; zero by default. It does not change the tree.
        num_neighbors: length of the neighbor lists. Speed only.
        block_rows: queries per tile of the search. Speed and memory only.
        block_cols: clusters per tile of the search. Speed and memory only.
        num_threads: threads of the search; 0 is as many as BLAS would use. Speed and memory only.
        device: where to search: cpu, or a torch device such as cuda. Speed only.

    Returns:
        The linkage; with one leaf it has no merges.

    Raises:
        ValueError: wrong shapes, values that are not finite, a negative weight or SSE, or no weight at all.

    Source: Murtagh, "A survey of recent advances in hierarchical clustering algorithms", Comput. J. 26(4), 1983
    (reciprocal nearest neighbors); Sumengen et al., "Scaling Hierarchical Agglomerative Clustering to Billion-sized
    Datasets", arXiv:2105.11653 (rounds). The lists, their floors and the tile search are ours.
    """
    options = SearchOptions(num_neighbors, block_rows, block_cols, num_threads, device)
    return agglomerate(centers_KD, weights_K, sse_K, linkage="ward", method="exact", options=options)


def agglomerate(
    centers_KD: np.ndarray,
    weights_K: np.ndarray | None = None,
    sse_K: np.ndarray | None = None,
    *,
    linkage: LinkageName = "ward",
    metric: Metric = "euclidean",
    method: Method = "auto",
    eps: float = 0.0,
    cell_size: int = 4096,
    top_size: int = 16384,
    seed: int = 0,
    budget_seconds: float = 1800.0,
    num_parallel: int = 1,
    run_cells: Runner = run_here,
    options: SearchOptions = SearchOptions(),  # noqa: B008 (it is frozen)
) -> Linkage:
    """Return the merge tree of weighted centroids under a linkage, a metric and a method.

    The head of this module says what the choices mean.

    Args:
        centers_KD: (K, D) finite; float64 is kept, anything else is cast to it.
        weights_K: (K,) masses; one each by default. Leaves of weight 0 are left out.
        sse_K: (K,) sum of squared errors inside each leaf; zero by default. For metric euclidean only.
        linkage, metric, method: the choices.
        eps: for method certified.
        cell_size: clusters per cell, on average, at most twice as many. Changes the tree unless eps is 0.
        top_size: this many clusters or fewer are merged exactly. Changes the tree unless eps is 0.
        seed: of the cells. Changes the tree unless eps is 0.
        budget_seconds: for method auto.
        num_parallel: cells that run at a time, for method auto.
        run_cells: runs the cells of a round, for instance as tasks on a cluster; here by default.
        options: what the search may cost, and on which device.

    Returns:
        The linkage, with the method used and why.

    Raises:
        ValueError: wrong shapes or values, an unknown choice, sse with another metric than euclidean, a row without
            direction under cosine or pearson, or too many leaves for single or complete linkage.
    """
    _check_choices(linkage, metric, method, eps, cell_size, top_size)
    leaves = _leaves(centers_KD, weights_K, sse_K, metric)
    if linkage in ("single", "complete"):
        return _pairwise(leaves, linkage, metric)
    reason = "as asked"
    if method == "auto":
        method, reason = choose_method(
            *leaves.center_KD.shape, budget_seconds=budget_seconds, cell_size=cell_size, num_parallel=num_parallel
        )
    clusters, trail, cost = _clusters(leaves, linkage), Trail(), CellCost()
    if method == "exact":
        merge_all(clusters, trail, options=options)
    else:
        eps = np.inf if method == "minibatch" else eps
        sizes = {"cell_size": cell_size, "top_size": top_size, "seed": seed}
        cost = merge_by_cells(clusters, trail, eps=eps, run_cells=run_cells, options=options, **sizes)
    used = "relaxed" if method == "certified" and eps > 0 else method
    return _linkage(leaves, trail, cost, linkage=linkage, metric=metric, method=used, reason=reason)


@dataclass(frozen=True, kw_only=True)
class _Leaves:
    """The leaves that carry weight, in the space of the metric."""

    center_KD: np.ndarray
    weight_K: np.ndarray
    sse_K: np.ndarray
    leaves: np.ndarray
    """(K,) int64 row of the input that is leaf i."""

    left_out: np.ndarray
    """int64 rows of the input that weigh nothing."""


def _leaves(centers_KD: np.ndarray, weights_K: np.ndarray | None, sse_K: np.ndarray | None, metric: Metric) -> _Leaves:
    centers_KD, weights_K, sse_K = _checked(centers_KD, weights_K, sse_K)
    leaves, left_out = np.flatnonzero(weights_K > 0), np.flatnonzero(weights_K == 0)
    if len(left_out):
        log.warning(
            "linkage: %d of %d leaves weigh nothing and are left out of the tree", len(left_out), len(weights_K)
        )
    center_KD = _prepared(centers_KD[leaves], metric)
    sse_K = sse_K[leaves]
    if metric != "euclidean" and sse_K.any():
        raise ValueError(f"sse is Euclidean, metric is {metric}: normalize the rows, then use euclidean")
    return _Leaves(center_KD=center_KD, weight_K=weights_K[leaves], sse_K=sse_K, leaves=leaves, left_out=left_out)


def _clusters(leaves: _Leaves, linkage: LinkageName) -> Clusters:
    """Return the leaves as the clusters to be merged, around the mean of all rows."""
    weight_K = leaves.weight_K
    center_KD = _around_mean(leaves)
    with np.errstate(over="ignore"):
        total = float((weight_K * np.einsum("kd,kd->k", center_KD, center_KD)).sum() * weight_K.max())
    if not np.isfinite(total):
        raise ValueError("centers and weights are too large for their squares in float64: scale them down")
    spread_K = leaves.sse_K / weight_K if linkage == "average" else np.zeros(len(weight_K))
    kind: Kind = "ward" if linkage == "ward" else "average"
    return Clusters(kind, center_KD, weight_K.copy(), spread_K, np.arange(len(weight_K)))


def _around_mean(leaves: _Leaves) -> np.ndarray:
    around: np.ndarray = leaves.center_KD - np.average(leaves.center_KD, axis=0, weights=leaves.weight_K)
    return around


def _linkage(
    leaves: _Leaves, trail: Trail, cost: CellCost, *, linkage: str, metric: Metric, method: str, reason: str
) -> Linkage:
    """Return the linkage matrix of the merges, with what they have cost."""
    log.info("linkage: %s %s, %s (%s), %d rounds", linkage, metric, method, reason, trail.num_rounds)
    left_T, right_T, delta_T = trail.merges()
    children_T2, height_T, count_T, num_inversions = number_nodes(left_T, right_T, delta_T, len(leaves.weight_K))
    if linkage == "ward":
        height_T = np.sqrt(2 * height_T)
    elif metric != "euclidean":
        height_T = height_T / 2  # |a - b|^2 = 2 (1 - cosine) for unit rows.
    return Linkage(
        merges=np.column_stack([children_T2.astype(np.float64), height_T, count_T]),
        **_masses(children_T2, _around_mean(leaves), leaves.weight_K, leaves.sse_K),
        leaves=leaves.leaves,
        left_out=leaves.left_out,
        method=method,
        reason=reason,
        num_rounds=trail.num_rounds,
        num_pairs=trail.num_pairs,
        num_searches=trail.num_searches,
        num_exact_searches=trail.num_exact_searches,
        num_inversions=num_inversions,
        num_cells=cost.num_cells,
        num_cell_merges=cost.num_cell_merges,
    )


PAIR_SECONDS = 1.2e-9
"""Seconds for each pair of a search, beside the product; measured on one core of an AMD EPYC with AVX-512."""

FLOP_SECONDS = 1 / 70e9
"""Seconds for each operation of the product; measured on the same core."""

SEARCH_SECONDS = 5e-5
"""Seconds for each full search of one cluster; measured on the same core."""


def choose_method(
    num_leaves: int, width: int, *, budget_seconds: float, cell_size: int = 4096, num_parallel: int = 1
) -> tuple[Method, str]:
    """Return the best method that is expected to stay within the budget, and why.

    Exact looks at about 1.5 K^2 pairs in one process; certified at twice as many, most of them in the cells, which run
    num_parallel at a time; minibatch at about 2 K cell_size. A pair costs 2 (D + 2) flops and a fixed part.

    Args:
        num_leaves: K.
        width: D.
        budget_seconds: what the merge may take.
        cell_size: clusters per cell.
        num_parallel: cells that run at a time.

    Returns:
        The method and a sentence.
    """
    pair = PAIR_SECONDS + 2 * (width + 2) * FLOP_SECONDS
    exact = 1.5 * num_leaves**2 * pair + 2 * num_leaves * SEARCH_SECONDS
    certified = 2 * exact / num_parallel
    minibatch = 2 * num_leaves * min(cell_size, num_leaves) * pair / num_parallel + 2 * num_leaves * SEARCH_SECONDS
    cost = f"K={num_leaves}, D={width}: exact about {exact:.0f} s"
    if exact <= budget_seconds:
        return "exact", f"{cost}, within the budget of {budget_seconds:.0f} s"
    cost += f", certified {certified:.0f} s on {num_parallel} at a time"
    if certified <= budget_seconds:
        return "certified", f"{cost}, within the budget of {budget_seconds:.0f} s"
    return "minibatch", f"{cost}, over the budget of {budget_seconds:.0f} s; minibatch {minibatch:.0f} s"


def _check_choices(linkage: str, metric: str, method: str, eps: float, cell_size: int, top_size: int) -> None:
    for name, value, choices in (
        ("linkage", linkage, ("ward", "average", "single", "complete")),
        ("metric", metric, ("euclidean", "cosine", "pearson")),
        ("method", method, ("auto", "exact", "certified", "minibatch")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    if linkage == "ward" and metric != "euclidean":
        raise ValueError(f"ward linkage is Euclidean, got metric {metric}: normalize the rows, then use euclidean")
    if min(cell_size, top_size) < 1:
        raise ValueError(f"cell_size and top_size must be at least 1, got {cell_size} and {top_size}")


def _checked(
    centers_KD: np.ndarray, weights_K: np.ndarray | None, sse_K: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centers_KD = np.asarray(centers_KD, dtype=np.float64)
    if centers_KD.ndim != 2 or centers_KD.shape[0] < 1 or centers_KD.shape[1] < 1:
        raise ValueError(f"centers must be (K, D) with K and D at least 1, got shape {centers_KD.shape}")
    given = []
    for name, values, default in (("weights", weights_K, 1.0), ("sse", sse_K, 0.0)):
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


def _prepared(center_KD: np.ndarray, metric: Metric) -> np.ndarray:
    """Return the rows in which squared Euclidean distance is the metric (twice it, for cosine and pearson)."""
    if metric == "euclidean":
        return center_KD
    if metric == "pearson":
        center_KD = center_KD - center_KD.mean(axis=1, keepdims=True)
    norm_K1 = np.linalg.norm(center_KD, axis=1, keepdims=True)
    if (norm_K1 == 0).any():
        raise ValueError(f"{int((norm_K1 == 0).sum())} centers have no direction under metric {metric}")
    unit_KD: np.ndarray = center_KD / norm_K1
    return unit_KD


def _pairwise(leaves: _Leaves, linkage: str, metric: Metric) -> Linkage:
    """Single or complete linkage of all distances, by scipy. Weights change masses, never the merges."""
    num_leaves = len(leaves.weight_K)
    if num_leaves > MAX_PAIRWISE_LEAVES:
        need = num_leaves**2 * 4 / 1e9
        raise ValueError(
            f"{linkage} linkage holds all {num_leaves} x {num_leaves} / 2 distances, {need:.0f} GB; the limit is "
            f"{MAX_PAIRWISE_LEAVES} leaves. Use linkage ward or average, or fewer leaves"
        )
    merges = np.empty((0, 4))
    if num_leaves > 1:
        from scipy.cluster import hierarchy  # It takes half a second, and few trees need it.

        merges = hierarchy.linkage(leaves.center_KD, linkage)
    if metric != "euclidean":
        merges[:, 2] = merges[:, 2] ** 2 / 2
    children_T2 = merges[:, :2].astype(np.int64)
    return Linkage(
        merges=merges,
        **_masses(children_T2, leaves.center_KD, leaves.weight_K, leaves.sse_K),
        leaves=leaves.leaves,
        left_out=leaves.left_out,
        method="pairwise",
        reason=f"{linkage} linkage needs all distances",
        num_rounds=0,
        num_pairs=num_leaves * (num_leaves - 1) // 2,
        num_searches=0,
        num_exact_searches=0,
        num_inversions=0,
        num_cells=0,
        num_cell_merges=0,
    )


def _masses(children_T2: np.ndarray, center_KD: np.ndarray, weight_K: np.ndarray, sse_K: np.ndarray) -> dict[str, Any]:
    """Return weight and SSE of every node."""
    rise_T = merge_sse(children_T2, weight_K, center_KD)
    mass, sse = weight_K.tolist(), sse_K.tolist()
    for (left, right), rise in zip(children_T2.tolist(), rise_T.tolist(), strict=True):
        mass.append(mass[left] + mass[right])
        sse.append(sse[left] + sse[right] + rise)
    return {"weights": np.array(mass), "sse": np.array(sse)}


def number_nodes(
    left_T: np.ndarray, right_T: np.ndarray, delta_T: np.ndarray, num_leaves: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return merges numbered as scipy does: in the order of their heights, which are made monotone.

    Merges of equal height come in an order that does not depend on how they were found: children before parents, then
    by smallest leaf.

    Args:
        left_T: (T,) smallest leaf of one side of each merge; children come before parents.
        right_T: (T,) smallest leaf of the other.
        delta_T: (T,) linkage distances.
        num_leaves: K.

    Returns:
        (T, 2) children, (T,) heights as distances, (T,) leaf counts, and how many heights were raised to a child's.
    """
    node_of_leaf = list(range(num_leaves))
    height, depth = [0.0] * num_leaves, [0] * num_leaves
    first, second = [], []
    num_inversions = 0
    # A plain loop over lists: a million merges take two seconds, and no array operation can follow a chain.
    for leaf_a, leaf_b, delta in zip(left_T.tolist(), right_T.tolist(), delta_T.tolist(), strict=True):
        a, b = node_of_leaf[leaf_a], node_of_leaf[leaf_b]
        below = max(height[a], height[b])
        num_inversions += delta < below * (1 - 1e-9)
        delta = max(delta, below)
        deep_a = depth[a] + 1 if a >= num_leaves and height[a] == delta else 0
        deep_b = depth[b] + 1 if b >= num_leaves and height[b] == delta else 0
        first.append(a)
        second.append(b)
        node_of_leaf[leaf_a] = len(height)
        height.append(delta)
        depth.append(max(deep_a, deep_b))
    height_T, depth_T = np.array(height[num_leaves:]), np.array(depth[num_leaves:], dtype=np.int64)
    order_T = np.lexsort((right_T, left_T, depth_T, height_T))
    new_id = np.arange(num_leaves + len(order_T))
    new_id[num_leaves + order_T] = num_leaves + np.arange(len(order_T))
    children_T2 = np.stack([new_id[np.array(first, np.int64)], new_id[np.array(second, np.int64)]], axis=1)
    children_T2 = np.sort(children_T2[order_T], axis=1)
    count = [1] * num_leaves
    for a, b in children_T2.tolist():
        count.append(count[a] + count[b])
    return children_T2, height_T[order_T], np.array(count[num_leaves:], dtype=np.float64), num_inversions
