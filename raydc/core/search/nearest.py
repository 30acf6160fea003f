"""Nearest centers. Letters: N rows, K centers, D width of a row.

FAISS searches on the CPU, or nearest_bf16.py where it has a matrix unit; a blocked matrix product on the GPU. All
subtract the mean of the centers from rows and centers first: |z|^2 - 2 z.c + |c|^2 loses all digits when the rows share
a large offset.
"""

import numpy as np
import torch

# torch before faiss: the other order gives the two libraries separate thread settings.
import faiss  # isort: skip
from torch import Tensor

from raydc.core.search.nearest_bf16 import can_screen, screened_nearest

_CACHE_NUMBERS = 2**18
"""Numbers of a block that stays in the second cache of a core: one or two MiB."""

_LEAST_ROWS = 16
"""Rows of a product at least: fewer are multiplied in another way, with other last bits."""


def nearest(z_ND: Tensor, centers_KD: Tensor, *, num: int = 1, block_rows: int = 16384) -> tuple[Tensor, Tensor]:
    """Return the ids (N, num) int64 and squared distances (N, num) float32 of the nearest centers, nearest first.

    Args:
        z_ND: (N, D) float32.
        centers_KD: (K, D) float32, same device.
        num: neighbors per row, at most K.
        block_rows: rows at once on the GPU; peak memory 4 * block_rows * K bytes.

    Raises:
        ValueError: the two inputs do not share D, or num exceeds K.
    """
    if z_ND.shape[1] != centers_KD.shape[1]:
        raise ValueError(f"rows have {z_ND.shape[1]} dimensions, centers {centers_KD.shape[1]}")
    if num > len(centers_KD):
        raise ValueError(f"{num} neighbors asked of {len(centers_KD)} centers")
    if num == 1 and can_screen(z_ND, centers_KD):
        ids_N, squared_N = screened_nearest(z_ND, centers_KD)
        return ids_N[:, None], squared_N[:, None]
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
    ids, _ = nearest(z_ND, centers_KD, num=min(num + 1, len(centers_KD)))
    return rank_exactly(z_ND, centers_KD, ids, num=num)


def rank_exactly(z_ND: Tensor, centers_KD: Tensor, proposed_NM: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
    """Return the nearest `num` of the proposed centers of each row, by float64 differences, ties by the lower id.

    Args:
        z_ND: (N, D) float32.
        centers_KD: (K, D) float32, same device.
        proposed_NM: (N, M) int64 ids of centers, M at least num.
        num: of these.

    Returns:
        Ids (N, num) int64 and squared distances (N, num) float64.
    """
    ids = proposed_NM.sort(dim=1).values
    squared = torch.empty(ids.shape, dtype=torch.float64, device=z_ND.device)
    # The differences of a block stay in the cache: those of all rows would go through memory several times.
    size = cache_rows(z_ND)
    for rows, of_rows, out in zip(z_ND.split(size), ids.split(size), squared.split(size), strict=True):
        z = rows.double()
        for m in range(ids.shape[1]):
            # Both sides in float64: a difference of two types takes twice the time.
            apart = centers_KD.index_select(0, of_rows[:, m]).double()
            torch.sum(apart.sub_(z).square_(), dim=1, out=out[:, m])
    order = squared.argsort(dim=1, stable=True)[:, :num]
    return ids.gather(1, order), squared.gather(1, order)


def cache_rows(x_ND: Tensor, width: int | None = None) -> int:
    """Return how many of these rows to work on at once: on a CPU as many as stay in a core's cache, elsewhere all.

    Args:
        x_ND: (N, D) rows.
        width: numbers that a row takes at once; D by default.
    """
    if x_ND.device.type != "cpu":
        return max(1, len(x_ND))
    return min(8192, max(64, _CACHE_NUMBERS // max(x_ND.shape[1] if width is None else width, 1)))


def squared_distances(z_ND: Tensor, centers_KD: Tensor) -> Tensor:
    """Return the (N, K) squared distances, float32, never negative, with gradients for both inputs.

    Raises:
        ValueError: the two inputs do not share D.
    """
    if z_ND.shape[1] != centers_KD.shape[1]:
        raise ValueError(f"rows have {z_ND.shape[1]} dimensions, centers {centers_KD.shape[1]}")
    shift = centers_KD.detach().mean(dim=0)
    z, centers = z_ND - shift, centers_KD - shift
    cross = z @ centers.T
    return ((z**2).sum(dim=1, keepdim=True) - 2.0 * cross + (centers**2).sum(dim=1)).clamp_min(0.0)


class SquaredDistances:
    """Squared distances to fixed centers, without gradients: what they need of the centers is computed once."""

    def __init__(self, centers_KD: Tensor) -> None:
        self._centers_KD = centers_KD
        self._shift = centers_KD.mean(dim=0)
        centers = centers_KD - self._shift
        self._minus_twice_DK = (-2.0 * centers).T.contiguous()
        self._square_K = (centers**2).sum(dim=1)
        self._largest = float(self._square_K.max().sqrt())

    def __call__(self, z_ND: Tensor) -> Tensor:
        """Return the (N, K) squared distances of (N, D) rows, float32, never negative.

        Raises:
            ValueError: the rows do not share D.
        """
        if z_ND.shape[1] != len(self._shift):
            raise ValueError(f"rows have {z_ND.shape[1]} dimensions, centers {len(self._shift)}")
        if len(z_ND) < _LEAST_ROWS:
            # A product of few rows takes another way, with other last bits, than the same rows among many.
            padded = z_ND.new_zeros(_LEAST_ROWS, z_ND.shape[1])
            padded[: len(z_ND)] = z_ND
            return self(padded)[: len(z_ND)]
        z = z_ND - self._shift
        square_N1 = torch.linalg.vecdot(z, z)[:, None]
        return (z @ self._minus_twice_DK).add_(self._square_K).add_(square_N1).clamp_min_(0.0)

    def nearest(self, z_ND: Tensor, squared_NK: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the nearest `num` centers of each row, by float64 differences, ties by the lower id.

        Float64 looks at as many centers as float32 cannot tell from the nearest ones: most often at none but those.

        Args:
            z_ND: (N, D) rows.
            squared_NK: what calling this with them gave.
            num: at most K.

        Returns:
            Ids (N, num) int64 and squared distances (N, num) float64.
        """
        num_centers = len(self._square_K)
        proposed = min(num + 2, num_centers)
        values, ids = squared_NK.topk(proposed, dim=1, largest=False, sorted=True)
        best, squared = rank_exactly(z_ND, self._centers_KD, ids[:, :num], num=num)
        if proposed == num:
            return best, squared
        # Rounding grows like the square root of the number of terms; 8 is generous beside what was seen.
        slack = 8.0 * z_ND.shape[1] ** 0.5 * torch.finfo(z_ND.dtype).eps
        reach = (torch.linalg.vector_norm(z_ND - self._shift, dim=1) + self._largest).square_().mul_(slack)
        in_doubt = torch.nonzero(values[:, num] - values[:, num - 1] <= reach)[:, 0]
        if len(in_doubt):
            rows, candidates = z_ND[in_doubt], ids[in_doubt]
            best[in_doubt], squared[in_doubt] = rank_exactly(rows, self._centers_KD, candidates, num=num)
        if proposed < num_centers:
            for row in torch.nonzero(values[:, -1] - values[:, num - 1] <= reach)[:, 0].tolist():
                exact = (self._centers_KD - z_ND[row].double()).square_().sum(dim=1)
                best[row] = exact.argsort(stable=True)[:num]
                squared[row] = exact[best[row]]
        return best, squared


def own_and_other(z_ND: Tensor, centers_KD: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's distance (N,) to its own group's center and to the nearest other one (its own, for K = 1)."""
    distances = squared_distances(z_ND, centers_KD).sqrt()
    column = group_N[:, None]
    own = distances.gather(1, column)[:, 0]
    if len(centers_KD) == 1:
        return own, own
    return own, distances.scatter(1, column, torch.inf).min(dim=1).values


def _nearest_block(z_BD: Tensor, centers_KD: Tensor, num: int) -> tuple[Tensor, Tensor]:
    squared, ids = squared_distances(z_BD, centers_KD).topk(num, dim=1, largest=False, sorted=True)
    return ids, squared
