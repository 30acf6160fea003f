"""Merge-and-split moves: k-means leaves a poor optimum by joining two leaves and dividing a third.

Lloyd's iterations cannot leave a state in which one center holds two clusters and two others share one. A move can: it
joins the two, and gives the center that is free to the first.

Letters: N rows, K leaves, D width of a row, P moves.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raydc.core.search.kmeans import LeafSums, MoveRound, leaf_sums
from raydc.core.search.nearest import cache_rows, nearest, squared_distances
from raydc.core.tree.search import rounded

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]

_LEAST_RATIO = 1.02
"""A split must gain this many times what the merge costs: the next passes of Lloyd's move both."""

_LEAST_FALL = 2e-5
"""Share of the SSE by which a round must lower it for another to follow."""

_SAME = 1e-9

_MOST_FAILURES = 3

_SHARE = 4
"""At most a quarter of the leaves take part in the moves of a round."""

SEPARATED = 0.75
"""Share of the scatter that two parts hold between them if the rows lie evenly along a line. Parts of one cluster hold
less, .64 for a normal one; two clusters hold more."""

_TILE_NUMBERS = 2**24
"""Distances between centers at a time."""


@dataclass(frozen=True)
class Moves:
    """Disjoint moves: leaf `merged[p]` joins `into[p]`, and its center goes to a half of leaf `split[p]`."""

    merged_P: Tensor
    into_P: Tensor
    split_P: Tensor

    def __len__(self) -> int:
        return len(self.merged_P)


@dataclass(frozen=True)
class Halves:
    """The two parts of every leaf, on either side of a plane."""

    weights_K2: Tensor
    """(K, 2) float64."""

    means_K2D: Tensor
    """(K, 2, D) float64; of a part without weight the leaf's own mean."""

    share_K: Tensor
    """(K,) float64: how much of the leaf's scatter across the plane is between the parts, from 0 to 1.

    2 / pi = .64 for one normal cluster cut in the middle, 1 for two clusters far apart."""

    @property
    def gain_K(self) -> Tensor:
        """(K,) float64: by how much the SSE falls when a leaf gives way to its two parts; 0 where one is empty."""
        apart = (self.means_K2D[:, 1] - self.means_K2D[:, 0]).square().sum(dim=1)
        return _ward(self.weights_K2[:, 0], self.weights_K2[:, 1]) * apart


@dataclass(frozen=True)
class Moved:
    """Result of the moves."""

    centers_KD: Tensor
    """(K, D) float32."""

    sse: float
    """Weighted, around the means of the leaves."""

    rounds: tuple[MoveRound, ...]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Leaves as the rows' nearest centers make them, and what is known of them."""

    centers_KD: Tensor
    """(K, D) float32 centers to which the rows are nearest."""

    sums: LeafSums
    sse: float
    """Around the means of the leaves."""

    power_KD: Tensor
    """(K, D) float64: the leaves' scatter matrices around their means, times one fixed vector."""

    ids: list[Tensor] | None
    """The leaf of each row of each block; None where blocks() may give other rows the next time."""

    @property
    def means_KD(self) -> Tensor:
        """(K, D) float64 means of the leaves."""
        return self.sums.means(self.centers_KD)


def merge_and_split(
    blocks: Blocks,
    centers_KD: Tensor,
    *,
    all_sum: Callable[[Tensor], Tensor],
    share: Callable[[Tensor], Tensor] = lambda values: values,
    seed: int = 0,
    num_rounds: int = 6,
    least_share: float = 0.0,
    keep_ids: bool = True,
    on_round: Callable[[int, MoveRound], None] | None = None,
) -> Moved:
    """Return centers after rounds of moves over all rows of all ranks; the SSE never rises.

    A round pairs the cheapest merges of two leaves with the best splits of one along its first principal direction,
    while a split gains more than 1.02 times what the merge costs. Two passes of Lloyd's follow. If the SSE has not
    fallen, the moves are undone and half as many are tried; the third such failure ends it.

    Every decision comes from sums over all rows, so it is the same on any number of ranks. With very uneven clusters a
    lower SSE may mean that the largest cluster is split and two small ones are joined; `least_share` prevents that.

    Args:
        blocks: gives this rank's rows as (z (n, D) float32, weights (n,)) blocks, anew at each call.
        centers_KD: (K, D) float32 start, the same on all ranks.
        all_sum: elementwise sum over the ranks; the identity for one.
        share: gives every rank the first one's numbers; costs may differ in their last bits between processors.
        seed: of the vector from which the directions start.
        num_rounds: most rounds with moves.
        least_share: split no leaf whose parts hold a smaller share of the scatter between them; see SEPARATED.
        keep_ids: keep each row's leaf between passes, 4 bytes a row. False where blocks() gives other rows each time.
        on_round: called with (round, from 1; what it did).

    Source: after Fritzke, "The k-means-u* algorithm", arXiv:1706.09059.
    """

    def after_two_passes(centers: Tensor) -> Partition:
        centers = leaf_sums(blocks(), centers, all_sum=all_sum).means(centers).float()
        return partition_of(blocks, centers, all_sum=all_sum, share=share, seed=seed, keep_ids=keep_ids)

    best, most, failures = after_two_passes(centers_KD), max(1, len(centers_KD) // _SHARE), 0
    priced = _price(blocks, best, all_sum=all_sum, share=share, least_share=least_share) if num_rounds else None
    rounds: list[MoveRound] = []
    while priced is not None and len(rounds) < num_rounds:
        moves = choose_moves(priced.cost_K, priced.into_K, priced.gain_K, most=most)
        if not len(moves):
            break
        tried = after_two_passes(moved_centers(best.sums.weights_K, best.means_KD, priced.halves, moves).float())
        kept = tried.sse < best.sse * (1.0 - _SAME)
        rounds.append(MoveRound(num_moves=len(moves), before=best.sse, after=tried.sse, kept=kept))
        if on_round:
            on_round(len(rounds), rounds[-1])
        if kept:
            last = len(rounds) == num_rounds or best.sse - tried.sse <= _LEAST_FALL * best.sse
            best = tried
            priced = None if last else _price(blocks, best, all_sum=all_sum, share=share, least_share=least_share)
        else:
            failures, most = failures + 1, len(moves) // 2
            if failures == _MOST_FAILURES or not most:
                break
    return Moved(best.means_KD.float(), best.sse, tuple(rounds))


def merge_costs(weights_K: Tensor, means_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cost (K,) float64 of merging each leaf into the one where that costs least, and this one (K,) int64.

    The cost is Ward's, w_a w_b / (w_a + w_b) |c_a - c_b|^2: the exact rise of the SSE. An empty leaf costs nothing, and
    is named as its own; no other leaf is merged into it. Memory is one tile of 2^24 distances.

    Args:
        weights_K: (K,) float64.
        means_KD: (K, D) float64.
    """
    single_K, single_KD = weights_K.float(), means_KD.float()
    number = torch.arange(len(weights_K), device=weights_K.device)
    into = []
    for own in number.split(max(1, _TILE_NUMBERS // len(weights_K))):
        cost_BK = squared_distances(single_KD[own], single_KD)
        cost_BK *= _ward(single_K[own, None], single_K)
        cost_BK[:, weights_K == 0] = math.inf
        cost_BK[torch.arange(len(own), device=own.device), own] = math.inf
        into.append(cost_BK.argmin(dim=1))
    into_K = torch.where(weights_K > 0, torch.cat(into), number)
    apart_K = (means_KD - means_KD[into_K]).square().sum(dim=1)
    return _ward(weights_K, weights_K[into_K]) * apart_K, into_K


def choose_moves(cost_K: Tensor, into_K: Tensor, gain_K: Tensor, *, most: int) -> Moves:
    """Return disjoint moves: the cheapest merge with the best split, and so on while that lowers the SSE.

    A leaf takes part in one move at most, be it as the one that is merged, that takes it in, or that is split. Else two
    moves would undo one another. Ties go to the lower leaf.

    Args:
        cost_K: (K,) cost of merging each leaf.
        into_K: (K,) int64 leaf that takes its rows.
        gain_K: (K,) gain of splitting each leaf.
        most: moves.
    """
    # Rounded, so that the last bits of a sum do not choose between equals.
    cost, gain = rounded(cost_K.cpu().numpy()), rounded(gain_K.cpu().numpy())
    cheapest, best = cost.argsort(kind="stable").tolist(), (-gain).argsort(kind="stable").tolist()
    into = into_K.tolist()
    touched: set[int] = set()
    chosen: list[tuple[int, int, int]] = []
    place = 0
    for leaf in cheapest:
        while place < len(best) and best[place] in touched:
            place += 1
        if len(chosen) == most or place == len(best) or gain[best[place]] <= _LEAST_RATIO * cost[leaf]:
            break
        three = {leaf, into[leaf], best[place]}
        # An empty leaf is its own target, and nothing else.
        if len(three) < (2 if into[leaf] == leaf else 3) or three & touched:
            continue
        touched |= three
        chosen.append((leaf, into[leaf], best[place]))
    return Moves(*torch.tensor(chosen, dtype=torch.int64, device=cost_K.device).reshape(-1, 3).T)


def moved_centers(weights_K: Tensor, means_KD: Tensor, halves: Halves, moves: Moves) -> Tensor:
    """Return the (K, D) float64 centers after moves.

    Args:
        weights_K: (K,) float64 weights of the leaves.
        means_KD: (K, D) float64 means of the leaves.
        halves: of the leaves.
        moves: disjoint.
    """
    moved = means_KD.clone()
    w_a, w_b = weights_K[moves.merged_P, None], weights_K[moves.into_P, None]
    joined = (w_a * means_KD[moves.merged_P] + w_b * means_KD[moves.into_P]) / (w_a + w_b).clamp_min(1e-300)
    moved[moves.into_P] = joined
    moved[moves.merged_P] = halves.means_K2D[moves.split_P, 0]
    moved[moves.split_P] = halves.means_K2D[moves.split_P, 1]
    return moved


@dataclass(frozen=True)
class _Priced:
    """What each move of a partition costs and gains."""

    halves: Halves
    cost_K: Tensor
    into_K: Tensor
    gain_K: Tensor


def _price(
    blocks: Blocks,
    partition: Partition,
    *,
    all_sum: Callable[[Tensor], Tensor],
    share: Callable[[Tensor], Tensor],
    least_share: float,
) -> _Priced:
    """Return costs and gains, alike on every rank."""
    halves = split_leaves(blocks, partition, all_sum=all_sum)
    cost_K, into_K = merge_costs(partition.sums.weights_K, partition.means_KD)
    gain_K = torch.where(halves.share_K >= least_share, halves.gain_K, 0.0)
    cost_K, into_K, gain_K = share(torch.stack([cost_K, into_K.double(), gain_K])).unbind()
    return _Priced(halves, cost_K, into_K.long(), gain_K)


def partition_of(
    blocks: Blocks,
    centers_KD: Tensor,
    *,
    all_sum: Callable[[Tensor], Tensor],
    share: Callable[[Tensor], Tensor] = lambda values: values,
    seed: int = 0,
    keep_ids: bool = True,
) -> Partition:
    """Return the leaves that the rows' nearest centers make, with a first step toward the leaves' directions.

    Args:
        blocks: see `merge_and_split`.
        centers_KD: (K, D) float32 centers, the same on all ranks.
        all_sum: see `merge_and_split`.
        share: see `merge_and_split`.
        seed: of the vector from which the directions start.
        keep_ids: see `merge_and_split`.
    """
    dim = centers_KD.shape[1]
    probe_D = torch.randn(dim, generator=torch.Generator().manual_seed(seed)).to(centers_KD.device)
    sums = LeafSums.zeros(len(centers_KD), dim, centers_KD.device)
    power_KD = torch.zeros_like(sums.sums_KD)
    ids: list[Tensor] = []
    for z, weights in blocks():
        leaf, squared = (found[:, 0] for found in nearest(z, centers_KD))
        sums.add(z, leaf, squared, weights)
        _add_power(power_KD, z, leaf, weights, centers_KD, probe_D.expand_as(centers_KD))
        if keep_ids:
            ids.append(leaf.int())
    packed = all_sum(torch.cat([sums.packed(), power_KD], dim=1))
    sums, power_KD = LeafSums.unpacked(packed[:, : dim + 2]), packed[:, dim + 2 :]
    # Around the means: the scatter around another point is larger by what lies between the two.
    off_KD = sums.means(centers_KD) - centers_KD.double()
    power_KD = power_KD - (sums.weights_K * (off_KD @ probe_D.double()))[:, None] * off_KD
    sse = float(share(sums.sse_around_means(centers_KD).sum()[None])[0])
    return Partition(centers_KD=centers_KD, sums=sums, sse=sse, power_KD=power_KD, ids=ids if keep_ids else None)


def split_leaves(blocks: Blocks, partition: Partition, *, all_sum: Callable[[Tensor], Tensor]) -> Halves:
    """Return the two parts of every leaf of a partition, from three passes over the rows of all ranks.

    The first brings each leaf's direction nearer to its principal one. The second divides the leaf at its mean, across
    that direction. The third divides it midway between the means of the two parts.
    """
    means_KD = partition.means_KD.float()
    power_KD = torch.zeros_like(partition.power_KD)
    along_KD = _directions(partition.power_KD)
    for z, ids, weights in _with_leaves(blocks, partition):
        _add_power(power_KD, z, ids, weights, means_KD, along_KD)
    along_KD = _directions(all_sum(power_KD))
    halves = _halves(blocks, partition, along_KD, torch.zeros(len(means_KD), device=means_KD.device), all_sum)
    plane_KD = (halves.means_K2D[:, 1] - halves.means_K2D[:, 0]).float()
    midway_KD = halves.means_K2D.mean(dim=1).float() - means_KD
    return _halves(blocks, partition, plane_KD, torch.linalg.vecdot(midway_KD, plane_KD), all_sum)


def _halves(
    blocks: Blocks, partition: Partition, along_KD: Tensor, limit_K: Tensor, all_sum: Callable[[Tensor], Tensor]
) -> Halves:
    """Return the parts of each leaf whose rows, from its mean, reach at most and more than the limit along a vector."""
    means_KD = partition.means_KD
    num_leaves, dim = means_KD.shape
    origin_KD = means_KD.float()
    sums = LeafSums.zeros(2 * num_leaves, dim, means_KD.device)
    for z, ids, weights in _with_leaves(blocks, partition):
        size = cache_rows(z)
        for rows, leaf, w in zip(z.split(size), ids.split(size), weights.split(size), strict=True):
            off = rows - origin_KD[leaf]
            length = torch.linalg.vecdot(off, along_KD[leaf])
            sums.add(off, 2 * leaf + (length > limit_K[leaf]), length.square(), w)
    sums = LeafSums.unpacked(all_sum(sums.packed()))
    weights_K2 = sums.weights_K.view(num_leaves, 2)
    off_K2D = sums.means(torch.zeros_like(sums.sums_KD)).view(num_leaves, 2, dim)
    between_K = torch.linalg.vecdot(off_K2D[:, 1] - off_K2D[:, 0], along_KD.double()).square()
    between_K *= _ward(weights_K2[:, 0], weights_K2[:, 1])
    scatter_K = sums.sse_K.view(num_leaves, 2).sum(dim=1).clamp_min(1e-300)
    return Halves(weights_K2, origin_KD.double()[:, None] + off_K2D, between_K / scatter_K)


def _with_leaves(blocks: Blocks, partition: Partition) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the blocks with the leaf of each row: the kept one, or found anew."""
    if partition.ids is None:
        for z, weights in blocks():
            yield z, nearest(z, partition.centers_KD)[0][:, 0], weights
        return
    for (z, weights), ids in zip(blocks(), partition.ids, strict=True):
        yield z, ids.long(), weights


def _add_power(
    power_KD: Tensor, z_ND: Tensor, ids_N: Tensor, weights_N: Tensor, centers_KD: Tensor, along_KD: Tensor
) -> None:
    """Add to each leaf's vector its rows' scatter around the centers, times the leaf's vector."""
    size = cache_rows(z_ND)
    for z, ids, weights in zip(z_ND.split(size), ids_N.split(size), weights_N.split(size), strict=True):
        off = z - centers_KD[ids]
        length = torch.linalg.vecdot(off, along_KD[ids]) * weights
        power_KD.index_add_(0, ids, off.mul_(length[:, None]).double())


def _directions(power_KD: Tensor) -> Tensor:
    """Return the (K, D) float32 vectors at unit length."""
    return torch.nn.functional.normalize(power_KD, dim=1, eps=1e-300).float()


def _ward(w_a: Tensor, w_b: Tensor) -> Tensor:
    """Return w_a w_b / (w_a + w_b); 0 where both are 0."""
    return w_a * (w_b / (w_a + w_b).clamp_min(1e-30))
