"""k-means on the codes of all rows of all ranks: samples, the start, moves, Lloyd, the kernel's calibration.

Letters: N rows, K leaves, L width of the code.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.objectives.kernel import Kernel, calibrate
from raydc.core.objectives.snapshot import compact, encode
from raydc.core.search.kmeans import KMeans, MoveRound, leaf_sums, lloyd, reseed
from raydc.core.search.merge_split import merge_and_split
from raydc.core.search.nearest import nearest
from raydc.core.search.starts import first_centers, least_share, sample_kmeans
from raydc.core.training.collapse import mean_and_covariance, products
from raydc.core.training.collectives import Ranks
from raydc.core.training.epochs import Trainer
from raydc.core.training.rows import ResidentRows, RowStore
from raydc.core.training.settings import ClusterSettings

log = logging.getLogger(__name__)

_MARGIN = 1.1
"""Room for a random sample, as a multiple of the size that it was meant to have."""

_START_ROWS_PER_LEAF = 20
"""Rows of a sample for each leaf, at least: two fine leaves of ten."""

_ROUNDS, _SEARCHED_ROUNDS = 6, 2

Blocks = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def latent_blocks(trainer: Trainer, encoder: nn.Module | None, arithmetic: str, *, keep: bool = True) -> Blocks:
    """Return a source of (z, weights) blocks: codes are made in the first whole pass, and kept in memory for the next.

    Plain rows are made anew each time.

    Args:
        trainer: for the rows.
        encoder: None for the preprocessed rows.
        arithmetic: of the encoder.
        keep: False where one pass is all.
    """

    def anew() -> Iterator[tuple[Tensor, Tensor]]:
        for b in trainer.rows.blocks(trainer.block_rows):
            yield encode(encoder, trainer.preprocess(b.x_ND), arithmetic), b.weights_N

    if encoder is None or not keep:
        return anew
    whole: list[tuple[Tensor, Tensor]] = []

    def kept() -> Iterator[tuple[Tensor, Tensor]]:
        if not whole:
            codes: RowStore | None = None
            kept_weights = RowStore([], torch.float32, trainer.rows.num_local, trainer.ranks.device)
            for z, weights in anew():
                half = compact(z)
                codes = codes or RowStore(z.shape[1:], half.dtype, trainer.rows.num_local, z.device)
                codes.add(half)
                kept_weights.add(weights)
                yield z, weights
            if codes is not None:
                whole.append((codes.take(), kept_weights.take()))
            return
        (z_NL, weights_N), size = whole[0], trainer.block_rows
        for z, weights in zip(z_NL.split(size), weights_N.split(size), strict=True):
            yield z.float(), weights

    return kept


@dataclass
class Sample:
    """Some latents of all ranks, on rank 0 (CPU), in the order of the keys; no rows on the other ranks."""

    z_NL: Tensor
    weights_N: Tensor

    def shrink_to_calibrate(self, num_leaves: int) -> None:
        """Keep as many rows as a calibration takes, evenly spread: the start of k-means needs more, nothing after it.

        The bound keeps the (rows, K) distances small.
        """
        most = max(256, 20_000_000 // num_leaves)
        if len(self.z_NL) > most:
            kept = torch.from_numpy(np.linspace(0, len(self.z_NL) - 1, most).astype(np.int64))
            self.z_NL, self.weights_N = self.z_NL[kept], self.weights_N[kept]


def sample_latents(trainer: Trainer, encoder: nn.Module | None, num_rows: int) -> Sample:
    """Return a sample of about `num_rows` latents; of preprocessed rows where there is no encoder."""
    ranks, rows = trainer.ranks, trainer.rows
    fraction, seed = num_rows / max(rows.num_rows, 1), stream_seed(trainer.settings.seed, 6)
    width = rows.dim if encoder is None else trainer.settings.autoencoder.latent_dim
    share = int(_MARGIN * min(num_rows, rows.num_rows) / ranks.world_size)
    keys = RowStore([], torch.int64, share, ranks.device)
    values = RowStore([width], torch.float32, share, ranks.device)
    weights = RowStore([], torch.float32, share, ranks.device)
    for batch in rows.blocks(trainer.block_rows):
        chosen = torch.from_numpy(sample_mask(batch.keys_N.cpu().numpy(), seed, fraction)).to(batch.x_ND.device)
        keys.add(batch.keys_N[chosen])
        weights.add(batch.weights_N[chosen])
        values.add(encode(encoder, trainer.preprocess(batch.x_ND[chosen]), trainer.arithmetic))
    key_N, z_NL, weights_N = (ranks.gather_rows(store.take()) for store in (keys, values, weights))
    if bool((key_N[1:] >= key_N[:-1]).all()):
        return Sample(z_NL, weights_N)
    order = key_N.argsort()
    return Sample(z_NL[order], weights_N[order])


def shared_sample(trainer: Trainer, encoder: nn.Module | None, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """Return the latents of `sample_latents` on every rank, on the training device, and their weights; none for 0 rows.

    The weights are None where all are 1.
    """
    ranks = trainer.ranks
    if not num_rows:
        width = trainer.rows.dim if encoder is None else trainer.settings.autoencoder.latent_dim
        return torch.empty((0, width), device=ranks.device), None
    sample = sample_latents(trainer, encoder, num_rows)
    z_NL, weights_N = sample.z_NL, sample.weights_N
    size = int(ranks.broadcast(torch.tensor([len(z_NL)]))[0])
    if ranks.rank != 0:
        z_NL, weights_N = z_NL.new_empty((size, z_NL.shape[1])), weights_N.new_empty(size)
    z_NL, weights_N = (ranks.broadcast(values).to(ranks.device) for values in (z_NL, weights_N))
    return z_NL, None if bool((weights_N == 1.0).all()) else weights_N


def start_rows(plan: ClusterSettings) -> int:
    """Return how many rows to sample for a start: those that are set, and at least twenty for each leaf."""
    return max(plan.init_rows, _START_ROWS_PER_LEAF * plan.num_leaves)


def start_centers(
    trainer: Trainer, sample: Sample, seed: int, *, whole: bool = False, sampled_by: str = "cluster.init_rows"
) -> Tensor:
    """Return the (K, L) centers of the k-means start on rank 0's sample, on every rank (CPU).

    Args:
        trainer: for the settings and the ranks.
        sample: on rank 0.
        seed: of the start.
        whole: go on to the end of k-means on the sample, where no passes over all rows follow.
        sampled_by: field of FitSettings that decides the size of the sample, for the message.

    Raises:
        ValueError: the sample has fewer rows than there are leaves.
    """
    ranks, plan = trainer.ranks, trainer.settings.cluster
    size = int(ranks.broadcast(torch.tensor([len(sample.z_NL)]))[0])
    if size < plan.num_leaves:
        raise ValueError(
            f"the k-means start has a sample of {size} rows for {plan.num_leaves} leaves. Raise {sampled_by}."
        )
    if ranks.rank == 0:
        options: dict[str, Any] = {"seed": seed, "how": plan.start, "num_restarts": plan.num_restarts}
        options["weights_N"] = sample.weights_N
        if whole:
            centers = sample_kmeans(sample.z_NL, plan.num_leaves, moves=plan.moves, **options)
        else:
            centers = first_centers(sample.z_NL, plan.num_leaves, **options)
    else:
        centers = torch.empty(plan.num_leaves, sample.z_NL.shape[1])
    return ranks.broadcast(centers)


def find_optimum(
    trainer: Trainer, blocks: Blocks, centers_KL: Tensor, generator: torch.Generator, *, keep_ids: bool
) -> KMeans:
    """Return k-means over all rows of all ranks from its start: merge-and-split moves, if they are on, and Lloyd.

    Args:
        trainer: for the settings and the ranks.
        blocks: gives this rank's codes and weights, anew at each call.
        centers_KL: the start.
        generator: CPU generator in the same state on all ranks.
        keep_ids: whether blocks() gives the same rows each time; else every pass of a round searches the nearest center
            anew, and two rounds are all.
    """
    ranks, plan = trainer.ranks, trainer.settings.cluster
    separation = least_share(plan.moves, plan.start, plan.num_leaves)
    if separation is None:
        return run_lloyd(trainer, blocks, centers_KL, generator)
    moved = merge_and_split(
        blocks,
        centers_KL.to(ranks.device),
        all_sum=ranks.sum,
        share=ranks.broadcast,
        seed=stream_seed(trainer.settings.seed, 17),
        num_rounds=_ROUNDS if keep_ids else _SEARCHED_ROUNDS,
        least_share=separation,
        keep_ids=keep_ids,
        on_round=_log_round if ranks.rank == 0 else None,
    )
    return replace(run_lloyd(trainer, blocks, moved.centers_KD, generator), rounds=moved.rounds)


def _log_round(number: int, done: MoveRound) -> None:
    log.info(
        "k-means moves: round %d, %d merges and splits %s, SSE %.6g -> %.6g",
        number,
        done.num_moves,
        "kept" if done.kept else "undone",
        done.before,
        done.after,
    )


def same_rows_each_pass(trainer: Trainer, encoder: nn.Module | None) -> bool:
    """Return whether `latent_blocks` gives the same rows in each pass: kept codes, or rows in memory."""
    return encoder is not None or isinstance(trainer.rows, ResidentRows)


def run_lloyd(
    trainer: Trainer,
    blocks: Blocks,
    centers_KL: Tensor,
    generator: torch.Generator,
) -> KMeans:
    """Return Lloyd's result over all rows of all ranks; see `raydc.core.search.kmeans.lloyd`."""
    plan = trainer.settings.cluster
    return lloyd(
        blocks,
        centers_KL.to(trainer.ranks.device),
        all_sum=trainer.ranks.sum,
        generator=generator,
        num_iterations=plan.num_iterations,
        tolerance=plan.tolerance,
    )


def cluster(
    trainer: Trainer, blocks: Blocks, sample: Sample, generator: torch.Generator, *, keep_ids: bool = True
) -> KMeans:
    """Return the k-means of all rows of all ranks, among the codes or among their directions; centers are codes.

    Args:
        trainer: for the settings and the ranks.
        blocks: gives this rank's codes and weights, anew at each call.
        sample: for the start; shrunk after it.
        generator: CPU generator in the same state on all ranks.
        keep_ids: see `find_optimum`.
    """
    seed = stream_seed(trainer.settings.seed, 4)
    if trainer.settings.cluster.space == "codes":
        first = start_centers(trainer, sample, seed)
        sample.shrink_to_calibrate(len(first))
        return find_optimum(trainer, blocks, first, generator, keep_ids=keep_ids)
    ranks = trainer.ranks
    to_directions = Directions.from_blocks(blocks(), sample.z_NL.shape[1], ranks)
    first = start_centers(trainer, Sample(to_directions(sample.z_NL), sample.weights_N), seed)
    sample.shrink_to_calibrate(len(first))

    def turned_blocks() -> Iterator[tuple[Tensor, Tensor]]:
        return ((to_directions(z), weights) for z, weights in blocks())

    kmeans = find_optimum(trainer, turned_blocks, first, generator, keep_ids=keep_ids)

    def assign(z_NL: Tensor) -> tuple[Tensor, Tensor]:
        return nearest(to_directions(z_NL), kmeans.centers_KD)[0][:, 0], z_NL.square().sum(dim=1)

    # Distances to the origin, from which those to the means follow when these are known.
    origin = torch.zeros_like(kmeans.centers_KD)
    sums = leaf_sums(blocks(), origin, all_sum=ranks.sum, assign=assign)
    sums = replace(sums, sse_K=sums.sse_around_means(origin))
    centers = reseed(sums.means(origin).float(), sums, generator)
    return replace(kmeans, centers_KD=centers, inertia=float(sums.sse_K.sum()))


_LEAST_VARIANCE = 1e-6
"""Least variance of an axis, as a share of the largest. Below it an axis holds rounding and is left out."""


@dataclass(frozen=True)
class Directions:
    """Codes whitened and scaled to unit length: W (z - mean) / |W (z - mean)|, W W the inverse of their covariance.

    Source: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features",
    arXiv:1807.05520, whose features are whitened and l2-normalized before k-means.
    """

    mean_L: Tensor
    whiten_LL: Tensor

    @classmethod
    def from_blocks(cls, blocks: Iterable[tuple[Tensor, Tensor]], width: int, ranks: Ranks) -> "Directions":
        """Return those of all rows of all ranks, from float64 sums."""
        sums = torch.zeros(1 + width, 1 + width, dtype=torch.float64, device=ranks.device)
        for z, weights in blocks:
            sums += products(z, weights)
        mean, covariance = mean_and_covariance(ranks.sum(sums))
        variances, axes = torch.linalg.eigh(covariance)
        kept = variances > _LEAST_VARIANCE * variances.max()
        widths = torch.where(kept, variances.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        # Turned back, so that it does not depend on which way an axis points.
        return cls(mean.float(), ((axes * widths) @ axes.T).float())

    def __call__(self, z_NL: Tensor) -> Tensor:
        """Return the (N, L) directions of codes; of the mean itself zeros."""
        whitened = (z_NL - self.mean_L.to(z_NL.device)) @ self.whiten_LL.to(z_NL.device)
        return nn.functional.normalize(whitened, dim=1)


def calibrated(trainer: Trainer, sample: Sample, centers_KL: Tensor) -> tuple[Kernel, float]:
    """Return the kernel that goes with centers, by rank 0's sample, and its mean largest q; the same on every rank.

    The sample is shrunk.
    """
    ranks, plan = trainer.ranks, trainer.settings.refine
    sample.shrink_to_calibrate(len(centers_KL))
    numbers = torch.zeros(3, dtype=torch.float64)
    if ranks.rank == 0:
        kernel, top_q = calibrate(
            sample.z_NL,
            centers_KL.cpu(),
            target_top_q=plan.target_top_q,
            alpha=None if plan.alpha == "auto" else float(plan.alpha),
            scale=None if plan.scale == "auto" else float(plan.scale),
            weights_N=sample.weights_N,
        )
        numbers = torch.tensor([kernel.alpha, kernel.scale, top_q], dtype=torch.float64)
    alpha, scale, top_q = ranks.broadcast(numbers).tolist()
    return Kernel(alpha, scale), top_q
