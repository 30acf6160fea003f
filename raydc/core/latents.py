"""k-means on the codes of all rows of all ranks: samples, the FAISS start, Lloyd, the kernel's calibration.

Letters: N rows, K leaves, L width of the code.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.kmeans import KMeans, lloyd, start
from raydc.core.objectives.kernel import Kernel, calibrate
from raydc.core.objectives.snapshot import encode
from raydc.core.trainer import Trainer


def latent_blocks(
    trainer: Trainer, encoder: nn.Module | None, arithmetic: str
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Return a source of (z, weights) blocks: codes are kept in memory, plain rows are read again each time."""
    rows, preprocess, size = trainer.rows, trainer.preprocess, trainer.settings.block_rows
    if encoder is None:
        return lambda: ((preprocess(b.x_ND), b.weights_N) for b in rows.blocks(size))
    kept = [(encode(encoder, preprocess(b.x_ND), arithmetic), b.weights_N) for b in rows.blocks(size)]
    return lambda: iter(kept)


def sample_latents(trainer: Trainer, encoder: nn.Module | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return about `num_rows` latents of all ranks and their weights, on rank 0 (CPU), in the order of the keys.

    Preprocessed rows where there is no encoder; no rows on the other ranks.
    """
    ranks, rows = trainer.ranks, trainer.rows
    fraction, seed = num_rows / max(rows.num_rows, 1), stream_seed(trainer.settings.seed, 6)
    width = rows.dim if encoder is None else trainer.settings.latent_dim
    keys = [torch.empty(0, dtype=torch.int64, device=ranks.device)]
    values, weights = [torch.empty((0, width), device=ranks.device)], [torch.empty(0, device=ranks.device)]
    for batch in rows.blocks(trainer.settings.block_rows):
        chosen = torch.from_numpy(sample_mask(batch.keys_N.cpu().numpy(), seed, fraction)).to(batch.x_ND.device)
        keys.append(batch.keys_N[chosen])
        weights.append(batch.weights_N[chosen])
        values.append(encode(encoder, trainer.preprocess(batch.x_ND[chosen]), trainer.arithmetic))
    order = ranks.gather_rows(torch.cat(keys)).argsort()
    return ranks.gather_rows(torch.cat(values))[order], ranks.gather_rows(torch.cat(weights))[order]


def shared_sample(trainer: Trainer, encoder: nn.Module | None, num_rows: int) -> Tensor:
    """Return the latents of `sample_latents` on every rank, on the training device; none for 0 rows."""
    ranks = trainer.ranks
    if not num_rows:
        width = trainer.rows.dim if encoder is None else trainer.settings.latent_dim
        return torch.empty((0, width), device=ranks.device)
    sample, _ = sample_latents(trainer, encoder, num_rows)
    size = int(ranks.broadcast(torch.tensor([len(sample)]))[0])
    return ranks.broadcast(sample if ranks.rank == 0 else sample.new_empty((size, sample.shape[1]))).to(ranks.device)


def faiss_start(trainer: Trainer, sample: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """Return the (K, L) centres of FAISS k-means on rank 0's sample, on every rank (CPU).

    Raises:
        ValueError: the sample has fewer rows than there are leaves.
    """
    ranks, plan = trainer.ranks, trainer.settings.cluster
    z_NL, weights_N = sample
    size = int(ranks.broadcast(torch.tensor([len(z_NL)]))[0])
    if size < plan.num_leaves:
        raise ValueError(
            f"the k-means start has a sample of {size} rows for {plan.num_leaves} leaves. "
            "Raise cluster.init_rows and evaluate.baseline_rows."
        )
    if ranks.rank == 0:
        centers = start(z_NL, plan.num_leaves, num_restarts=plan.num_restarts, seed=seed, weights_N=weights_N)
    else:
        centers = torch.empty(plan.num_leaves, z_NL.shape[1])
    return ranks.broadcast(centers)


def run_lloyd(
    trainer: Trainer,
    blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    centers_KL: Tensor,
    generator: torch.Generator,
) -> KMeans:
    """Return Lloyd's result over all rows of all ranks; see `raydc.core.kmeans.lloyd`."""
    plan = trainer.settings.cluster
    return lloyd(
        blocks,
        centers_KL.to(trainer.ranks.device),
        all_sum=trainer.ranks.sum,
        generator=generator,
        num_iterations=plan.num_iterations,
        tolerance=plan.tolerance,
    )


def calibrated(trainer: Trainer, sample: tuple[Tensor, Tensor], centers_KL: Tensor) -> tuple[Kernel, float]:
    """Return the kernel that goes with centres, by rank 0's sample, and its mean largest q; the same on every rank."""
    ranks, plan = trainer.ranks, trainer.settings.refine
    z_NL, weights_N = sample
    numbers = torch.zeros(3, dtype=torch.float64)
    if ranks.rank == 0:
        # The first rows by key are a random sample already; the bound keeps the (rows, K) distances small.
        most = max(256, 20_000_000 // len(centers_KL))
        spread = torch.from_numpy(np.linspace(0, len(z_NL) - 1, min(most, len(z_NL))).astype(np.int64))
        kernel, top_q = calibrate(
            z_NL[spread],
            centers_KL.cpu(),
            target_top_q=plan.target_top_q,
            alpha=None if plan.alpha == "auto" else float(plan.alpha),
            scale=None if plan.scale == "auto" else float(plan.scale),
            weights_N=weights_N[spread],
        )
        numbers = torch.tensor([kernel.alpha, kernel.scale, top_q], dtype=torch.float64)
    alpha, scale, top_q = ranks.broadcast(numbers).tolist()
    return Kernel(alpha, scale), top_q
