"""A mixture of Gaussians with diagonal covariances, in log space. Letters: N rows, K components, L latent width."""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

_BLOCK_NUMBERS = 2**24
"""Numbers of the (rows, K, L) differences held at once by `most_probable`."""


@dataclass(frozen=True)
class Mixture:
    """p(z) = sum_c pi_c N(z; mu_c, diag exp(log_variances_c))."""

    log_weights_K: Tensor
    """(K,) log pi_c; exp sums to 1."""

    means_KL: Tensor
    log_variances_KL: Tensor

    kind: ClassVar[str] = "mixture"

    def to(self, device: torch.device) -> "Mixture":
        """Return the mixture on another device."""
        return Mixture(*(t.to(device) for t in self.tensors().values()))

    def detached(self) -> "Mixture":
        """Return a copy without gradients."""
        return Mixture(*(t.detach().clone() for t in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the three tensors by the names of the fields."""
        return {
            "log_weights_K": self.log_weights_K,
            "means_KL": self.means_KL,
            "log_variances_KL": self.log_variances_KL,
        }

    def best(self, z_NL: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the `num` most probable components of each point and their posterior, float32, best first."""
        ids, log_posterior = most_probable(z_NL, self, num=num)
        return ids, log_posterior.exp().float()

    def reordered(self, order_K: Tensor) -> "Mixture":
        """Return the mixture whose component i is the present order_K[i]; the weights of those left out are shared."""
        weights = torch.log_softmax(self.log_weights_K[order_K].double(), dim=0).to(self.log_weights_K.dtype)
        return Mixture(weights, self.means_KL[order_K], self.log_variances_KL[order_K])


def log_joint(z_NL: Tensor, mixture: Mixture) -> Tensor:
    """Return log pi_c + log N(z_i; mu_c, diag s2_c) as (N, K).

    log N = -1/2 sum_d (log 2 pi + log s2_cd + (z_id - mu_cd)^2 / s2_cd).

    The differences are formed before they are squared: expanded, |z|^2 / s2 - 2 z.mu / s2 + ... loses every digit
    where a variance is small beside the distance of the components. Peak memory 4 N K L bytes in float32.
    """
    precision = torch.exp(-mixture.log_variances_KL)
    squared = ((z_NL[:, None, :] - mixture.means_KL) ** 2 * precision).sum(dim=2)
    constant = math.log(2.0 * math.pi) * z_NL.shape[1]
    return mixture.log_weights_K - 0.5 * (constant + mixture.log_variances_KL.sum(dim=1) + squared)


@torch.no_grad()
def most_probable(z_NL: Tensor, mixture: Mixture, *, num: int, block_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the ids (N, num) int64 of the most probable components and their log posterior, float64, best first.

    Ties go to the lower id. Computed in float64, in blocks, so a row's answer does not depend on the rows beside it.

    Args:
        z_NL: (N, L) points.
        mixture: of K components.
        num: at most K.
        block_rows: rows at once; by default as many as keep the (rows, K, L) differences to 128 MiB.
    """
    exact = Mixture(*(t.double() for t in mixture.tensors().values()))
    if block_rows is None:
        block_rows = max(1, _BLOCK_NUMBERS // max(mixture.means_KL.numel(), 1))
    ids, tops = [torch.empty((0, num), dtype=torch.int64, device=z_NL.device)], []
    for block in z_NL.double().split(block_rows):
        log_posterior = torch.log_softmax(log_joint(block, exact), dim=1)
        found, order = log_posterior.sort(dim=1, descending=True, stable=True)
        ids.append(order[:, :num])
        tops.append(found[:, :num])
    return torch.cat(ids), torch.cat([z_NL.new_empty((0, num)).double(), *tops])


def fit_mixture(
    sample_NL: Tensor, ids_N: Tensor, *, num_components: int, num_iterations: int, floor: float
) -> tuple[Mixture, int]:
    """Return a mixture fitted by expectation maximization from a hard assignment, and the iterations it took.

    Weights, means and variances start at those of the assigned rows; a component without rows starts with the mean
    variance of all, at the mean of all. Row weights play no part here.

    Args:
        sample_NL: (N, L) on the CPU, N >= 2. Peak memory about 24 N K bytes.
        ids_N: (N,) int64 component of each row at the start.
        num_components: K.
        num_iterations: most iterations; 0 gives the moments of the assignment.
        floor: added to every variance, in units of the mean variance of the sample.

    Source: Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977, by
    scikit-learn's GaussianMixture.
    """
    # Not at the top: scikit-learn takes a second to import, which every labeling actor would pay.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    z = sample_NL.double()
    counts = torch.bincount(ids_N, minlength=num_components).double()
    spread = z.var(dim=0, unbiased=False)
    added = floor * max(float(spread.mean()), 1e-30)
    filled = (counts > 0)[:, None]
    divisor = counts.clamp_min(1.0)[:, None]
    sums = torch.zeros(num_components, z.shape[1], dtype=torch.float64)
    means = torch.where(filled, sums.index_add(0, ids_N, z) / divisor, z.mean(dim=0))
    squares = sums.index_add(0, ids_N, (z - means[ids_N]) ** 2) / divisor
    variances = torch.where(filled, squares, spread) + added
    weights = (counts + 1.0) / (counts + 1.0).sum()
    taken = 0
    if num_iterations > 0:
        model = GaussianMixture(
            num_components,
            covariance_type="diag",
            max_iter=num_iterations,
            reg_covar=added,
            # With all three given nothing is left to chance.
            weights_init=weights.numpy(),
            means_init=means.numpy(),
            precisions_init=(1.0 / variances).numpy(),
        )
        with warnings.catch_warnings():
            # The bound on the iterations is a setting, and how many were taken is returned.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(z.numpy())
        weights, means, variances = (torch.from_numpy(a) for a in (model.weights_, model.means_, model.covariances_))
        taken = int(model.n_iter_)
    return Mixture(weights.clamp_min(1e-30).log().float(), means.float(), variances.log().float()), taken
