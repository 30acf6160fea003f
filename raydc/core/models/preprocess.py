"""What is done to a raw row before anything else. Letters: N rows, D width of a row."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raydc.core.row_guard import RowGuard


@dataclass(frozen=True)
class Moments:
    """Count, mean and spread of a sample of rows, mergeable, in float64."""

    num_rows: int
    mean_D: npt.NDArray[np.float64]
    m2_D: npt.NDArray[np.float64]
    """Sum of squared deviations from the mean."""

    @classmethod
    def from_rows(cls, x_ND: npt.NDArray[Any]) -> "Moments":
        """Return the moments of one block of (n, D) rows of any float type."""
        x = x_ND.astype(np.float64)
        mean = x.mean(axis=0) if len(x) else np.zeros(x.shape[1])
        return cls(len(x), mean, ((x - mean) ** 2).sum(axis=0))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both blocks together.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        """
        n = self.num_rows + other.num_rows
        if n == 0:
            return self
        delta = other.mean_D - self.mean_D
        mean = self.mean_D + delta * (other.num_rows / n)
        m2 = self.m2_D + other.m2_D + delta**2 * (self.num_rows * other.num_rows / n)
        return Moments(n, mean, m2)

    @property
    def variance_D(self) -> npt.NDArray[np.float64]:
        """Population variance of each dimension."""
        return self.m2_D / max(self.num_rows, 1)

    @property
    def mean_square(self) -> float:
        """Mean of x^2 over rows and dimensions."""
        return float((self.variance_D + self.mean_D**2).mean())


@dataclass(frozen=True)
class Preprocess:
    """A fixed map of raw rows to the rows that the network sees.

    `l2` divides each embedding column of a row by its norm; `standardize` subtracts the mean and divides by the
    deviation of each dimension; `scale` multiplies by one factor. Last, each column is multiplied by its weight.
    """

    method: str = "none"
    blocks: Sequence[tuple[int, int, float]] = ()
    """(start, stop, weight) of each embedding column."""

    _: KW_ONLY
    mean_D: Tensor | None = None
    scale_D: Tensor | None = None
    """Factor of each dimension; of one element for `scale`."""

    _cache: dict[torch.device, "Preprocess"] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(
        cls, method: str, blocks: Sequence[tuple[int, int, float]], moments: Moments, factor: float | None = None
    ) -> "Preprocess":
        """Return the map whose statistics come from a sample.

        Raises:
            ValueError: the method is unknown, or `scale` meets a sample of zeros only.
        """
        if method in ("none", "l2"):
            return cls(method, blocks)
        if method == "standardize":
            deviation = np.sqrt(moments.variance_D)
            # A constant dimension carries nothing; a factor of 1 keeps it at zero instead of dividing by zero.
            factor_D = np.where(deviation > 1e-12, 1.0 / np.maximum(deviation, 1e-12), 1.0)
            return cls(method, blocks, mean_D=_tensor(moments.mean_D), scale_D=_tensor(factor_D))
        if method == "scale":
            if factor is None and moments.mean_square == 0:
                raise ValueError("method=scale: every row of the sample is zero, so there is no scale. Give a factor.")
            chosen = moments.mean_square**-0.5 if factor is None else factor
            return cls(method, blocks, mean_D=None, scale_D=torch.tensor([chosen], dtype=torch.float32))
        raise ValueError(f"unknown preprocess method {method!r}")

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the (N, D) float32 rows that the network sees, on the device of `x_ND`."""
        here = self._on(x_ND.device)
        x = x_ND.float()
        if self.method == "l2":
            parts = [torch.nn.functional.normalize(x[:, a:b], dim=1, eps=1e-30) for a, b, _ in self.blocks]
            x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if here.mean_D is not None:
            x = x - here.mean_D
        if here.scale_D is not None:
            x = x * here.scale_D
        if any(weight != 1.0 for _, _, weight in self.blocks):
            x = torch.cat([x[:, a:b] * weight for a, b, weight in self.blocks], dim=1)
        return x

    def guard(self, dim: int) -> RowGuard:
        """Return what a raw row of `dim` numbers must be, so that float32 holds its distances after the map."""
        blocks = list(self.blocks) or [(0, dim, 1.0)]
        places = tuple((a, b) for a, b, _ in blocks)
        if self.method == "l2":
            return RowGuard(places, by_norm=True)
        weights = np.concatenate([np.full(b - a, weight) for a, b, weight in blocks])
        factor = weights if self.scale_D is None else weights * self.scale_D.double().cpu().numpy()
        offset = () if self.mean_D is None else tuple(self.mean_D.double().tolist())
        return RowGuard(places, False, tuple((factor[:1] if (factor == factor[0]).all() else factor).tolist()), offset)

    def _on(self, device: torch.device) -> "Preprocess":
        if device.type == "cpu":
            return self
        if device not in self._cache:
            mean, scale = (t.to(device) if t is not None else None for t in (self.mean_D, self.scale_D))
            self._cache[device] = Preprocess(self.method, self.blocks, mean_D=mean, scale_D=scale)
        return self._cache[device]


def _tensor(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
