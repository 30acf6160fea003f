"""The tree by cells: clusters that lie together merge on their own, cell by cell, and the survivors go up.

One algorithm, one knob. A cluster's limit is a proven bound under its distance to everything outside its cell; inside,
a pair merges only at a distance under (1 + eps) times both limits. With eps = 0 every such merge is one of the exact
tree: for U and W in different cells delta(U, W) >= max(limit U, limit W), and if delta(U1, U2) is under both limits,
then by reducibility delta(U1 + U2, W) >= min over i of delta(Ui, W) >= the limits again. With eps infinite there are no
limits: cells merge up to one height common to all, and this is the mini-batch tree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from raydc.core.tree.reciprocal import (
    DEFAULT,
    Trail,
    choose_engine,
    join,
    merge_all,
    merge_duplicates,
    rounding_noise,
    rounding_slack,
)
from raydc.core.tree.search import Clusters, Kind, SearchOptions, pair_delta, rounded

log = logging.getLogger(__name__)

# Letters in this module: M clusters, D width, C cells, P merged pairs, N members of a cell.

SAMPLE_PER_CELL = 256
"""Clusters per cell that the coarse k-means is fitted on, as FAISS does."""

KEEP_SHARE = 0.1
"""Share of the clusters that the mini-batch tree sends up from a round of cells. Fewer is faster and coarser."""

LEAST_PROGRESS = 0.05
"""A round of cells that merges a smaller share than this is the last: the limits certify too little."""


@dataclass(frozen=True)
class CellState:
    """All clusters of one round, sorted by cell, so that a cell is a slice; plain arrays, to be shared among tasks."""

    kind: Kind
    center_MD: np.ndarray
    """(M, D) float64, centered on the weighted mean of all rows."""
    weight_M: np.ndarray
    spread_M: np.ndarray
    leaf_M: np.ndarray
    """(M,) int64 smallest leaf of each cluster; ascending within a cell."""
    first_C: np.ndarray
    """(C + 1,) int64 offsets of the cells."""


@dataclass(frozen=True)
class CellMerges:
    """The merges of one cell, by smallest leaf, children before parents."""

    left_P: np.ndarray
    right_P: np.ndarray
    delta_P: np.ndarray
    num_rounds: int
    num_pairs: int
    num_searches: int
    num_exact_searches: int


def merge_cell(state: CellState, cell: int, *, eps: float, options: SearchOptions = DEFAULT) -> CellMerges:
    """Return the merges of one cell. A pure function of its arguments: a task that is lost may run again.

    Args:
        state: all clusters of the round; not changed.
        cell: which cell.
        eps: 0 for merges of the exact tree only, infinite for all merges of the cell, anything between relaxes the
            limit.
        options: what the search may cost.

    Returns:
        The merges; with eps infinite they join the whole cell.
    """
    first, last = int(state.first_C[cell]), int(state.first_C[cell + 1])
    trail = Trail()
    limit_N = np.full(last - first, np.inf)
    if np.isfinite(eps) and len(state.first_C) > 2:
        limit_N = (1 + eps) * outside_floor(state, cell, options, trail)
    members = Clusters(
        state.kind,
        state.center_MD[first:last].copy(),
        state.weight_M[first:last].copy(),
        state.spread_M[first:last].copy(),
        state.leaf_M[first:last],
    )
    merge_all(members, trail, limit_M=limit_N, options=options)
    return CellMerges(*trail.merges(), trail.num_rounds, trail.num_pairs, trail.num_searches, trail.num_exact_searches)


def outside_floor(state: CellState, cell: int, options: SearchOptions, trail: Trail) -> np.ndarray:
    """Return for each member of a cell a number that its distance to any cluster outside is not under.

    From the same search as the merges: the nearest candidate outside in float64, or the floor under all others. It is a
    hair under the true distance, so that a tie with the outside is never decided inside.
    """
    first, last = int(state.first_C[cell]), int(state.first_C[cell + 1])
    clusters = Clusters(state.kind, state.center_MD, state.weight_M, state.spread_M, state.leaf_M)
    outside_M = np.ones(len(state.weight_M), dtype=bool)
    outside_M[first:last] = False
    engine = choose_engine(options.device)
    columns = engine.lay_out(clusters, outside_M, block_cols=options.block_cols, dtype=np.float32)
    member_N = np.arange(first, last)
    slot_NL, floor_N = engine.search(columns, clusters, member_N, options=replace(options, num_neighbors=2))
    trail.num_searches += len(member_N)
    trail.num_pairs += len(member_N) * int(outside_M.sum())
    row, place = np.nonzero(slot_NL >= 0)
    np.minimum.at(floor_N, row, rounded(pair_delta(clusters, member_N[row], slot_NL[row, place])))
    noise = rounding_noise(clusters)
    outside_N: np.ndarray = np.maximum(floor_N - rounding_slack(clusters, member_N, floor_N, noise), 0.0)
    return outside_N


Runner = Callable[[Callable[..., CellMerges], CellState, Sequence[int]], Iterable[CellMerges]]
"""Calls step(state, cell) for each cell, in any order and any place, and returns their results in order."""


def run_here(step: Callable[..., CellMerges], state: CellState, cells: Sequence[int]) -> Iterable[CellMerges]:
    """Run the cells one after another in this process."""
    return [step(state, cell) for cell in cells]


@dataclass
class CellCost:
    """What the cells did before the exact finish."""

    num_cells: int = 0
    num_cell_rounds: int = 0
    num_cell_merges: int = 0


def merge_by_cells(
    clusters: Clusters,
    trail: Trail,
    *,
    eps: float,
    cell_size: int,
    top_size: int,
    seed: int,
    run_cells: Runner = run_here,
    options: SearchOptions = DEFAULT,
) -> CellCost:
    """Merge clusters by cells, round after round, until top_size are left or cells stop helping; finish exactly.

    Changes clusters in place, as merge_all does. O(K D) memory here, O(cell_size D) in a cell with eps infinite.

    Args:
        clusters: K clusters; the slot is the leaf.
        trail: receives the merges.
        eps: 0 certified, infinite mini-batch, anything between relaxed.
        cell_size: clusters per cell, on average; a cell holds at most twice as many.
        top_size: this many clusters or fewer are merged exactly.
        seed: of the coarse k-means.
        run_cells: runs the steps of a round; the default runs them here.
        options: what the search may cost.

    Returns:
        The cost of the cells; the trail holds all merges down to one cluster.
    """
    cost = CellCost()
    alive_K = np.ones(len(clusters.weight_M), dtype=bool)
    merge_duplicates(clusters, trail, np.full(len(alive_K), np.inf), alive_K)
    step = partial(merge_cell, eps=eps, options=options)
    while (num_alive := int(alive_K.sum())) > max(top_size, cell_size):
        state = _cut_into_cells(clusters, np.flatnonzero(alive_K), cell_size, seed=seed + cost.num_cell_rounds)
        num_cells = len(state.first_C) - 1
        made = list(run_cells(step, state, range(num_cells)))
        left_P, right_P, delta_P = (
            np.concatenate([getattr(cell, name) for cell in made]) for name in ("left_P", "right_P", "delta_P")
        )
        if np.isinf(eps):
            num_kept = max(int(KEEP_SHARE * num_alive), min(top_size, num_alive // 2))
            low_P = _lowest(left_P, right_P, delta_P, num_alive - num_kept, len(alive_K))
            left_P, right_P, delta_P = left_P[low_P], right_P[low_P], delta_P[low_P]
        replay(clusters, left_P, right_P)
        alive_K[right_P] = False
        trail.add(left_P, right_P, delta_P)
        _add_up(trail, cost, made, num_merges=len(left_P))
        log.info("merge: %d clusters in %d cells, %d merges", num_alive, num_cells, len(left_P))
        if len(left_P) < LEAST_PROGRESS * num_alive:
            break
    merge_all(_taken(clusters, np.flatnonzero(alive_K)), trail, options=options)
    return cost


def _cut_into_cells(clusters: Clusters, leaf_M: np.ndarray, cell_size: int, *, seed: int) -> CellState:
    """Return the clusters of these leaves, (M,) int64, sorted by coarse cell."""
    cell_M = coarse_cells(clusters.center_MD[leaf_M], clusters.weight_M[leaf_M], cell_size, seed=seed)
    slot_M = leaf_M[np.argsort(cell_M, kind="stable")]
    return CellState(
        clusters.kind,
        clusters.center_MD[slot_M],
        clusters.weight_M[slot_M],
        clusters.spread_M[slot_M],
        slot_M,
        np.concatenate([[0], np.cumsum(np.bincount(cell_M))]),
    )


def _add_up(trail: Trail, cost: CellCost, made: Sequence[CellMerges], *, num_merges: int) -> None:
    """Count what a round of cells has cost, and the merges that were kept of it."""
    trail.num_rounds += max(cell.num_rounds for cell in made)
    for name in ("num_pairs", "num_searches", "num_exact_searches"):
        setattr(trail, name, getattr(trail, name) + sum(getattr(cell, name) for cell in made))
    cost.num_cells += len(made)
    cost.num_cell_rounds += 1
    cost.num_cell_merges += num_merges


def _taken(clusters: Clusters, leaf_M: np.ndarray) -> Clusters:
    return Clusters(
        clusters.kind, clusters.center_MD[leaf_M], clusters.weight_M[leaf_M], clusters.spread_M[leaf_M], leaf_M
    )


def _lowest(left_P: np.ndarray, right_P: np.ndarray, delta_P: np.ndarray, num: int, num_leaves: int) -> np.ndarray:
    """Return which merges lie at or under the height of the num-th lowest; with a merge, everything under it."""
    height_K = [0.0] * num_leaves
    height_P = np.empty(len(delta_P))
    for merge, (left, right, delta) in enumerate(zip(left_P.tolist(), right_P.tolist(), delta_P.tolist(), strict=True)):
        height_K[left] = height_P[merge] = max(delta, height_K[left], height_K[right])
    if num >= len(height_P):
        return np.ones(len(height_P), dtype=bool)
    low_P: np.ndarray = height_P <= np.partition(height_P, num - 1)[num - 1]
    return low_P


def replay(clusters: Clusters, left_P: np.ndarray, right_P: np.ndarray) -> None:
    """Apply merges to all clusters, in place: the same sums in the same order as in the cell, hence the same bits."""
    generation_K = [0] * len(clusters.weight_M)
    generation_P = np.empty(len(left_P), dtype=np.int64)
    for merge, (left, right) in enumerate(zip(left_P.tolist(), right_P.tolist(), strict=True)):
        generation_K[left] = generation_P[merge] = 1 + max(generation_K[left], generation_K[right])
    order_P = np.argsort(generation_P, kind="stable")
    for now in np.split(order_P, np.flatnonzero(np.diff(generation_P[order_P])) + 1) if len(order_P) else []:
        join(clusters, left_P[now], right_P[now])


def coarse_cells(center_MD: np.ndarray, weight_M: np.ndarray, cell_size: int, *, seed: int) -> np.ndarray:
    """Return the cell of each cluster: weighted k-means, cells of more than twice the size split again.

    Never at random: random cells of clusters have given 1.8 to 3.6 times the exact tree's error at 300 groups.

    Args:
        center_MD: (M, D) float64.
        weight_M: (M,) float64, positive.
        cell_size: members per cell, on average.
        seed: of the sample and the start.

    Returns:
        (M,) int64, from 0 without gaps.
    """
    rng = np.random.default_rng(seed)
    cell_M = np.zeros(len(center_MD), dtype=np.int64)
    num_cells = 0
    waiting = [np.arange(len(center_MD))]
    while waiting:
        member_N = waiting.pop()
        if len(member_N) <= (2 * cell_size if len(member_N) < len(center_MD) else cell_size):
            cell_M[member_N] = num_cells
            num_cells += 1
            continue
        part_N = _weighted_kmeans(center_MD[member_N], weight_M[member_N], -(-len(member_N) // cell_size), rng)
        if part_N.max() == 0:  # Centers that k-means cannot tell apart.
            part_N = np.arange(len(member_N)) // cell_size
        waiting += [member_N[part_N == part] for part in range(int(part_N.max()) + 1)]
    return cell_M


def _weighted_kmeans(
    center_ND: np.ndarray, weight_N: np.ndarray, num_cells: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the cell of each row, from 0 without gaps: k-means++ and ten steps of Lloyd, on a sample of the rows."""
    pick = np.sort(rng.permutation(len(center_ND))[: SAMPLE_PER_CELL * num_cells])
    sample_SD, weight_S = center_ND[pick], weight_N[pick]
    start = [int(rng.choice(len(pick), p=weight_S / weight_S.sum()))]
    nearest_S = np.full(len(pick), np.inf)
    for _ in range(num_cells - 1):
        step_SD = sample_SD - sample_SD[start[-1]]
        np.minimum(nearest_S, np.einsum("sd,sd->s", step_SD, step_SD), out=nearest_S)
        chance_S = nearest_S * weight_S
        if chance_S.sum() == 0:
            break
        start.append(int(rng.choice(len(pick), p=chance_S / chance_S.sum())))
    mean_CD = sample_SD[start]
    for _ in range(10):
        cell_S = _nearest_mean(sample_SD, mean_CD)
        order_S = np.argsort(cell_S, kind="stable")
        # Empty cells are dropped: a cell is a convenience, not a result.
        first = np.unique(cell_S[order_S], return_index=True)[1]
        sum_CD = np.add.reduceat(sample_SD[order_S] * weight_S[order_S, None], first, axis=0)
        mean_CD = sum_CD / np.add.reduceat(weight_S[order_S], first)[:, None]
    return np.unique(_nearest_mean(center_ND, mean_CD), return_inverse=True)[1]


def _nearest_mean(row_ND: np.ndarray, mean_CD: np.ndarray) -> np.ndarray:
    """Return the nearest mean of each row; rounded, so that the last bits of a product decide nothing."""
    half_C = np.einsum("cd,cd->c", mean_CD, mean_CD) / 2
    scale = float(np.abs(row_ND).max()) ** 2 * row_ND.shape[1] or 1.0
    nearest_N = np.empty(len(row_ND), dtype=np.int64)
    for start in range(0, len(row_ND), 4096):
        rows = slice(start, start + 4096)
        score_BC = half_C - row_ND[rows] @ mean_CD.T
        nearest_N[rows] = np.round(score_BC / scale, 11).argmin(axis=1)
    return nearest_N
