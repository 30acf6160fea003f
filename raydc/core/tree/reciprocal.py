"""The rounds: every pair of clusters that are each other's nearest merges, all such pairs at once, until one is left.

Neighbor lists follow the merges, and a cluster searches again only when its list can no longer prove who is nearest.
A chain, or data without structure, gives rounds of one or two merges, tens of thousands of them. There is no other
algorithm for those: a round costs what its merges touch, plus a pass over one array of K numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydc.core.tree.search import (
    Clusters,
    Engine,
    SearchOptions,
    in_threads,
    lay_out,
    pair_delta,
    rounded,
    search,
    search_exactly,
    tie_order,
    update,
)

# Letters in this module: M slots, D width, L listed neighbors, P pairs merged in a round, A and B affected slots.

POSTPONE_ABOVE = 0.3
"""Full searches of clusters whose floor lies above this quantile of all nearest distances wait for a later round."""

DEFAULT = SearchOptions()


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

    def merges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return left, right and delta of all merges so far."""
        none = np.empty(0, dtype=np.int64)
        return (
            np.concatenate([none, *self.left]),
            np.concatenate([none, *self.right]),
            np.concatenate([np.empty(0), *self.delta]),
        )


def merge_all(
    clusters: Clusters,
    trail: Trail,
    *,
    limit_M: np.ndarray | None = None,
    options: SearchOptions = DEFAULT,
) -> np.ndarray:
    """Merge reciprocal nearest neighbors, round after round; return the slots that are left.

    Changes clusters in place: a merged cluster lives in the slot of its part with the smaller leaf. Merges are written
    to the trail by smallest leaf.

    Args:
        clusters: M clusters, ordered by smallest leaf.
        trail: receives the merges.
        limit_M: (M,) a pair merges only at a distance under both limits, and inherits the smaller; none by default.
        options: what the search may cost.

    Returns:
        int64 slots still alive, ascending; one, without limits.
    """
    leaf_M = clusters.leaf_M
    limit_M = np.full(len(leaf_M), np.inf) if limit_M is None else limit_M.copy()
    alive_M = np.ones(len(leaf_M), dtype=bool)
    merge_duplicates(clusters, trail, limit_M, alive_M)
    num_alive = int(alive_M.sum())
    if num_alive == 1:
        return np.flatnonzero(alive_M)
    state = _Rounds(clusters, alive_M, trail, options)
    changed_A = np.flatnonzero(alive_M)
    state.search_again(changed_A)
    while num_alive > 1:
        left_P, right_P = state.reciprocal_pairs(changed_A)
        if not len(left_P) and state.postponed_M.any():
            changed_A = state.search_postponed(now=True)
            continue
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
        fits_P = (delta_P == 0) | (delta_P < np.minimum(limit_M[left_P], limit_M[right_P]))
        left_P, right_P, delta_P = left_P[fits_P], right_P[fits_P], delta_P[fits_P]
        if not len(left_P):
            changed_A = left_P
            continue
        limit_M[left_P] = np.minimum(limit_M[left_P], limit_M[right_P])
        trail.add(leaf_M[left_P], leaf_M[right_P], delta_P)
        trail.num_rounds += 1
        num_alive -= len(left_P)
        changed_A = state.merge(left_P, right_P, delta_P)
        if num_alive > 1:
            changed_A = state.look_again(changed_A, left_P)
    return np.flatnonzero(alive_M)


def merge_duplicates(clusters: Clusters, trail: Trail, limit_M: np.ndarray, alive_M: np.ndarray) -> None:
    """Merge clusters of equal center and no spread at distance 0, each group in the order of its leaves.

    As nearest neighbors they would all point at the first of their group: one merge a round.
    """
    bits_MD = np.ascontiguousarray(clusters.center_MD + 0.0).view(np.uint64)
    factor_D = np.random.default_rng(0).integers(1, 2**63, size=bits_MD.shape[1], dtype=np.uint64) | np.uint64(1)
    hash_M = (bits_MD * factor_D).sum(axis=1, dtype=np.uint64)
    order = np.argsort(hash_M, kind="stable")
    same = np.flatnonzero(hash_M[order[1:]] == hash_M[order[:-1]])
    equal = (clusters.center_MD[order[same]] == clusters.center_MD[order[same + 1]]).all(axis=1)
    flat = (clusters.spread_M[order[same]] == 0) & (clusters.spread_M[order[same + 1]] == 0)
    joined = np.zeros(len(order), dtype=bool)
    joined[same[equal & flat] + 1] = True
    if not joined.any():
        return
    start = np.maximum.accumulate(np.where(joined, 0, np.arange(len(order))))
    first, other = order[start[joined]], order[joined]
    ascending = np.lexsort((other, first))
    first, other = first[ascending], other[ascending]
    trail.add(clusters.leaf_M[first], clusters.leaf_M[other], np.zeros(len(other)))
    np.add.at(clusters.weight_M, first, clusters.weight_M[other])
    np.minimum.at(limit_M, first, limit_M[other])
    alive_M[other] = False


def choose_engine(device: str) -> Engine:
    """Return the search of a device: see SearchOptions.device."""
    if device == "cpu":
        return Engine(lay_out, update, search)
    from raydc.core.tree.search_torch import device_engine  # torch takes a second to import, and the CPU needs none.

    return device_engine(device.removeprefix("torch:"))


class _Rounds:
    """Nearest neighbors of the live slots, kept right through the merges.

    For every live slot: nearest and its rounded distance; a list that follows merges; and a floor. Any live cluster
    that holds nothing from the list is at least as far as the floor. A postponed slot has no nearest yet, only the
    floor.
    """

    def __init__(self, clusters: Clusters, alive_M: np.ndarray, trail: Trail, options: SearchOptions):
        num_slots = len(alive_M)
        self.clusters, self.alive_M, self.trail = clusters, alive_M, trail
        self.num_alive = int(alive_M.sum())
        self.options, self.engine = options, choose_engine(options.device)
        self.columns: Any = None
        self.nearest_M = np.full(num_slots, -1, dtype=np.int64)
        self.distance_M = np.full(num_slots, np.inf)
        self.list_ML = np.full((num_slots, options.num_neighbors), -1, dtype=np.int32)
        self.floor_M = np.zeros(num_slots)
        self.postponed_M = np.zeros(num_slots, dtype=bool)
        self.low = np.inf
        """Quantile of all nearest distances above which searches wait, and the number of clusters it was taken of."""
        self.low_alive = 0
        self.now_M = np.arange(num_slots)
        """Slot that a slot's cluster has moved to; follow it to its end."""
        self.noise = rounding_noise(clusters)

    def reciprocal_pairs(self, changed_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of mutual nearest with one side in changed_A, in order of (distance, left, right)."""
        changed_A = changed_A[~self.postponed_M[changed_A]]
        other_A = self.nearest_M[changed_A]
        mutual_A = self.nearest_M[other_A] == changed_A
        left = np.minimum(changed_A, other_A)[mutual_A]
        right = np.maximum(changed_A, other_A)[mutual_A]
        left, right = np.divmod(np.unique(left * len(self.alive_M) + right), len(self.alive_M))
        order = np.argsort(self.distance_M[left], kind="stable")
        return left[order], right[order]

    def merge(self, left_P: np.ndarray, right_P: np.ndarray, delta_P: np.ndarray) -> np.ndarray:
        """Merge pairs in place; return the slots whose nearest may have changed, the merged ones among them."""
        a_P, b_P = self.clusters.weight_M[left_P], self.clusters.weight_M[right_P]
        left_floor_P, right_floor_P = self.floor_M[left_P], self.floor_M[right_P]
        # Lance-Williams: a third cluster at least at both floors stays at least at this one, whatever its weight.
        floor_P = (a_P * left_floor_P + b_P * right_floor_P) / (a_P + b_P)
        if self.clusters.kind == "ward":
            floor_P = np.minimum(floor_P, left_floor_P + right_floor_P - delta_P)
        self.floor_M[left_P] = floor_P
        join(self.clusters, left_P, right_P)
        self.alive_M[right_P] = False
        self.num_alive -= len(right_P)
        self.now_M[right_P] = left_P
        touched_M = np.zeros(len(self.alive_M), dtype=bool)
        touched_M[left_P] = touched_M[right_P] = True
        if self.columns is not None:
            self.engine.update(self.columns, self.clusters, left_P, right_P)
        # The list of a merged cluster is the union of both; look_again shortens it.
        self.union_P2L = np.concatenate([self.list_ML[left_P], self.list_ML[right_P]], axis=1)
        affected_M = self.alive_M & ~self.postponed_M & touched_M[self.nearest_M]
        affected_M[left_P] = True
        return np.flatnonzero(affected_M)

    def look_again(self, changed_A: np.ndarray, merged_P: np.ndarray) -> np.ndarray:
        """Find the nearest of the changed slots from their lists; return the slots whose nearest is known anew.

        Where the list cannot prove who is nearest, a full search must. It can wait: all that is known of such a slot is
        that its merge lies at its floor or above, and the merges under that do not depend on it. So the slots with high
        floors are postponed, and by the time they are searched there are fewer clusters to search.
        """
        is_merged_M = np.zeros(len(self.alive_M), dtype=bool)
        is_merged_M[merged_P] = True
        self._rank(merged_P, self.union_P2L)
        plain_A = changed_A[~is_merged_M[changed_A]]
        self._rank(plain_A, self.list_ML[plain_A])
        proven_A = self._proven(changed_A)
        waiting_A = changed_A[~proven_A]
        self.postponed_M[waiting_A] = True
        self.nearest_M[waiting_A] = -1
        self.distance_M[waiting_A] = self.floor_M[waiting_A]
        return np.concatenate([changed_A[proven_A], self.search_postponed()])

    def search_postponed(self, *, now: bool = False) -> np.ndarray:
        """Search for the postponed slots with a floor in the lower part of all distances; return them.

        With now, the caller has nothing else left to do: the lowest is searched, and those with floors close to it.
        """
        slot_A = np.flatnonzero(self.postponed_M)
        if not len(slot_A):
            return slot_A
        if self.num_alive < 0.98 * self.low_alive or self.low_alive == 0:
            distance_A = self.distance_M[self.alive_M]
            rank = int(POSTPONE_ABOVE * (len(distance_A) - 1))
            self.low, self.low_alive = np.partition(distance_A, rank)[rank], self.num_alive
        floor_A = self.distance_M[slot_A]
        slot_A = slot_A[floor_A <= (max(self.low, 1.5 * floor_A.min()) if now else self.low)]
        self.postponed_M[slot_A] = False
        self.search_again(slot_A)
        return slot_A

    def search_again(self, slot_A: np.ndarray, *, exactly: bool = False) -> None:
        """Give slots a new list, floor and nearest by a search over all live clusters."""
        if not len(slot_A):
            return
        self.trail.num_searches += len(slot_A)
        self.trail.num_pairs += len(slot_A) * self.num_alive
        if not exactly:
            if self.columns is None or self.columns.num_stale > self.num_alive // 10:
                self.columns = self._lay_out(np.float32)
            slot_A = self._search_tiles(self.columns, slot_A)
            if len(slot_A) > 16:
                slot_A = self._search_tiles(self._lay_out(np.float64), slot_A)
        if len(slot_A):
            self.trail.num_exact_searches += len(slot_A)
            list_AL, floor_A = search_exactly(
                self.clusters, self.alive_M, slot_A, num_neighbors=self.options.num_neighbors
            )
            self.floor_M[slot_A] = floor_A
            self._rank(slot_A, list_AL)

    def _lay_out(self, dtype: type) -> Any:
        return self.engine.lay_out(self.clusters, self.alive_M, block_cols=self.options.block_cols, dtype=dtype)

    def _search_tiles(self, columns: Any, slot_A: np.ndarray) -> np.ndarray:
        """Search, rank in float64, and return the slots whose nearest is not proven."""
        list_AL, floor_A = self.engine.search(columns, self.clusters, slot_A, options=self.options)
        self.floor_M[slot_A] = floor_A
        self._rank(slot_A, list_AL)
        unproven: np.ndarray = slot_A[~self._proven(slot_A)]
        return unproven

    def _proven(self, slot_A: np.ndarray) -> np.ndarray:
        """Return where the nearest lies under the floor by more than rounding could move either."""
        floor_A = self.floor_M[slot_A]
        proven_A: np.ndarray = self.distance_M[slot_A] < floor_A - rounding_slack(
            self.clusters, slot_A, floor_A, self.noise
        )
        return proven_A

    def _rank(self, slot_A: np.ndarray, list_AL: np.ndarray) -> None:
        """Order the listed neighbors of slots by rounded distance, keep the first ones, set the nearest."""
        step = max(1, (1 << 18) // (list_AL.shape[1] * self.clusters.center_MD.shape[1]))

        def rank_block(start: int) -> None:
            self._rank_rows(slot_A[start : start + step], list_AL[start : start + step])

        in_threads(rank_block, range(0, len(slot_A), step), self.options.num_threads)

    def _rank_rows(self, slot_B: np.ndarray, list_BL: np.ndarray) -> None:
        now_BL = np.where(list_BL >= 0, self._moved(list_BL), -1)
        now_BL.sort(axis=1)
        valid_BL = (now_BL >= 0) & (now_BL != slot_B[:, None])
        valid_BL[:, 1:] &= now_BL[:, 1:] != now_BL[:, :-1]
        row, place = np.nonzero(valid_BL)
        delta_BL = np.full(now_BL.shape, np.inf)
        delta_BL[row, place] = rounded(pair_delta(self.clusters, slot_B[row], now_BL[row, place]))
        now_BL[~valid_BL] = -1
        order_BL = np.argsort(delta_BL, axis=1, kind="stable")
        self._settle_ties(slot_B, now_BL, delta_BL, order_BL)
        num = self.options.num_neighbors
        if order_BL.shape[1] > num:
            dropped_B = np.take_along_axis(delta_BL, order_BL[:, num, None], axis=1)[:, 0]
            self.floor_M[slot_B] = np.minimum(self.floor_M[slot_B], dropped_B)
        self.list_ML[slot_B] = np.take_along_axis(now_BL, order_BL[:, :num], axis=1)
        self.nearest_M[slot_B] = self.list_ML[slot_B, 0]
        self.distance_M[slot_B] = np.take_along_axis(delta_BL, order_BL[:, :1], axis=1)[:, 0]

    def _moved(self, slot_BL: np.ndarray) -> np.ndarray:
        """Return the slots in which the clusters of slots live now; shorten the way there.

        Threads may do so at the same time: whatever one writes is further along the same way.
        """
        now_BL: np.ndarray = self.now_M[slot_BL]
        while True:
            next_BL = self.now_M[now_BL]
            if np.array_equal(next_BL, now_BL):
                return now_BL
            self.now_M[slot_BL] = next_BL
            now_BL = next_BL

    def _settle_ties(self, slot_B: np.ndarray, now_BL: np.ndarray, delta_BL: np.ndarray, order_BL: np.ndarray) -> None:
        """Put the neighbor that the tie order prefers first, in rows where the nearest distance is shared."""
        if order_BL.shape[1] < 2:
            return
        first_B, second_B = (np.take_along_axis(delta_BL, order_BL[:, [i]], axis=1)[:, 0] for i in (0, 1))
        for row in np.flatnonzero((first_B == second_B) & np.isfinite(first_B)):
            tied = order_BL[row][delta_BL[row, order_BL[row]] == first_B[row]]
            preferred = int(tie_order(self.clusters, np.full(len(tied), slot_B[row]), now_BL[row, tied]).argmin())
            order_BL[row, 0], order_BL[row, preferred] = order_BL[row, preferred], order_BL[row, 0]


def rounding_noise(clusters: Clusters) -> float:
    """Return a bound on the rounding of a center after thousands of merges."""
    return 2e-14 * float(np.sqrt(np.einsum("md,md->m", clusters.center_MD, clusters.center_MD).max()))


def rounding_slack(clusters: Clusters, slot_A: np.ndarray, floor_A: np.ndarray, noise: float) -> np.ndarray:
    """Return by how much rounding could move a distance that is about floor_A."""
    finite_A = np.where(np.isfinite(floor_A), floor_A, 0.0)
    # delta = factor x squared distance, and the factor is at most the slot's weight under Ward, 1 under average.
    factor_A = clusters.weight_M[slot_A] if clusters.kind == "ward" else 1.0
    return 1e-9 * finite_A + 4 * noise * np.sqrt(finite_A * factor_A) + factor_A * noise**2


def join(clusters: Clusters, left_P: np.ndarray, right_P: np.ndarray) -> None:
    """Merge the right cluster of each pair into the left one's slot, in place.

    w = w_a + w_b, c = (w_a c_a + w_b c_b) / w, v = (w_a v_a + w_b v_b) / w + w_a w_b / w^2 |c_a - c_b|^2. The same bits
    whichever side is left. The right slot keeps its old values.
    """
    a_P, b_P = clusters.weight_M[left_P], clusters.weight_M[right_P]
    total_P = a_P + b_P
    if clusters.kind == "average":
        difference_PD = clusters.center_MD[left_P] - clusters.center_MD[right_P]
        square_P = np.einsum("pd,pd->p", difference_PD, difference_PD)
        within_P = (a_P * clusters.spread_M[left_P] + b_P * clusters.spread_M[right_P]) / total_P
        clusters.spread_M[left_P] = within_P + a_P * b_P / total_P**2 * square_P
    sum_PD = a_P[:, None] * clusters.center_MD[left_P] + b_P[:, None] * clusters.center_MD[right_P]
    clusters.center_MD[left_P] = sum_PD / total_P[:, None]
    clusters.weight_M[left_P] = total_P
