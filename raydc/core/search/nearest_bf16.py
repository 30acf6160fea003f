"""The nearest center on a CPU with a matrix unit: screened in bf16, decided in float32.

Letters: N rows, B rows of a block, K centers, D width of a row, G groups of centers, P pairs of a row and a center.

A product of float32 rows is what a search costs. A matrix unit (AMX) makes it several times as fast in bf16, with an
error that has a bound: a center that lies behind the first by more than the bound cannot be the nearest. Those that are
left, seldom more than two, are told apart by float32 differences. So the answer is as exact as a search in float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

# torch before faiss: the other order gives the two libraries separate thread settings.
import faiss  # isort: skip
from torch import Tensor

_BLOCK_ROWS = 512
"""Rows of a product for each thread at most."""

_BLOCK_NUMBERS = 2**19
"""Numbers of a product for each thread at most, so that they stay in its cache."""

_NUM_GROUPS = 32
"""Groups into which the centers are divided; most groups are ruled out by their least distance alone."""

_LEAST_CENTERS = 256
"""Centers below which the screen does not pay."""

_LEAST_DIM = 64
"""Width of a row below which the screen does not pay."""

_LEAST_ROWS = 1024
"""Rows below which the screen does not pay."""

_MOST_PAIRS = 8
"""Mean number of centers left for a row above which a search in float32 is as fast."""

_UNIT_BF16 = 2.0**-9
"""Largest relative error of rounding to bf16."""

_UNIT_FLOAT32 = 2.0**-24
"""Largest relative error of rounding to float32."""

_LEAST_NORMAL = 2.0**-126
"""Least normal number of bf16 and float32."""

_Ids = npt.NDArray[np.int64]


def can_screen(z_ND: Tensor, centers_KD: Tensor) -> bool:
    """Return whether the processor has the unit, and the search is large enough to gain from it."""
    if z_ND.device.type != "cpu" or len(centers_KD) < _LEAST_CENTERS or z_ND.shape[1] < _LEAST_DIM:
        return False
    # torch before 2.9 has no such setting for the products alone.
    if len(z_ND) < _LEAST_ROWS or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def screened_nearest(z_ND: Tensor, centers_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the id (N,) int64 of the nearest center of each row and its squared distance (N,) float32.

    Of two centers at the same distance in float32 the lower id is taken. Rows that the screen does not help, such as
    those with many centers at nearly one distance, are searched by FAISS.

    Args:
        z_ND: (N, D) float32 on the CPU.
        centers_KD: (K, D) float32, alike.
    """
    z_ND, centers_KD = z_ND.contiguous(), centers_KD.contiguous()
    screen = Screen(centers_KD)
    nothing = np.empty(0, np.int64)
    rows, centers = [nothing], [nothing]
    for start in range(0, len(z_ND), screen.block_rows):
        pairs = screen.pairs(z_ND[start : start + screen.block_rows])
        if pairs is None:
            break
        rows.append(pairs[0] + start)
        centers.append(pairs[1])
    row_P, center_P = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(centers))
    between_P = torch.empty(len(row_P), dtype=torch.float32)
    faiss.pairwise_indexed_L2sqr(  # type: ignore[attr-defined]
        z_ND.shape[1],
        len(row_P),
        *(faiss.swig_ptr(t.numpy()) for t in (z_ND, row_P, centers_KD, center_P, between_P)),
    )
    squared_N = torch.full((len(z_ND),), math.inf).scatter_reduce_(0, row_P, between_P, "amin")
    first = between_P == squared_N[row_P]
    nobody = len(centers_KD)
    ids_N = torch.full((len(z_ND),), nobody).scatter_reduce_(0, row_P[first], center_P[first], "amin")
    left = torch.nonzero(ids_N == nobody)[:, 0]
    if len(left):
        squared, ids = faiss.knn(z_ND[left].numpy(), centers_KD.numpy(), 1)
        ids_N[left], squared_N[left] = torch.from_numpy(ids[:, 0]), torch.from_numpy(squared[:, 0]).clamp_min_(0.0)
    return ids_N, squared_N


class Screen:
    """A cheap bound on distances: which centers can be the nearest of each row.

    It computes |c|^2 / 2 - z.c, half the squared distance without the row's own |z|^2 / 2, which is the same for all
    centers. The product is in bf16. Its error has a bound, so a center farther behind the first than the bound is out.

    The mean of the centers is subtracted from rows and centers first: the bound grows with their length. |c|^2 / 2
    comes out of the product as well: each row ends with three ones, and each center with three bf16 numbers that add
    up to |c|^2 / 2.
    """

    def __init__(self, centers_KD: Tensor) -> None:
        num_centers, self._dim = centers_KD.shape
        self._shift_D = centers_KD.mean(dim=0)
        centers_KD = centers_KD - self._shift_D
        self._group_size = math.ceil(num_centers / _NUM_GROUPS)
        padded = self._group_size * _NUM_GROUPS
        self.block_rows = max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // padded)) * torch.get_num_threads()
        # One piece of memory for all blocks: rows with their three ones, and the products.
        self._rows_BE, self.half_BK = torch.ones(self.block_rows, self._dim + 3), torch.empty(self.block_rows, padded)
        half_K = centers_KD.double().square().sum(dim=1).mul(0.5)
        self._minus_EK = centers_KD.new_zeros(self._dim + 3, padded)
        self._minus_EK[: self._dim, :num_centers] = -centers_KD.T
        # Centers that fill the last groups lie infinitely far away.
        self._minus_EK[self._dim, num_centers:] = math.inf
        lost_K = half_K
        for term in range(3):
            part_K = lost_K.bfloat16()
            self._minus_EK[self._dim + term, :num_centers] = part_K.float()
            lost_K = lost_K - part_K
        rounded = centers_KD.bfloat16().float()
        length = float(torch.linalg.vector_norm(rounded, dim=1).max())
        lost = float(torch.linalg.vector_norm(centers_KD - rounded, dim=1).max())
        # |zr.cr - z.c| <= |zr - z| |cr| + |z| |cr - c|, and a sum of D terms in float32 whichever way it is added up.
        terms = self._dim + 7
        self._error = _UNIT_BF16 * length + lost + 2 * terms * _UNIT_FLOAT32 * (length + lost)
        # The unit takes numbers below the least normal one for zero.
        self._rounding = terms * (2 * _UNIT_FLOAT32 * float(half_K.max()) + _LEAST_NORMAL) + float(lost_K.abs().max())

    def pairs(self, z_BD: Tensor) -> tuple[_Ids, _Ids] | None:
        """Return the row (P,) and the center (P,) of every pair that may be the nearest; None if they are too many.

        A row that is not finite has none.
        """
        num = len(z_BD)
        rows_BE, half_BK = self._rows_BE[:num], self.half_BK[:num]
        z_BD = torch.sub(z_BD, self._shift_D, out=rows_BE[:, : self._dim])
        with products_in_bf16():
            torch.mm(rows_BE, self._minus_EK, out=half_BK)
        half_BMG = half_BK.view(num, self._group_size, _NUM_GROUPS)
        least_BG = half_BMG.amin(dim=1)
        reach_B = torch.linalg.vector_norm(z_BD, dim=1).mul_(2.0 * self._error).add_(2.0 * self._rounding)
        reach_B += least_BG.amin(dim=1)
        # Only in the groups whose least is within reach are there any: most of the numbers are seen once. NumPy finds
        # the few places that are set among many several times as fast as torch.
        reach = reach_B.numpy()[:, None]
        row, group = np.divmod(np.flatnonzero(least_BG.numpy() <= reach), _NUM_GROUPS)
        if len(row) > _MOST_PAIRS * num:
            return None
        pair, member = np.divmod(np.flatnonzero(half_BMG.numpy()[row, :, group] <= reach[row]), self._group_size)
        if len(pair) > _MOST_PAIRS * num:
            return None
        return row[pair], member * _NUM_GROUPS + group[pair]


@contextmanager
def products_in_bf16() -> Iterator[None]:
    """Let products of float32 matrices take the matrix unit; for the whole process, so for as short as one product."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
