"""Neighbor search under a linkage distance: candidates and a proven floor for everything else.

The search works on float32 tiles, so its values depend on block sizes, threads and device. It therefore decides
nothing: it returns candidates together with a floor, a number that no cluster outside the candidates can be under in
exact arithmetic. The caller ranks the candidates in float64 and accepts the winner only if it lies under the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

# Letters in this module: M clusters, D width, Q queries, L listed neighbors, P pairs, C chunks of columns.

Kind = Literal["ward", "average"]

CHUNK = 32
"""Columns that share one minimum. These minima cost a tenth of the matrix product, a top-k more than it."""

SENTINEL = 1e20
"""Squared norm of a column that is not there, in units of the largest. Finite: infinity times zero is no number."""


@dataclass
class Clusters:
    """The clusters under the merge, in float64; position is the slot, and slots are ordered by smallest leaf."""

    kind: Kind
    center_MD: np.ndarray
    """(M, D) float64, centered on the weighted mean of all rows."""
    weight_M: np.ndarray
    """(M,) float64, positive."""
    spread_M: np.ndarray
    """(M,) float64 mean squared deviation inside the cluster; all zero under Ward, where it plays no part."""
    leaf_M: np.ndarray
    """(M,) int64 smallest leaf of the cluster, ascending."""


def pair_delta(clusters: Clusters, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Return the linkage distance of each pair of slots.

    Ward:    w_a w_b / (w_a + w_b) |c_a - c_b|^2, the rise of the sum of squared errors.
    Average: |c_a - c_b|^2 + v_a + v_b, the mean squared Euclidean distance between the rows of the two.

    The value is the same, bit for bit, whichever side a cluster stands on and whatever else is in the call.

    Args:
        clusters: M clusters.
        left_P: (P,) slots.
        right_P: (P,) slots.

    Returns:
        (P,) float64.
    """
    difference_PD = clusters.center_MD[left_P]
    difference_PD -= clusters.center_MD[right_P]
    delta_P: np.ndarray = np.einsum("pd,pd->p", difference_PD, difference_PD)
    if clusters.kind == "average":
        delta_P = delta_P + (clusters.spread_M[left_P] + clusters.spread_M[right_P])
    else:
        left_weight_P, right_weight_P = clusters.weight_M[left_P], clusters.weight_M[right_P]
        delta_P = left_weight_P * right_weight_P / (left_weight_P + right_weight_P) * delta_P
    return delta_P


def rounded(delta: np.ndarray) -> np.ndarray:
    """Return delta to 40 bits of mantissa, nearest.

    Distances are compared in this form: equal distances that differ in their last bits, as on a lattice, become ties,
    and ties have an order of their own (see tie_order) that no block size or merge history can change.
    """
    bits = np.ascontiguousarray(delta, dtype=np.float64).view(np.int64)
    return ((bits + (1 << 11)) & ~np.int64((1 << 12) - 1)).view(np.float64)


def tie_order(clusters: Clusters, left_P: np.ndarray, right_P: np.ndarray) -> np.ndarray:
    """Return a number for each pair of slots that decides between equal distances; the smaller one is nearer.

    A hash of the two smallest leaves, the same from both sides. It stays with a pair through merges, since a merged
    cluster keeps one of the leaves: so it is a total order under which merging mutual neighbors stays exact. And it
    is random: where all distances are equal, a third of the clusters find a mutual neighbor in a round; by smallest
    leaf, it is one pair.

    Returns:
        (P,) uint64.

    Source: the finaliser of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014.
    """
    a_P, b_P = clusters.leaf_M[left_P].astype(np.uint64), clusters.leaf_M[right_P].astype(np.uint64)
    hash_P = (np.minimum(a_P, b_P) << np.uint64(32)) + np.maximum(a_P, b_P)
    hash_P = (hash_P ^ (hash_P >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash_P = (hash_P ^ (hash_P >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order_P: np.ndarray = hash_P ^ (hash_P >> np.uint64(31))
    return order_P


class Engine(NamedTuple):
    """How to search: on the CPU by the functions of this module, on a device by those of linkage_device."""

    lay_out: Callable[..., Any]
    update: Callable[..., None]
    search: Callable[..., tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SearchOptions:
    """What the search costs. Nothing here changes a tree."""

    num_neighbors: int = 16
    """Length of the neighbor lists."""
    block_rows: int = 256
    """Queries per tile."""
    block_cols: int = 16384
    """Clusters per tile."""
    num_threads: int = 0
    """Threads that work on tiles side by side, each with a BLAS of one thread; 0 is as many as BLAS would use."""
    device: str = "cpu"
    """cpu, or a torch device such as cuda or cuda:1. torch:cpu runs the device engine on the CPU, to test it."""


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def in_threads(step: Callable[[Any], None], items: Iterable[Any], num_threads: int) -> None:
    """Call step on each item, on several threads.

    BLAS has one thread meanwhile: its own threads wait for each other at every product, and on a busy machine that wait
    has cost more than the second core gave.
    """
    items = list(items)
    if len(items) > 1 and num_threads == 0:
        num_threads = max(
            (pool["num_threads"] for pool in _thread_pools().info() if pool["user_api"] == "blas"), default=1
        )
    if len(items) < 2 or num_threads == 1:
        for item in items:
            step(item)
        return
    with _thread_pools().limit(limits=1, user_api="blas"), ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(step, items))


@dataclass
class Columns:
    """The search side of all clusters, in tiles; a tile is a grid of CHUNK rows, a chunk is a column of that grid."""

    rows_XE: np.ndarray
    """(X, D + 2) [-2c, 1, |c|^2 + v] per column; with [q, |q|^2 + v, 1] one product gives the squared distance."""
    slot_X: np.ndarray
    """(X,) slot of a column, -1 for padding."""
    column_M: np.ndarray
    """(M,) column of a slot."""
    weight_X: np.ndarray
    """(X,) search weight of a column."""
    tiles: list[tuple[int, int]]
    """First and last column of each tile; the width is a multiple of CHUNK."""
    light_C: np.ndarray
    """Lightest weight in each chunk when it was laid out; weights only grow, so it stays a lower bound."""
    radius_C: np.ndarray
    """Largest norm in each chunk, raised with every update."""
    origin_D: np.ndarray
    """Subtracted from centers before they are rounded: the clusters of a small cell lie close together, far from 0."""
    weight_unit: float
    """The mean weight; search weights are in this unit, so that float32 neither overflows nor underflows."""
    length_unit: float
    """The largest norm; search coordinates are in this unit."""
    num_stale: int = 0
    """Columns written or taken out since the layout."""


def lay_out(clusters: Clusters, alive_M: np.ndarray, *, block_cols: int, dtype: type) -> Columns:
    """Return the columns of the live clusters, sorted by weight so that the clusters of a chunk weigh nearly the same.

    The Ward factor w_q w_c / (w_q + w_c) grows with w_c: taken at the lightest cluster of a chunk it turns the chunk's
    smallest squared distance into a lower bound, and the factor costs 1/32 of a pass over all pairs.
    """
    slot_A = np.flatnonzero(alive_M)
    weight_unit = float(clusters.weight_M[slot_A].mean())
    origin_D, length_unit = frame(clusters, slot_A, dtype)
    slot_A = slot_A[np.argsort(clusters.weight_M[slot_A], kind="stable")]
    tile_cols = max(CHUNK, block_cols // CHUNK * CHUNK)
    tiles, slots = [], []
    first = 0
    for start in range(0, len(slot_A), tile_cols):
        part = slot_A[start : start + tile_cols]
        padded = np.full(-(-len(part) // CHUNK) * CHUNK, -1, dtype=np.int64)
        padded[: len(part)] = part
        slots.append(padded.reshape(-1, CHUNK).T.reshape(-1))
        tiles.append((first, first + len(padded)))
        first += len(padded)
    slot_X = np.concatenate(slots)
    real_X = slot_X >= 0
    rows_XE = np.zeros((first, clusters.center_MD.shape[1] + 2), dtype=dtype)
    rows_XE[:, -2] = 1.0
    rows_XE[:, -1] = SENTINEL
    weight_X: np.ndarray = np.full(first, np.inf, dtype=dtype)
    column_M = np.full(len(alive_M), -1, dtype=np.int64)
    column_M[slot_X[real_X]] = np.flatnonzero(real_X)
    radius_X: np.ndarray = np.zeros(first, dtype=dtype)
    columns = Columns(
        rows_XE, slot_X, column_M, weight_X, tiles, np.empty(0), np.empty(0), origin_D, weight_unit, length_unit
    )
    radius_X[real_X] = _write(columns, clusters, slot_X[real_X])
    columns.light_C = np.concatenate([weight_X[a:b].reshape(CHUNK, -1).min(axis=0) for a, b in tiles])
    columns.radius_C = np.concatenate([radius_X[a:b].reshape(CHUNK, -1).max(axis=0) for a, b in tiles])
    return columns


def frame(clusters: Clusters, slot_A: np.ndarray, dtype: type) -> tuple[np.ndarray, float]:
    """Return the origin and the unit of length of the search's coordinates."""
    mean_D = clusters.center_MD[slot_A].mean(axis=0)
    far = float(np.abs(clusters.center_MD[slot_A]).max())
    for origin_D in (mean_D, np.zeros_like(mean_D)):
        center_AD = clusters.center_MD[slot_A] - origin_D
        square_A = np.einsum("ad,ad->a", center_AD, center_AD) + clusters.spread_M[slot_A]
        length_unit = float(np.sqrt(square_A.max()))
        # The subtraction rounds at 1e-16 of the old coordinates: nothing, it should be, beside the bound of the new.
        if far * 1e-16 <= length_unit * np.finfo(dtype).eps * 0.01:
            break
    return origin_D, length_unit or 1.0


def _write(columns: Columns, clusters: Clusters, slot_B: np.ndarray) -> np.ndarray:
    """Write the present state of some slots into their columns; return their norms."""
    center_BD, square_B = _scaled(columns, clusters, slot_B)
    at_B = columns.column_M[slot_B]
    columns.rows_XE[at_B, :-2] = -2.0 * center_BD
    columns.rows_XE[at_B, -1] = square_B
    columns.weight_X[at_B] = clusters.weight_M[slot_B] / columns.weight_unit
    length_B: np.ndarray = np.sqrt(square_B).astype(columns.radius_C.dtype)
    return length_B


def _scaled(columns: Columns, clusters: Clusters, slot_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centers in the layout's unit of length, and |c|^2 + v in its square."""
    center_BD = (clusters.center_MD[slot_B] - columns.origin_D) / columns.length_unit
    spread_B = clusters.spread_M[slot_B] / columns.length_unit**2
    return center_BD, np.einsum("bd,bd->b", center_BD, center_BD) + spread_B


def update(columns: Columns, clusters: Clusters, grown_B: np.ndarray, gone_B: np.ndarray) -> None:
    """Bring merged slots up to date and take dead slots out, in place."""
    norm_B = _write(columns, clusters, grown_B)
    at_B = columns.column_M[grown_B]
    for first, last in columns.tiles:
        width = (last - first) // CHUNK
        inside_B = (at_B >= first) & (at_B < last)
        np.maximum.at(columns.radius_C, first // CHUNK + (at_B[inside_B] - first) % width, norm_B[inside_B])
    gone_at = columns.column_M[gone_B]
    columns.rows_XE[gone_at, :-2] = 0.0
    columns.rows_XE[gone_at, -1] = SENTINEL
    columns.slot_X[gone_at] = -1
    columns.num_stale += len(grown_B) + len(gone_B)


def search(
    columns: Columns, clusters: Clusters, query_Q: np.ndarray, *, options: SearchOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return candidate neighbors of each query slot and the floor under all other clusters.

    With u the unit roundoff, the computed squared distance is off by at most (D + 12) u (|q| + |c|)^2 whatever the
    order of its sum, so subtracting that gives a bound that holds for every tiling and thread count.

    Args:
        columns: the search side.
        clusters: the same clusters in float64.
        query_Q: (Q,) slots.
        options: candidates per query (L), tiles, threads; peak memory is block_rows x block_cols x 4 bytes a thread.

    Returns:
        (Q, L) int64 slots, -1 where there are fewer, and (Q,) float64 floors, infinite where all clusters are
        candidates.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1 (error of an inner product).
    """
    slot_QL = np.full((len(query_Q), options.num_neighbors), -1, dtype=np.int64)
    floor_Q = np.full(len(query_Q), np.inf)

    def search_block(start: int) -> None:
        rows = slice(start, start + options.block_rows)
        slot_QL[rows], floor_Q[rows] = _search_rows(columns, clusters, query_Q[rows], options.num_neighbors)

    in_threads(search_block, range(0, len(query_Q), options.block_rows), options.num_threads)
    return slot_QL, floor_Q


def _search_rows(columns: Columns, clusters: Clusters, query_B: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    dtype = columns.rows_XE.dtype
    center_BD, square_B = _scaled(columns, clusters, query_B)
    query_BE = np.empty((len(query_B), columns.rows_XE.shape[1]), dtype=dtype)
    query_BE[:, :-2], query_BE[:, -2], query_BE[:, -1] = center_BD, square_B, 1.0
    norm_B1 = np.sqrt(square_B).astype(dtype)[:, None]
    weight_B1 = (clusters.weight_M[query_B] / columns.weight_unit).astype(dtype)[:, None]
    own_B = columns.column_M[query_B]
    slack = dtype.type((center_BD.shape[1] + 12) * np.finfo(dtype).eps / 2)
    ward = clusters.kind == "ward"

    best_BL = np.full((len(query_B), 0), np.inf, dtype=dtype)
    column_BL = np.full((len(query_B), 0), 0, dtype=np.int64)
    floor_B = np.full(len(query_B), np.inf)
    for first, last in columns.tiles:
        width = (last - first) // CHUNK
        chunks = slice(first // CHUNK, first // CHUNK + width)
        square_BX = query_BE @ columns.rows_XE[first:last].T
        inside_B = np.flatnonzero((own_B >= first) & (own_B < last))
        square_BX[inside_B, own_B[inside_B] - first] = SENTINEL
        square_BJC = square_BX.reshape(len(query_B), CHUNK, width)
        low_BC = square_BJC.min(axis=1)
        low_BC -= slack * (norm_B1 + columns.radius_C[chunks]) ** 2
        np.maximum(low_BC, 0.0, out=low_BC)
        if ward:
            light_C = columns.light_C[chunks]
            low_BC *= _ward_factor(weight_B1, light_C, slack)
        kept = min(num, width)
        if kept < width:
            pick_BC = np.argpartition(low_BC, kept, axis=1)[:, : kept + 1]
            floor_B = np.minimum(floor_B, np.take_along_axis(low_BC, pick_BC[:, kept:], axis=1)[:, 0])
            pick_BC = pick_BC[:, :kept]
        else:
            pick_BC = np.broadcast_to(np.arange(width), (len(query_B), width))
        value_BJC = np.take_along_axis(square_BJC, pick_BC[:, None, :], axis=2)
        column_BJC = first + np.arange(CHUNK)[:, None] * width + pick_BC[:, None, :]
        value_BJC -= slack * (norm_B1 + columns.radius_C[chunks][pick_BC])[:, None, :] ** 2
        np.maximum(value_BJC, 0.0, out=value_BJC)
        if ward:
            value_BJC *= _ward_factor(weight_B1[:, :, None], columns.weight_X[column_BJC], slack)
        best_BL = np.concatenate([best_BL, value_BJC.reshape(len(query_B), -1)], axis=1)
        column_BL = np.concatenate([column_BL, column_BJC.reshape(len(query_B), -1)], axis=1)
        if best_BL.shape[1] > num:
            pick_BL = np.argpartition(best_BL, num, axis=1)[:, : num + 1]
            floor_B = np.minimum(floor_B, np.take_along_axis(best_BL, pick_BL[:, num:], axis=1)[:, 0])
            best_BL = np.take_along_axis(best_BL, pick_BL[:, :num], axis=1)
            column_BL = np.take_along_axis(column_BL, pick_BL[:, :num], axis=1)
    slot_BL = np.full((len(query_B), num), -1, dtype=np.int64)
    slot_BL[:, : column_BL.shape[1]] = columns.slot_X[column_BL]
    slot_BL[slot_BL == query_B[:, None]] = -1
    return slot_BL, floor_B * columns.length_unit**2 * (columns.weight_unit if ward else 1.0)


def _ward_factor(weight: np.ndarray, other: np.ndarray, slack: float) -> np.ndarray:
    """Return w o / (w + o), rounded down; written with reciprocals, since the weight of padding is infinite."""
    # A weight that float32 cannot hold is 0, and so is its bound: still a bound.
    with np.errstate(divide="ignore", over="ignore"):
        factor: np.ndarray = (1 - slack) / (1 / weight + 1 / other)
    return factor


def search_exactly(
    clusters: Clusters, alive_M: np.ndarray, query_Q: np.ndarray, *, num_neighbors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest slots of each query by (rounded distance, tie order), and the distance of the first left out.

    For queries whose neighbors lie closer together than any matrix product can tell: no expansion, O(M D) a query.

    Returns:
        (Q, L) int64 slots in order, -1 where there are fewer, and (Q,) float64 floors.
    """
    slot_A = np.flatnonzero(alive_M)
    slot_QL = np.full((len(query_Q), num_neighbors), -1, dtype=np.int64)
    floor_Q = np.full(len(query_Q), np.inf)
    for row, query in enumerate(query_Q):
        other = slot_A[slot_A != query]
        queries = np.full(len(other), query)
        delta = rounded(pair_delta(clusters, queries, other))
        last = np.partition(delta, num_neighbors)[num_neighbors] if len(delta) > num_neighbors else np.inf
        near = np.flatnonzero(delta <= last)
        first = near[np.lexsort((tie_order(clusters, queries[near], other[near]), delta[near]))][: num_neighbors + 1]
        slot_QL[row, : min(len(first), num_neighbors)] = other[first[:num_neighbors]]
        if len(first) > num_neighbors:
            floor_Q[row] = delta[first[num_neighbors]]
    return slot_QL, floor_Q
