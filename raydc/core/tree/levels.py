"""Nested levels of a merge tree, and how even and tight their groups are.

A tree is scipy's linkage matrix, as in raydc.core.tree.order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydc.core.tree.order import checked_children, cut, leaf_places

# Letters in this module: K leaves, T = K - 1 merges, D width, G groups.


@dataclass
class _Group:
    """A group on its way down the tree: its core node, and small subtrees that it has taken along."""

    core: int
    riders: list[int]


class _Splits:
    """The tree split from the top, in the order of its merges; a split counts where both sides hold enough."""

    def __init__(self, children_T2: np.ndarray, weights_K: np.ndarray, min_population: float) -> None:
        self._children, self._num_leaves = children_T2, len(weights_K)
        self._mass = weights_K.tolist()
        for left, right in children_T2.tolist():
            self._mass.append(self._mass[left] + self._mass[right])
        self._smallest = min_population * self._mass[-1] * (1 - 1e-12)
        # A heap of groups by their core's merge: later merges are higher. Leaves and stuck groups leave the heap.
        root = 2 * self._num_leaves - 2
        self._open = [(-root, _Group(root, []))]
        self._closed: list[_Group] = []

    def down_to(self, num_groups: int) -> list[_Group]:
        """Split on until there are so many groups, or no split counts any more; return the groups."""
        while self._open and len(self._open) + len(self._closed) < num_groups:
            self._split(heapq.heappop(self._open)[1])
        return [group for _, group in self._open] + self._closed

    def _split(self, group: _Group) -> None:
        if group.core < self._num_leaves:
            self._closed.append(group)
            return
        small, large = self._children[group.core - self._num_leaves].tolist()
        if self._mass[small] >= self._mass[large]:
            small, large = large, small
        if self._mass[large] < self._smallest:
            self._closed.append(group)
            return
        if self._mass[small] < self._smallest:
            group.riders.append(small)
        else:
            heapq.heappush(self._open, (-small, _Group(small, [])))
        group.core = large
        heapq.heappush(self._open, (-large, group))


def levels(
    Z: np.ndarray, sizes: Sequence[int], weights_K: np.ndarray, min_population: float | None = None
) -> dict[int, np.ndarray]:
    """Return nested cuts of the tree, by their number of groups.

    Without min_population a level is the plain cut. With it, the tree is split from the top in the order of its
    merges, and a split counts only if both sides hold at least that share of the total weight. Otherwise the smaller
    side makes no group of its own: it stays in its group, and the larger side is split further in its place. At the
    next split that counts, what was taken along goes with the heavier side (the left one, if they weigh the same). So
    every group of every level holds at least the share, levels nest, and a far outlier does not keep the rest of the
    tree from being split. A tree may not have enough such splits: then a level holds as many groups as there are.

    Args:
        Z: (K-1, 4) linkage matrix.
        sizes: numbers of groups, 1 to K each.
        weights_K: (K,) weight of each leaf, not negative.
        min_population: smallest share of the total weight that a group may hold, 0 to 1.

    Returns:
        {size: (K,) int32 group of each leaf}, ascending; groups are numbered from left to right in the leaf order, by
        their cores.

    Raises:
        ValueError: Z is not a linkage matrix, a size is out of range, or min_population is.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    weights_K = np.asarray(weights_K, dtype=np.float64)
    if weights_K.shape != (num_leaves,):
        raise ValueError(f"weights must have shape ({num_leaves},), got {weights_K.shape}")
    if min_population is None:
        return {int(size): cut(Z, int(size)) for size in sorted(set(sizes))}
    if not 0 <= min_population <= 1:
        raise ValueError(f"min_population is a share from 0 to 1, got {min_population}")
    if sizes and not 1 <= min(sizes) <= max(sizes) <= num_leaves:
        raise ValueError(f"cannot cut a tree of {num_leaves} leaves into {list(sizes)} groups")
    places = leaf_places(children_T2)
    splits = _Splits(children_T2, weights_K, min_population)
    return {int(size): _labels(splits.down_to(size), places, num_leaves) for size in sorted(set(sizes))}


def _labels(groups: list[_Group], places: tuple[np.ndarray, np.ndarray], num_leaves: int) -> np.ndarray:
    """Return the (K,) int32 group of each leaf, numbered from left to right by the cores."""
    start_V, count_V = places
    of_place_K = np.empty(num_leaves, dtype=np.int32)
    for number, group in enumerate(sorted(groups, key=lambda group: int(start_V[group.core]))):
        for node in (group.core, *group.riders):
            of_place_K[start_V[node] : start_V[node] + count_V[node]] = number
    group_K: np.ndarray = of_place_K[start_V[:num_leaves]]
    return group_K


@dataclass(frozen=True, kw_only=True)
class LevelStatistics:
    """How even a level's groups are, and how tight."""

    num_groups: int
    size_cv: float
    """Standard deviation of the group sizes over their mean."""
    size_max_over_mean: float
    num_over_4x_mean: int
    """Groups of more than four times the mean size."""
    smallest: float
    """Rows of the smallest group."""
    sse: float
    """Sum of squared errors of all rows around the means of their groups."""


def level_statistics(
    label_K: np.ndarray, weights_K: np.ndarray, centers_KD: np.ndarray, sse_K: np.ndarray | None = None
) -> LevelStatistics:
    """Return the statistics of one level, from the leaves alone.

    SSE = sum_leaf SSE_leaf + sum_leaf w_leaf |c_leaf - m_group|^2, in float64.

    Args:
        label_K: (K,) group of each leaf, 0 to G-1.
        weights_K: (K,) rows of each leaf; not all zero.
        centers_KD: (K, D) center of each leaf.
        sse_K: (K,) sum of squared errors inside each leaf; zero by default.

    Returns:
        The statistics; sizes are rows.

    Raises:
        ValueError: lengths disagree, or nothing has weight.
    """
    label_K, weights_K = np.asarray(label_K), np.asarray(weights_K, dtype=np.float64)
    center_KD = np.asarray(centers_KD, dtype=np.float64)
    if not len(label_K) == len(weights_K) == len(center_KD):
        raise ValueError(f"{len(label_K)} labels, {len(weights_K)} weights and {len(center_KD)} centers do not match")
    if not weights_K.sum() > 0:
        raise ValueError("nothing has weight")
    center_KD = center_KD - np.average(center_KD, axis=0, weights=weights_K)
    rows_G = np.bincount(label_K, weights=weights_K)
    mean_GD = np.zeros((len(rows_G), center_KD.shape[1]))
    np.add.at(mean_GD, label_K, weights_K[:, None] * center_KD)
    mean_GD /= np.where(rows_G > 0, rows_G, 1)[:, None]
    step_KD = center_KD - mean_GD[label_K]
    inside = 0.0 if sse_K is None else float(np.asarray(sse_K, dtype=np.float64).sum())
    return LevelStatistics(
        num_groups=len(rows_G),
        size_cv=float(rows_G.std() / rows_G.mean()),
        size_max_over_mean=float(rows_G.max() / rows_G.mean()),
        num_over_4x_mean=int((rows_G > 4 * rows_G.mean()).sum()),
        smallest=float(rows_G.min()),
        sse=inside + float((weights_K * np.einsum("kd,kd->k", step_KD, step_KD)).sum()),
    )
