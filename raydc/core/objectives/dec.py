"""Deep Embedded Clustering (DEC) with the exact global target. Letters: N rows, K leaves, D width, L latent width."""

import torch
from torch import Tensor, nn

from raydc.core.objectives.kernel import Kernel, log_soft_assign
from raydc.core.objectives.objective import Minibatch, Objective, Parts, Pass
from raydc.core.objectives.snapshot import Refresh, Snapshot


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


class Dec(Objective):
    """KL between the frozen target and the live soft assignment; encoder and centres learn."""

    def __init__(
        self,
        encoder: nn.Module,
        centers_KL: Tensor,
        kernel: Kernel,
        *,
        refreshes_per_epoch: int = 1,
        arithmetic: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.centers = nn.Parameter(centers_KL.clone())
        self.kernel = kernel
        self.refreshes_per_epoch = refreshes_per_epoch
        self.arithmetic = arithmetic
        self.snapshot: Snapshot | None = None
        """The frozen state at the last refresh; no submodule, so neither optimiser nor ranks touch it."""

    @classmethod
    def of(cls, parts: Parts) -> "Dec":
        """Return the objective that starts from these parts."""
        assert parts.autoencoder is not None
        return cls(
            parts.autoencoder.encoder,
            parts.centers_KL,
            parts.kernel,
            refreshes_per_epoch=parts.settings.refine.refreshes_per_epoch,
            arithmetic=parts.arithmetic,
        )

    def refresh(self, epoch: int, step: int, num_steps: int) -> Pass | None:
        """Return the pass that makes a new snapshot, `refreshes_per_epoch` times in an epoch."""
        if step not in {num_steps * r // self.refreshes_per_epoch for r in range(self.refreshes_per_epoch)}:
            return None
        assert self.encoder is not None
        return Refresh(self.encoder, self.centers, self.kernel, self.snapshot, self._keep, self.arithmetic)

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its part `kl`."""
        return self.loss(batch.x_ND, batch.weights_N, self.target(batch))

    @torch.no_grad()
    def target(self, batch: Minibatch) -> Tensor:
        """Return the (n, K) log target of a batch under the last snapshot."""
        snapshot = self.snapshot
        assert snapshot is not None
        log_q = log_soft_assign(snapshot.codes(batch, self.arithmetic), snapshot.centers_KL, self.kernel)
        return log_target(log_q, snapshot.frequencies_K)

    def loss(self, x_ND: Tensor, weights_N: Tensor, log_p_NK: Tensor) -> dict[str, Tensor]:
        """Return the sums of `forward` under a given target."""
        assert self.encoder is not None
        kl = (weights_N * self._divergence(self.encoder(x_ND), log_p_NK)).sum()
        return {"loss": kl, "kl": kl.detach()}

    def memory(self) -> dict[str, Tensor]:
        """Return the centres and the snapshot."""
        kept = super().memory()
        return kept if self.snapshot is None else kept | self.snapshot.tensors()

    def recall(self, tensors: dict[str, Tensor]) -> None:
        """Take what `memory` gave."""
        assert self.encoder is not None
        found = {n: t for n, t in tensors.items() if n.startswith("snapshot.")}
        super().recall({n: t for n, t in tensors.items() if n not in found})
        if found:
            self.snapshot = Snapshot.of(found, self.encoder)

    def _keep(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def _divergence(self, z_NL: Tensor, log_p_NK: Tensor) -> Tensor:
        # The kernel, softmax and KL stay in float32: in bf16 a probability has three digits.
        with torch.autocast(z_NL.device.type, enabled=False):
            return divergence(log_p_NK, log_soft_assign(z_NL.float(), self.centers, self.kernel))
