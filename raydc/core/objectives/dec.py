"""Deep Embedded Clustering (DEC) with the exact global target. Letters: N rows, K leaves, D width, L latent width."""

import torch
from torch import Tensor, nn

from raydc.core.objectives.kernel import Kernel, log_soft_assign


def log_target(log_q_NK: Tensor, frequencies_K: Tensor) -> Tensor:
    """Return the logarithm of the sharpened target of each row.

    p_ij = (q_ij^2 / f_j) / sum_j' (q_ij'^2 / f_j'), with f_j = sum_i q_ij over all rows of the data.

    A row's target needs only its own q and the K numbers f, so nothing of size N x K is kept: this is the paper's
    target, not one made from a mini-batch.

    Args:
        log_q_NK: (N, K) log q of a frozen snapshot.
        frequencies_K: (K,) float64, positive; the sum over all rows of all workers.

    Returns:
        (N, K) float32; exp of each row sums to 1.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, eq. 3.
    """
    return torch.log_softmax(2.0 * log_q_NK - frequencies_K.clamp_min(1e-30).log().to(log_q_NK.dtype), dim=1)


def divergence(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """Return KL(P || Q) of each row, sum_j p_ij log(p_ij / q_ij), as (N,).

    Its gradient is ((alpha + 1) / (alpha scale)) sum_j (1 + d2_ij / (alpha scale))^-1 (p_ij - q_ij) (z_i - c_j) for
    z_i; the paper's eq. 4 is the case scale = 1.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, eq. 2.
    """
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(dim=1)


class Dec(nn.Module):
    """KL between the frozen target and the live soft assignment; encoder and centres learn."""

    needs_decoder = False

    def __init__(self, encoder: nn.Module, centers_KL: Tensor, kernel: Kernel) -> None:
        super().__init__()
        self.encoder = encoder
        self.centers = nn.Parameter(centers_KL.clone())
        self.kernel = kernel

    def forward(self, x_ND: Tensor, weights_N: Tensor, log_p_NK: Tensor) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its part `kl`."""
        kl = (weights_N * self._divergence(self.encoder(x_ND), log_p_NK)).sum()
        return {"loss": kl, "kl": kl.detach()}

    def _divergence(self, z_NL: Tensor, log_p_NK: Tensor) -> Tensor:
        # The kernel, softmax and KL stay in float32: in bf16 a probability has three digits.
        with torch.autocast(z_NL.device.type, enabled=False):
            return divergence(log_p_NK, log_soft_assign(z_NL.float(), self.centers, self.kernel))
