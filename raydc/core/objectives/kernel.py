"""The Student-t soft assignment that DEC and its relatives share. Letters: N rows, K centers, D latent width."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raydc.core.search.nearest import cache_rows, squared_distances

_BLOCK_ROWS = 2048
"""Rows whose distances are made at once in a calibration."""

ALPHAS = (1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 127.0, 255.0, 511.0, 1023.0)
"""Degrees of freedom that a calibration tries. (alpha + 1) / 2 is a power of two, so powers are squarings."""


@dataclass(frozen=True)
class Kernel:
    """Shape of the Student-t kernel."""

    alpha: float = 1.0
    """Degrees of freedom."""

    scale: float = 1.0
    """Squared length unit."""


def log_soft_assign(z_ND: Tensor, centers_KD: Tensor, kernel: Kernel) -> Tensor:
    """Return the logarithm of each row's Student-t similarity to each center.

    q_ij = (1 + |z_i - c_j|^2 / (alpha scale)) ^ (-(alpha + 1) / 2), divided by its sum over j.

    The paper has alpha = scale = 1; here the scale is calibrated (see `calibrate`), because distances in a learned code
    have no unit. The logarithm is taken before the division, so a far row gets a large negative number and never log 0.

    Args:
        z_ND: (N, D) float32 latent rows.
        centers_KD: (K, D) float32 centers, same device.
        kernel: degrees of freedom and scale.

    Returns:
        (N, K) float32; exp of each row sums to 1.

    Raises:
        ValueError: the two inputs do not share D.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, eq. 1.
    """
    return log_similarity(squared_distances(z_ND, centers_KD), kernel)


def log_similarity(squared_NK: Tensor, kernel: Kernel) -> Tensor:
    """Return what `log_soft_assign` does, (N, K), of rows at these squared distances from the centers."""
    logits = -(kernel.alpha + 1.0) / 2.0 * torch.log1p(squared_NK / (kernel.alpha * kernel.scale))
    return torch.log_softmax(logits, dim=1)


def top_soft_assign(squared_NK: Tensor, kernel: Kernel) -> Tensor:
    """Return each row's largest Student-t similarity, exp of the largest of `log_soft_assign`.

    1 / sum_j ((1 + d_min / (alpha scale)) / (1 + d_j / (alpha scale))) ^ ((alpha + 1) / 2). No logarithm of all (N, K)
    numbers: a whole power of two, which every alpha that `calibrate` chooses asks for, is squared so many times.

    Args:
        squared_NK: (N, K) float32 squared distances; overwritten.
        kernel: degrees of freedom and scale.

    Returns:
        (N,) float32.
    """
    ratio_NK = squared_NK.div_(kernel.alpha * kernel.scale).add_(1.0)
    ratio_NK = torch.div(ratio_NK.amin(dim=1, keepdim=True), ratio_NK, out=ratio_NK)
    exponent = (kernel.alpha + 1.0) / 2.0
    doublings = math.log2(exponent)
    if doublings >= 0 and doublings.is_integer():
        for _ in range(int(doublings)):
            ratio_NK.square_()
    else:
        ratio_NK.pow_(exponent)
    return 1.0 / ratio_NK.sum(dim=1)


def calibrate(
    z_ND: Tensor,
    centers_KD: Tensor,
    *,
    target_top_q: float,
    alpha: float | None = None,
    scale: float | None = None,
    weights_N: Tensor | None = None,
) -> tuple[Kernel, float]:
    """Return the kernel whose mean largest q over the rows is `target_top_q`, and the mean that it reaches.

    With alpha = 1 the ratio of two similarities saturates at the ratio of squared distances however small the scale, so
    at large K no scale gives a signal: 1000 centers on the unit sphere leave a largest q of about .002. A larger alpha
    decays faster. The scale is at least a tenth of the mean squared distance to the nearest center, over alpha: a
    narrower kernel is singular at the centers, and under one a refinement loses leaf after leaf. With alpha=None the
    least of `ALPHAS` is taken that reaches the target; a fixed alpha may fall short of it.

    Args:
        z_ND: (N, D) float32 sample of latent rows, N >= 1.
        centers_KD: (K, D) float32.
        target_top_q: in (1/K, 1).
        alpha: fixed degrees of freedom, or None to choose.
        scale: fixed squared length unit, or None to choose.
        weights_N: (N,) float32 row weights of the mean; None for 1 each.

    Raises:
        ValueError: no rows.
    """
    if not len(z_ND):
        raise ValueError("calibration needs at least one row")
    # Written to its place: joined from blocks, it would be held twice for a moment.
    squared = z_ND.new_empty(len(z_ND), len(centers_KD))
    for z, block in zip(z_ND.split(_BLOCK_ROWS), squared.split(_BLOCK_ROWS), strict=True):
        block.copy_(squared_distances(z, centers_KD))
    weights = None if weights_N is None or bool((weights_N == 1.0).all()) else weights_N.double()
    width = float(squared.min(dim=1).values.mean()) or 1.0
    best = Kernel(alpha or ALPHAS[-1], width)
    for candidate in ALPHAS if alpha is None else (alpha,):
        narrowest = 0.1 * width / candidate if scale is None else scale
        reached = _mean_top_q(squared, candidate, narrowest, weights)
        if reached < target_top_q or scale is not None:
            best = Kernel(candidate, narrowest)
            if reached < target_top_q:
                continue
            break
        best = Kernel(candidate, _widened(squared, candidate, narrowest, 1e9 * width, target_top_q, weights))
        break
    return best, _mean_top_q(squared, best.alpha, best.scale, weights)


def _widened(
    squared_NK: Tensor, alpha: float, narrowest: float, widest: float, target_top_q: float, weights_N: Tensor | None
) -> float:
    """Return the scale between two at which the mean largest q is the target; the widest one if it is above there."""
    import scipy.optimize  # It takes a while, and a kernel is calibrated once or twice in a run.

    held = [squared_NK]

    def excess(log_scale: float) -> float:
        return _mean_top_q(held[0], alpha, math.exp(log_scale), weights_N) - target_top_q

    low, high = math.log(narrowest), math.log(widest)
    if excess(high) >= 0.0:
        return widest
    if excess(low) <= 0.0:
        return narrowest
    root = scipy.optimize.brentq(excess, low, high, xtol=1e-7)
    # SciPy leaves a circle of references behind that holds the function, and would hold the distances.
    held.clear()
    return math.exp(root)


def _mean_top_q(squared_NK: Tensor, alpha: float, scale: float, weights_N: Tensor | None) -> float:
    # Block by block: the numbers of all rows would go through memory, and out of it again, at each of a dozen steps.
    blocks = squared_NK.split(cache_rows(squared_NK))
    top = torch.cat([top_soft_assign(block.clone(), Kernel(alpha, scale)) for block in blocks]).double()
    return float(top.mean() if weights_N is None else top @ weights_N / weights_N.sum())
