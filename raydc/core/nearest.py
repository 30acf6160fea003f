"""Nearest centres. Letters: N rows, K centres, D width of a row.

FAISS searches on the CPU, a blocked matrix product on the GPU. Both work on rows and centres from which the mean of the
centres was subtracted: |z|^2 - 2 z.c + |c|^2 loses all digits when the rows share a large offset.
"""

import numpy as np
import torch

# torch before faiss: the other order gives the two libraries separate thread settings.
import faiss  # isort: skip
from torch import Tensor


def prepare_process(num_threads: int) -> None:
    """Let torch and FAISS compute on this many threads, and treat denormal numbers as zero, in the present process.

    Late in training the moments of the optimiser and the small gradients of the KL become denormal, which a CPU
    multiplies up to a hundred times slower; as numbers below 1e-38 they carry nothing.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(num_threads)
    faiss.omp_set_num_threads(num_threads)


def nearest(z_ND: Tensor, centers_KD: Tensor, *, num: int = 1, block_rows: int = 16384) -> tuple[Tensor, Tensor]:
    """Return the ids (N, num) int64 and squared distances (N, num) float32 of the nearest centres, nearest first.

    Args:
        z_ND: (N, D) float32.
        centers_KD: (K, D) float32, same device.
        num: neighbours per row, at most K.
        block_rows: rows at once on the GPU; peak memory 4 * block_rows * K bytes.

    Raises:
        ValueError: the two inputs do not share D, or num exceeds K.
    """
    if z_ND.shape[1] != centers_KD.shape[1]:
        raise ValueError(f"rows have {z_ND.shape[1]} dimensions, centres {centers_KD.shape[1]}")
    if num > len(centers_KD):
        raise ValueError(f"{num} neighbours asked of {len(centers_KD)} centres")
    shift = centers_KD.mean(dim=0)
    z, centers = (z_ND - shift).contiguous(), (centers_KD - shift).contiguous()
    if not len(z):
        return torch.empty((0, num), dtype=torch.int64, device=z.device), z.new_empty((0, num))
    if z.device.type == "cpu":
        squared, ids = faiss.knn(z.numpy(), centers.numpy(), num)
        return torch.from_numpy(ids), torch.from_numpy(np.maximum(squared, 0.0))
    parts = [_nearest_block(block, centers, num) for block in z.split(block_rows)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([d for _, d in parts])


def nearest_exact(z_ND: Tensor, centers_KD: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
    """Return the same as `nearest`, decided by float64 differences, squared distances in float64.

    The search in float32 proposes one candidate more than asked; they are ranked anew by sum((z - c)^2), ties by the
    lower id. So a row's answer does not depend on the rows beside it or on the block size.
    """
    proposed = min(num + 1, len(centers_KD))
    ids, _ = nearest(z_ND, centers_KD, num=proposed)
    ids = ids.sort(dim=1).values
    z = z_ND.double()
    squared = torch.stack([((z - centers_KD[ids[:, m]].double()) ** 2).sum(dim=1) for m in range(proposed)], dim=1)
    order = squared.argsort(dim=1, stable=True)[:, :num]
    return ids.gather(1, order), squared.gather(1, order)


def squared_distances(z_ND: Tensor, centers_KD: Tensor) -> Tensor:
    """Return the (N, K) squared distances, float32, never negative, with gradients for both inputs.

    Raises:
        ValueError: the two inputs do not share D.
    """
    if z_ND.shape[1] != centers_KD.shape[1]:
        raise ValueError(f"rows have {z_ND.shape[1]} dimensions, centres {centers_KD.shape[1]}")
    shift = centers_KD.detach().mean(dim=0)
    z, centers = z_ND - shift, centers_KD - shift
    cross = z @ centers.T
    return ((z**2).sum(dim=1, keepdim=True) - 2.0 * cross + (centers**2).sum(dim=1)).clamp_min(0.0)


def own_and_other(z_ND: Tensor, centers_KD: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's distance (N,) to its own group's centre and to the nearest other one (its own, for K = 1)."""
    distances = squared_distances(z_ND, centers_KD).sqrt()
    column = group_N[:, None]
    own = distances.gather(1, column)[:, 0]
    if len(centers_KD) == 1:
        return own, own
    return own, distances.scatter(1, column, torch.inf).min(dim=1).values


def _nearest_block(z_BD: Tensor, centers_KD: Tensor, num: int) -> tuple[Tensor, Tensor]:
    squared, ids = squared_distances(z_BD, centers_KD).topk(num, dim=1, largest=False, sorted=True)
    return ids, squared
