"""k-means: a FAISS start on a sample, then Lloyd over all rows. Letters: N rows, K leaves, D width of a row."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydc.core.search.nearest import cache_rows, nearest

import faiss  # isort: skip

_FAISS_ITERATIONS = 25
"""Iterations of a FAISS start."""

_SAME_INERTIA = 1e-6
"""Share of the inertia below which two starts count as equal."""

_BLOCK_ROWS = 16384
"""Rows whose distances are taken at once."""


@dataclass(frozen=True)
class LeafSums:
    """Additive statistics of rows under one set of centers, in float64: adding two gives those of the rows together."""

    weights_K: Tensor
    """Sum of row weights."""

    sums_KD: Tensor
    """Weighted sum of rows."""

    sse_K: Tensor
    """Weighted sum of squared distances to the center."""

    @classmethod
    def zeros(cls, num_leaves: int, dim: int, device: torch.device) -> "LeafSums":
        """Return the statistics of no rows."""
        per_leaf = torch.zeros(num_leaves, dtype=torch.float64, device=device)
        return cls(per_leaf, torch.zeros(num_leaves, dim, dtype=torch.float64, device=device), per_leaf.clone())

    def add(self, z_ND: Tensor, ids_N: Tensor, squared_N: Tensor, weights_N: Tensor) -> None:
        """Add rows in place."""
        w = weights_N.double()
        self.weights_K.index_add_(0, ids_N, w)
        self.sse_K.index_add_(0, ids_N, squared_N.double() * w)
        # Block by block, on the CPU: as float64 all rows at once would go through memory twice more.
        size = cache_rows(z_ND)
        room = torch.empty(min(size, len(z_ND)), z_ND.shape[1], dtype=torch.float64, device=z_ND.device)
        for ids, z, weights in zip(ids_N.split(size), z_ND.split(size), w.split(size), strict=True):
            self.sums_KD.index_add_(0, ids, torch.mul(z, weights[:, None], out=room[: len(z)]))

    def packed(self) -> Tensor:
        """Return all numbers as one (K, D + 2) tensor, for one all-reduce."""
        return torch.cat([self.weights_K[:, None], self.sums_KD, self.sse_K[:, None]], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "LeafSums":
        """Return the statistics that `packed` gave."""
        return cls(packed[:, 0], packed[:, 1:-1], packed[:, -1])

    def means(self, fallback_KD: Tensor) -> Tensor:
        """Return the (K, D) float64 mean of each leaf; of an empty one its row of `fallback_KD`."""
        means = self.sums_KD / self.weights_K.clamp_min(1e-300)[:, None]
        return torch.where((self.weights_K > 0)[:, None], means, fallback_KD.double())

    def sse_around_means(self, centers_KD: Tensor) -> Tensor:
        """Return the (K,) float64 SSE of each leaf around its own mean; `centers_KD` are those of `sse_K`."""
        moved = ((self.means(centers_KD) - centers_KD.double()) ** 2).sum(dim=1)
        return (self.sse_K - self.weights_K * moved).clamp_min(0.0)


@dataclass(frozen=True, kw_only=True)
class MoveRound:
    """One round of merge-and-split moves."""

    num_moves: int
    before: float
    """SSE before it."""

    after: float
    """SSE after it and two of Lloyd's iterations."""

    kept: bool
    """Whether the SSE fell; else the moves were undone."""


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Result of Lloyd's iterations, and of the moves before them."""

    centers_KD: Tensor
    """(K, D) float32."""

    inertia: float
    """Weighted sum of squared distances to the nearest center, before the last update."""

    num_iterations: int
    num_reseeded: int
    """Empty leaves that were given new centers on the way."""

    rounds: tuple[MoveRound, ...] = ()
    """Rounds of merge-and-split moves, where some were tried."""


def start(
    sample_ND: Tensor,
    num_leaves: int,
    *,
    num_restarts: int,
    seed: int,
    weights_N: Tensor | None = None,
    num_iterations: int = _FAISS_ITERATIONS,
    init: Literal["random", "afk_mc2"] = "afk_mc2",
) -> Tensor:
    """Return the (K, D) float32 centers of the best of several FAISS k-means runs on a sample.

    FAISS sums its objective in float32, which stands still at 2^24; the restarts are compared by our own inertia.

    Args:
        sample_ND: (N, D) float32 on the CPU, N >= K; all of it is used.
        num_leaves: K.
        num_restarts: runs, each with its own seed.
        seed: of the first run.
        weights_N: (N,) float32 row weights; None for 1 each.
        num_iterations: of each run.
        init: see `faiss_kmeans`.

    Raises:
        ValueError: fewer rows than leaves.
    """
    if len(sample_ND) < num_leaves:
        raise ValueError(f"{num_leaves} leaves need at least as many rows, the sample has {len(sample_ND)}")
    shift = _offset(sample_ND)
    rows = sample_ND if shift is None else sample_ND - shift
    weights = None if weights_N is None or bool((weights_N == 1.0).all()) else weights_N
    best, least = None, math.inf
    for restart in range(num_restarts):
        centers = faiss_kmeans(
            rows,
            num_leaves,
            weights_N=weights,
            num_iterations=num_iterations,
            seed=seed + restart,
            init=init,
        )
        blocks = rows.split(_BLOCK_ROWS)
        squared = torch.cat([nearest(block, centers)[1][:, 0] for block in blocks]).double()
        inertia = float(squared.sum() if weights_N is None else squared @ weights_N.double())
        # Two starts that end with the same leaves, in another order, differ by rounding, which must not choose.
        if inertia < least * (1.0 - _SAME_INERTIA):
            best, least = centers, inertia
    assert best is not None
    return best if shift is None else best + shift


def faiss_kmeans(
    rows_ND: Tensor,
    num_leaves: int,
    *,
    num_iterations: int,
    seed: int,
    init: Literal["random", "afk_mc2"],
    weights_N: Tensor | None = None,
) -> Tensor:
    """Return the (K, D) float32 centers of one FAISS k-means on all of the rows.

    Args:
        rows_ND: (N, D) float32 on the CPU, N >= K, their mean near the origin.
        num_leaves: K.
        num_iterations: Lloyd's.
        seed: FAISS takes it modulo 2^31 - 1.
        init: random rows, or AFK-MC2's, which come close to k-means++ at the price of random ones (Bachem et al., NIPS
            2016).
        weights_N: (N,) float32; None for 1 each.
    """
    kmeans = faiss.Kmeans(
        rows_ND.shape[1],
        num_leaves,
        niter=num_iterations,
        seed=seed % (2**31 - 1),
        init_method=faiss.ClusteringInitMethod_RANDOM if init == "random" else faiss.ClusteringInitMethod_AFK_MC2,
        # FAISS subsamples beyond this without saying so; the rows are a sample already.
        max_points_per_centroid=len(rows_ND),
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(rows_ND.numpy(), np.float32), None if weights_N is None else weights_N.numpy())
    return torch.from_numpy(np.array(kmeans.centroids))


def _offset(z_ND: Tensor) -> Tensor | None:
    """Return the (D,) mean of rows if it is longer than they are spread around it; else None.

    FAISS takes |z|^2 - 2 z.c + |c|^2, which loses digits where rows share such an offset. Without it no copy is needed.
    """
    mean_D, square = torch.zeros(z_ND.shape[1], dtype=torch.float64), 0.0
    for block in z_ND.split(cache_rows(z_ND)):
        z = block.double()
        mean_D += z.sum(dim=0) / len(z_ND)
        square += float(z.square().sum()) / len(z_ND)
    return mean_D.float() if 2.0 * float(mean_D @ mean_D) > square else None


def lloyd(
    blocks: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    centers_KD: Tensor,
    *,
    all_sum: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    num_iterations: int,
    tolerance: float,
    on_iteration: Callable[[int, float], None] | None = None,
) -> KMeans:
    """Return the centers after Lloyd's iterations over all rows of all ranks.

    Args:
        blocks: gives this rank's rows as (z (n, D) float32, weights (n,)) blocks, anew at each call.
        centers_KD: (K, D) float32 start, the same on all ranks.
        all_sum: elementwise sum over the ranks; the identity for one.
        generator: CPU generator in the same state on all ranks; it moves re-seeded centers.
        num_iterations: most passes.
        tolerance: stop when the inertia falls by a smaller share than this, be leaves empty or not.
        on_iteration: called with (iteration, inertia).

    Source: Lloyd, "Least squares quantization in PCM", 1982. Empty leaves are re-seeded beside the leaf of largest SSE,
    from the reduced sums alone, so that all ranks move them alike.
    """
    centers, previous = centers_KD.clone(), math.inf
    inertia, reseeded, iteration = math.inf, 0, 0
    for iteration in range(1, num_iterations + 1):
        sums = leaf_sums(blocks(), centers, all_sum=all_sum)
        inertia = float(sums.sse_K.sum())
        if on_iteration:
            on_iteration(iteration, inertia)
        centers = sums.means(centers).float()
        # With fewer distinct rows than leaves some are empty for ever: they must not keep the iterations going.
        settled = math.isfinite(previous) and previous - inertia <= tolerance * previous
        num_empty = int((sums.weights_K == 0).sum())
        if num_empty and not settled:
            centers = reseed(centers, sums, generator)
            reseeded += num_empty
        if settled:
            break
        previous = inertia
    return KMeans(centers_KD=centers, inertia=inertia, num_iterations=iteration, num_reseeded=reseeded)


def leaf_sums(
    blocks: Iterable[tuple[Tensor, Tensor]],
    centers_KD: Tensor,
    *,
    all_sum: Callable[[Tensor], Tensor],
    assign: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> LeafSums:
    """Return the statistics of all rows of all ranks.

    `assign` gives the leaf (n,) of each point and its squared distance (n,) to that leaf's center; by default the
    nearest center.
    """
    sums = LeafSums.zeros(centers_KD.shape[0], centers_KD.shape[1], centers_KD.device)
    for z, weights in blocks:
        if assign is not None:
            leaf, to_own = assign(z)
        else:
            ids, squared = nearest(z, centers_KD)
            leaf, to_own = ids[:, 0], squared[:, 0]
        sums.add(z, leaf, to_own, weights)
    return LeafSums.unpacked(all_sum(sums.packed()))


def reseed(centers_KD: Tensor, sums: LeafSums, generator: torch.Generator) -> Tensor:
    """Return the centers with those of empty leaves moved beside the leaves of largest SSE.

    Args:
        centers_KD: (K, D), of any float type.
        sums: statistics of all rows of all ranks; at least one leaf has rows.
        generator: CPU generator in the same state on all ranks.
    """
    empty = torch.nonzero(sums.weights_K == 0)[:, 0]
    donors = sums.sse_K.argsort(descending=True, stable=True)
    donors = donors[sums.weights_K[donors] > 0]
    donors = donors[torch.arange(len(empty), device=donors.device) % len(donors)]
    spread = (sums.sse_K[donors] / sums.weights_K[donors] / centers_KD.shape[1]).sqrt()
    signs = torch.randint(0, 2, (len(empty), centers_KD.shape[1]), generator=generator).to(centers_KD.device) * 2 - 1
    moved = centers_KD.clone()
    # A tenth of the leaf's spread: near enough to share its rows, far enough to take some.
    moved[empty] = (centers_KD[donors].double() + 0.1 * spread[:, None] * signs).to(centers_KD.dtype)
    return moved
