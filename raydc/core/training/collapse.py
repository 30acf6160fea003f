"""Signs that a learned space collapses: few directions, empty leaves, one leaf that takes all. Letter: L, its width.

Clustering losses alone are least where all rows are one point. What is watched costs nothing extra: the codes that a
training step has computed anyway, and the sizes of the leaves at a refresh.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from raydc.core.training.collectives import Ranks
from raydc.core.training.settings import WatchSettings

_WATCHED_STEPS = 64
"""Fewest steps of an epoch that are watched, where it has as many."""


class SpaceWatch:
    """Sums of an encoder's codes over the training steps of an epoch, in float64, from which the rank is made.

    The codes of an epoch are those of weights that move while it lasts. Passes without gradients do not count.
    """

    def __init__(self, encoder: nn.Module | None, num_steps: int = 1) -> None:
        """Watch an encoder; nothing, for None. About every n-th step of an epoch of many is enough."""
        self._encoder = encoder
        self._stride = max(1, num_steps // _WATCHED_STEPS)
        self._calls = 0
        self._sums: Tensor | None = None
        self._handle: Any = None

    def __enter__(self) -> "SpaceWatch":
        if self._encoder is not None:
            self._handle = self._encoder.register_forward_hook(self._add)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.remove()

    def so_far(self, ranks: Ranks) -> tuple[int, Tensor | None]:
        """Return the calls counted and the sums over all ranks, from which `go_on` continues. Every rank must ask."""
        sums = self._over_all(ranks)
        return self._calls, sums if len(sums) > 1 else None

    def go_on(self, calls: int, sums: Tensor | None) -> None:
        """Continue from `so_far`; the sums are those of all ranks, so one rank takes them, and the others None."""
        self._calls, self._sums = calls, sums

    def effective_rank(self, ranks: Ranks) -> float | None:
        """Return the effective rank of the codes of all ranks; None where none were seen. Every rank must ask."""
        sums = self._over_all(ranks)
        return effective_rank(sums) if len(sums) > 1 else None

    def _over_all(self, ranks: Ranks) -> Tensor:
        """Return the sums of all ranks; (1, 1) where nothing was seen."""
        if self._encoder is None:
            return torch.zeros(1, 1)
        width = torch.tensor([0 if self._sums is None else len(self._sums) - 1])
        size = int(ranks.max(width)[0]) + 1
        sums = self._sums
        if sums is None:
            sums = torch.zeros(size, size, dtype=torch.float64, device=ranks.device)
        return ranks.sum(sums)

    def _add(self, module: nn.Module, inputs: Any, codes: Any) -> None:
        if not torch.is_grad_enabled():
            return
        # Counted where a rank has no rows in a step too: all ranks watch the same steps.
        self._calls += 1
        if (self._calls - 1) % self._stride or not isinstance(codes, Tensor) or codes.ndim != 2 or not len(codes):
            return
        with torch.no_grad():
            sums = products(codes.detach())
            self._sums = sums if self._sums is None else self._sums + sums


def products(z_NL: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Return the (1 + L, 1 + L) float64 sum of w v v^T over rows v = (1, z): their number, sum and products at once."""
    v = torch.cat([torch.ones_like(z_NL[:, :1]), z_NL], dim=1).double()
    return (v if weights_N is None else v * weights_N.double()[:, None]).T @ v


def mean_and_covariance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (L,) and the covariance (L, L) of the rows of `products`; zeros of none."""
    weight = sums[0, 0].clamp_min(torch.finfo(torch.float64).tiny)
    mean = sums[0, 1:] / weight
    return mean, sums[1:, 1:] / weight - torch.outer(mean, mean)


def effective_rank(sums: Tensor) -> float:
    """Return exp(H(p)) with p the eigenvalues of the covariance, divided by their sum.

    L for a round cloud, 1 for a line, 0 for a point.

    Args:
        sums: (1 + L, 1 + L) float64, the sum of v v^T over rows v = (1, z).

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality", 2007.
    """
    mean, covariance = mean_and_covariance(sums)
    # Codes that all lie in one point have a covariance of rounding errors alone. Codes that are not finite have no
    # rank either.
    if not torch.isfinite(covariance).all() or covariance.trace() <= 1e-12 * float(mean @ mean):
        return 0.0
    values = torch.linalg.eigvalsh(covariance.cpu()).clamp_min(0.0)
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def signs(history: Sequence[Mapping[str, Any]], num_leaves: int, settings: WatchSettings) -> list[str]:
    """Return what in a history is a sign of collapse, one line for each kind, at the epoch where it is worst.

    Args:
        history: entries of a fit: phase, epoch, and where measured effective_rank, empty and largest_share.
        num_leaves: K.
        settings: the bounds.
    """
    ranks = [(e["effective_rank"], e) for e in history if e.get("effective_rank") is not None]
    before = [rank for rank, e in ranks if e["phase"] == "pretrain"]
    refined = [(rank, e) for rank, e in ranks if e["phase"] == "refine"]
    lines = []
    if ranks:
        rank, entry = min(ranks[-1:] + refined, key=lambda r: r[0])
        if rank < settings.min_effective_rank:
            lines.append(f"the space has an effective rank of {rank:.2f} {_when(entry)}")
        elif before and rank < settings.min_rank_share * before[-1]:
            lines.append(f"the effective rank of the space fell from {before[-1]:.1f} to {rank:.1f} {_when(entry)}")
    empty = [e for e in history if e.get("empty") is not None]
    if empty and (worst := max(empty, key=lambda e: e["empty"]))["empty"] > settings.max_empty_share * num_leaves:
        lines.append(f"{worst['empty']} of {num_leaves} leaves were empty {_when(worst)}")
    largest = [e for e in history if e.get("largest_share") is not None]
    # Two or three leaves hold half of the rows each without any harm.
    bound = max(settings.max_largest_share, 2.0 / num_leaves)
    if largest and (worst := max(largest, key=lambda e: e["largest_share"]))["largest_share"] > bound:
        lines.append(f"one leaf held {100 * worst['largest_share']:.0f} % of the rows {_when(worst)}")
    return lines


def _when(entry: Mapping[str, Any]) -> str:
    return f"in {entry['phase']} epoch {entry['epoch'] + 1}"
