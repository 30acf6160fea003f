"""Exact weighted Ward linkage of centroids, in O(K D) memory.

Two clusters that are each other's nearest are merges of the tree whatever the order (Ward is reducible), so every round
merges all such pairs at once. Neighbour lists follow the merges, and a cluster searches again only when its list can no
longer prove who is nearest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from raydc.core.linkage_search import (
    Clusters,
    Columns,
    Kind,
    lay_out,
    pair_delta,
    rounded,
    search,
    search_exactly,
    update,
)

log = logging.getLogger(__name__)

# Letters in this module: K leaves, D width, M slots, L listed neighbours, P pairs merged in a round, A affected slots.


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
    merge_all(clusters, trail, num_neighbours=num_neighbours, block_rows=block_rows, block_cols=block_cols)
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


@dataclass
class Trail:
    """Merges in the order they were made, and what they cost."""

    left: list[np.ndarray] = field(default_factory=list)
    """Smallest leaf of the cluster that holds the smaller one."""
    right: list[np.ndarray] = field(default_factory=list)
    """Smallest leaf of the other."""
    delta: list[np.ndarray] = field(default_factory=list)
    num_rounds: int = 0
    num_pairs: int = 0
    num_searches: int = 0
    num_exact_searches: int = 0

    def add(self, left_P: np.ndarray, right_P: np.ndarray, delta_P: np.ndarray) -> None:
        self.left.append(left_P)
        self.right.append(right_P)
        self.delta.append(delta_P)


def merge_all(
    clusters: Clusters,
    trail: Trail,
    leaf_M: np.ndarray | None = None,
    *,
    limit_M: np.ndarray | None = None,
    num_neighbours: int = 16,
    block_rows: int = 256,
    block_cols: int = 16384,
) -> np.ndarray:
    """Merge reciprocal nearest neighbours, round after round; return the slots that are left.

    Changes clusters in place: a merged cluster lives in the slot of its part with the smaller leaf. Merges are written
    to the trail by smallest leaf.

    Args:
        clusters: M clusters, ordered by smallest leaf.
        trail: receives the merges.
        leaf_M: (M,) smallest leaf of each slot; the slot itself by default.
        limit_M: (M,) a pair merges only at a distance of at most both limits, and inherits the smaller; none by
            default.
        num_neighbours: length of the neighbour lists.
        block_rows: queries per tile.
        block_cols: clusters per tile.

    Returns:
        int64 slots still alive, ascending.
    """
    leaf_M = np.arange(len(clusters.weight_M)) if leaf_M is None else leaf_M
    limit_M = np.full(len(leaf_M), np.inf) if limit_M is None else limit_M
    alive_M = np.ones(len(leaf_M), dtype=bool)
    _merge_duplicates(clusters, trail, leaf_M, limit_M, alive_M)
    if alive_M.sum() == 1:
        return np.flatnonzero(alive_M)
    state = _Rounds(clusters, alive_M, trail, num_neighbours, block_rows, block_cols)
    changed_A = np.flatnonzero(alive_M)
    state.search_again(changed_A)
    num_alive = len(changed_A)
    while num_alive > 1:
        left_P, right_P = state.reciprocal_pairs(changed_A)
        if not len(left_P):
            every_A = np.flatnonzero(alive_M)
            if len(state.reciprocal_pairs(every_A)[0]):
                break  # Pairs there are, but each was refused by its limit when it came up.
            # Rounding has hidden the nearest pair from its own members: look at every cluster afresh.
            assert len(changed_A) < num_alive, "a total order always has a first pair"
            changed_A = every_A
            state.search_again(changed_A, exactly=True)
            continue
        delta_P = pair_delta(clusters, left_P, right_P)
        fits_P = delta_P <= np.minimum(limit_M[left_P], limit_M[right_P])
        left_P, right_P, delta_P = left_P[fits_P], right_P[fits_P], delta_P[fits_P]
        if not len(left_P):
            break
        limit_M[left_P] = np.minimum(limit_M[left_P], limit_M[right_P])
        trail.add(leaf_M[left_P], leaf_M[right_P], delta_P)
        trail.num_rounds += 1
        num_alive -= len(left_P)
        changed_A = state.merge(left_P, right_P, delta_P)
        if num_alive > 1:
            state.look_again(changed_A, left_P)
    return np.flatnonzero(alive_M)


def _merge_duplicates(clusters: Clusters, trail: Trail, leaf_M, limit_M, alive_M) -> None:
    """Merge clusters of equal centre and no spread at distance 0, each group in the order of its leaves.

    As nearest neighbours they would all point at the first of their group: one merge a round.
    """
    bits = (clusters.center_MD + 0.0).view(np.uint64)
    factor = np.random.default_rng(0).integers(1, 2**63, size=bits.shape[1], dtype=np.uint64) | np.uint64(1)
    hash_M = (bits * factor).sum(axis=1, dtype=np.uint64)
    hash_M ^= hash_M >> np.uint64(29)
    order = np.lexsort((np.arange(len(hash_M)), hash_M))
    same = hash_M[order[1:]] == hash_M[order[:-1]]
    if not same.any():
        return
    pairs = np.flatnonzero(same)
    equal = (clusters.center_MD[order[pairs]] == clusters.center_MD[order[pairs + 1]]).all(axis=1)
    flat = (clusters.spread_M[order[pairs]] == 0) & (clusters.spread_M[order[pairs + 1]] == 0)
    pairs = pairs[equal & flat]
    joined = np.zeros(len(order), dtype=bool)
    joined[pairs + 1] = True
    start = np.maximum.accumulate(np.where(joined, 0, np.arange(len(order))))
    first, other = order[start[joined]], order[joined]
    ascending = np.lexsort((other, first))
    first, other = first[ascending], other[ascending]
    if not len(other):
        return
    trail.add(leaf_M[first], leaf_M[other], np.zeros(len(other)))
    np.add.at(clusters.weight_M, first, clusters.weight_M[other])
    np.minimum.at(limit_M, first, limit_M[other])
    alive_M[other] = False


class _Rounds:
    """Nearest neighbours of the live slots, kept right through the merges.

    For every live slot: nearest and its rounded distance; a list that follows merges; and a floor. Any live cluster
    that holds nothing from the list is at least as far as the floor.
    """

    def __init__(
        self,
        clusters: Clusters,
        alive_M: np.ndarray,
        trail: Trail,
        num_neighbours: int,
        block_rows: int,
        block_cols: int,
    ):
        num_slots = len(alive_M)
        self.clusters, self.alive_M, self.trail = clusters, alive_M, trail
        self.num_neighbours, self.block_rows, self.block_cols = num_neighbours, block_rows, block_cols
        self.nearest_M = np.full(num_slots, -1, dtype=np.int64)
        self.distance_M = np.full(num_slots, np.inf)
        self.list_ML = np.full((num_slots, num_neighbours), -1, dtype=np.int32)
        self.floor_M = np.zeros(num_slots)
        self.now_M = np.arange(num_slots)
        """Slot in which a slot's cluster lives now."""
        norm_M = np.sqrt(np.einsum("md,md->m", clusters.center_MD, clusters.center_MD))
        self.noise = 2e-14 * float(norm_M.max())
        """Bound on the rounding of a centre after thousands of merges."""
        self.columns: Columns | None = None

    def reciprocal_pairs(self, changed_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of mutual nearest with one side in changed_A, in order of (distance, left, right)."""
        other_A = self.nearest_M[changed_A]
        mutual_A = self.nearest_M[other_A] == changed_A
        left = np.minimum(changed_A, other_A)[mutual_A]
        right = np.maximum(changed_A, other_A)[mutual_A]
        key = np.unique(left * len(self.alive_M) + right)
        left, right = np.divmod(key, len(self.alive_M))
        order = np.argsort(self.distance_M[left], kind="stable")
        return left[order], right[order]

    def merge(self, left_P: np.ndarray, right_P: np.ndarray, delta_P: np.ndarray) -> np.ndarray:
        """Merge pairs in place; return the slots whose nearest may have changed, the merged ones among them."""
        c = self.clusters
        a_P, b_P = c.weight_M[left_P], c.weight_M[right_P]
        total_P = a_P + b_P
        left_floor_P, right_floor_P = self.floor_M[left_P], self.floor_M[right_P]
        # Lance-Williams: a third cluster at least at both floors stays at least at this one, whatever its weight.
        floor_P = (a_P * left_floor_P + b_P * right_floor_P) / total_P
        if c.kind == "ward":
            floor_P = np.minimum(floor_P, left_floor_P + right_floor_P - delta_P)
        self.floor_M[left_P] = floor_P
        if c.kind == "average":
            square_P = np.maximum(delta_P - c.spread_M[left_P] - c.spread_M[right_P], 0.0)
            within_P = (a_P * c.spread_M[left_P] + b_P * c.spread_M[right_P]) / total_P
            c.spread_M[left_P] = within_P + a_P * b_P / total_P**2 * square_P
        sum_PD = a_P[:, None] * c.center_MD[left_P] + b_P[:, None] * c.center_MD[right_P]
        c.center_MD[left_P] = sum_PD / total_P[:, None]
        c.weight_M[left_P] = total_P
        self.alive_M[right_P] = False
        self.now_M[right_P] = left_P
        self.now_M = self.now_M[self.now_M]
        touched_M = np.zeros(len(self.alive_M), dtype=bool)
        touched_M[left_P] = touched_M[right_P] = True
        if self.columns is not None:
            update(self.columns, c, left_P, right_P)
        # The list of the merged cluster is the union of both; look_again shortens it.
        self.merged_lists_P2L = np.concatenate([self.list_ML[left_P], self.list_ML[right_P]], axis=1)
        affected_M = self.alive_M & touched_M[self.nearest_M]
        affected_M[left_P] = True
        return np.flatnonzero(affected_M)

    def look_again(self, changed_A: np.ndarray, merged_P: np.ndarray) -> None:
        """Find the nearest of the changed slots from their lists, and by full search where the list cannot prove it."""
        is_merged_M = np.zeros(len(self.alive_M), dtype=bool)
        is_merged_M[merged_P] = True
        order = np.argsort(merged_P)
        self._rank(merged_P[order], self.merged_lists_P2L[order])
        plain_A = changed_A[~is_merged_M[changed_A]]
        self._rank(plain_A, self.list_ML[plain_A])
        self.search_again(changed_A[~self._proven(changed_A)])

    def _proven(self, slot_A: np.ndarray) -> np.ndarray:
        """True where the nearest lies under the floor by more than rounding could move either."""
        floor_A, weight_A = self.floor_M[slot_A], self.clusters.weight_M[slot_A]
        if self.clusters.kind == "average":
            weight_A = np.ones_like(weight_A)
        finite_A = np.where(np.isfinite(floor_A), floor_A, 0.0)
        slack_A = 1e-9 * finite_A + 4 * self.noise * np.sqrt(finite_A * weight_A) + weight_A * self.noise**2
        return self.distance_M[slot_A] < floor_A - slack_A

    def _rank(self, slot_A: np.ndarray, list_AL: np.ndarray, *, keep_floor: bool = True) -> None:
        """Order the listed neighbours of slots by (rounded distance, slot), keep the first ones, set the nearest."""
        step = max(1, (1 << 22) // (list_AL.shape[1] * self.clusters.center_MD.shape[1]))
        for start in range(0, len(slot_A), step):
            rows = slice(start, start + step)
            self._rank_rows(slot_A[rows], list_AL[rows])

    def _rank_rows(self, slot_B: np.ndarray, list_BL: np.ndarray) -> None:
        now_BL = np.where(list_BL >= 0, self.now_M[list_BL], -1)
        now_BL.sort(axis=1)
        valid_BL = (now_BL >= 0) & (now_BL != slot_B[:, None])
        valid_BL[:, 1:] &= now_BL[:, 1:] != now_BL[:, :-1]
        row, place = np.nonzero(valid_BL)
        delta_BL = np.full(now_BL.shape, np.inf)
        delta_BL[row, place] = rounded(pair_delta(self.clusters, slot_B[row], now_BL[row, place]))
        now_BL[~valid_BL] = -1
        # Slots ascend within a row, so a stable sort breaks ties by slot.
        order_BL = np.argsort(delta_BL, axis=1, kind="stable")
        kept_BL = order_BL[:, : self.num_neighbours]
        if order_BL.shape[1] > self.num_neighbours:
            dropped_B = np.take_along_axis(delta_BL, order_BL[:, self.num_neighbours, None], axis=1)[:, 0]
            self.floor_M[slot_B] = np.minimum(self.floor_M[slot_B], dropped_B)
        self.list_ML[slot_B] = np.take_along_axis(now_BL, kept_BL, axis=1)
        self.nearest_M[slot_B] = self.list_ML[slot_B, 0]
        self.distance_M[slot_B] = np.take_along_axis(delta_BL, kept_BL[:, :1], axis=1)[:, 0]

    def search_again(self, slot_A: np.ndarray, *, exactly: bool = False) -> None:
        """Give slots a new list, floor and nearest by a search over all live clusters."""
        if not len(slot_A):
            return
        num_alive = int(self.alive_M.sum())
        self.trail.num_searches += len(slot_A)
        self.trail.num_pairs += len(slot_A) * num_alive
        if not exactly:
            if self.columns is None or self.columns.num_stale > num_alive // 10:
                self.columns = lay_out(self.clusters, self.alive_M, block_cols=self.block_cols, dtype=np.float32)
            slot_A = self._search_tiles(self.columns, slot_A)
            if len(slot_A) > 16:
                columns = lay_out(self.clusters, self.alive_M, block_cols=self.block_cols, dtype=np.float64)
                slot_A = self._search_tiles(columns, slot_A)
        if len(slot_A):
            self.trail.num_exact_searches += len(slot_A)
            list_AL, floor_A = search_exactly(self.clusters, self.alive_M, slot_A, num_neighbours=self.num_neighbours)
            self.floor_M[slot_A] = floor_A
            self._rank(slot_A, list_AL)

    def _search_tiles(self, columns: Columns, slot_A: np.ndarray) -> np.ndarray:
        """Search, rank in float64, and return the slots whose nearest is not proven."""
        list_AL, floor_A = search(
            columns, self.clusters, slot_A, num_neighbours=self.num_neighbours, block_rows=self.block_rows
        )
        self.floor_M[slot_A] = floor_A
        self._rank(slot_A, list_AL)
        return slot_A[~self._proven(slot_A)]


def assemble(
    trail: Trail, kind: Kind, weight_K: np.ndarray, sse_K: np.ndarray, leaves: np.ndarray, left_out: np.ndarray
) -> Linkage:
    """Return the linkage of a trail: heights made monotone, merges in height order, nodes numbered as scipy does.

    Merges of equal height come in an order that does not depend on how they were found: children before parents, then
    by smallest leaf.
    """
    num_leaves = len(weight_K)
    left = np.concatenate([np.empty(0, np.int64), *trail.left])
    right = np.concatenate([np.empty(0, np.int64), *trail.right])
    delta = np.concatenate([np.empty(0), *trail.delta])
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
