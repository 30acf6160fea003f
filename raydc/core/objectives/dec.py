"""Deep Embedded Clustering (DEC) with the exact global target. Letters: N rows, K leaves, D width, L latent width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raydc.core.objectives.kernel import Kernel, log_similarity, log_soft_assign
from raydc.core.objectives.objective import Minibatch, Objective, ObjectiveInputs, Pass
from raydc.core.objectives.snapshot import Refresh, Snapshot
from raydc.core.search.nearest import squared_distances
from raydc.core.training.settings import RefineSettings

_BLOCK_NUMBERS = 2**19
"""Rows times centers in a block on a CPU: 2 MiB in float32."""

_DEVICE_BLOCK_NUMBERS = 2**26
"""Rows times centers in a block on a GPU: 256 MiB in float32."""

_LEAST_BLOCK_ROWS = 256
"""Rows in a block at least, however many centers there are."""


def log_target(
    log_q_NK: Tensor,
    frequencies_K: Tensor,
    *,
    exponent: float = 2.0,
    frequency_exponent: float = 1.0,
    log_prior_K: Tensor | None = None,
) -> Tensor:
    """Return the logarithm of the sharpened target of each row.

    p_ij = q_ij^s (r_j / f_j)^t, divided by its sum over j, with f_j = sum_i w_i q_ij over all rows of the data.

    The paper's target has s = 2, t = 1 and equal sizes r. Dividing by f takes from large leaves and gives to small
    ones; with t = 0 it does not, and with sizes r it drives the leaves toward these instead of equal ones.

    A row's target needs only its own q and the K numbers f, so nothing of size N x K is kept: this is the paper's
    target, not one made from a mini-batch.

    Args:
        log_q_NK: (N, K) log q of a frozen snapshot.
        frequencies_K: (K,) float64, positive; the sum over all rows of all workers.
        exponent: s.
        frequency_exponent: t.
        log_prior_K: (K,) float64 logarithm of r up to a constant; None for equal sizes.

    Returns:
        (N, K) float32; exp of each row sums to 1.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, eq. 3.
    """
    excess = frequencies_K.clamp_min(1e-30).log()
    if log_prior_K is not None:
        excess = excess - log_prior_K
    return torch.log_softmax(exponent * log_q_NK - (frequency_exponent * excess).to(log_q_NK.dtype), dim=1)


def divergence(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """Return KL(P || Q) of each row, sum_j p_ij log(p_ij / q_ij), as (N,).

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, eq. 2.
    """
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(dim=1)


def summed_divergence(
    z_NL: Tensor,
    centers_KL: Tensor,
    weights_N: Tensor,
    kernel: Kernel,
    log_p_of: Callable[[slice], Tensor],
    *,
    block_rows: int | None = None,
) -> Tensor:
    """Return sum_i w_i KL(P || Q) of some rows, with gradients for z and the centers.

    The gradient is ((alpha + 1) / (alpha scale)) sum_j (1 + d2_ij / (alpha scale))^-1 (p_ij - q_ij) (z_i - c_j) for
    z_i; the paper's eq. 4 is the case scale = 1. It is computed with the loss, block by block, so that none of the
    (N, K) matrices is kept for it: of a batch of 4,096 rows and 1,000 leaves each has 16 MiB.

    Args:
        z_NL: (N, L) latent rows.
        centers_KL: (K, L), of the same type.
        weights_N: (N,).
        kernel: of Q.
        log_p_of: gives the (n, K) log target of a slice of the rows.
        block_rows: rows at once; by default as many as suit the device. Peak memory about 16 * block_rows * K bytes.

    Returns:
        A scalar of the type of z; it cannot be differentiated twice.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, eq. 2 to 5.
    """
    if block_rows is None:
        numbers = _BLOCK_NUMBERS if z_NL.device.type == "cpu" else _DEVICE_BLOCK_NUMBERS
        block_rows = max(_LEAST_BLOCK_ROWS, numbers // len(centers_KL))
    total: Tensor = _SummedDivergence.apply(  # type: ignore[no-untyped-call]
        z_NL, centers_KL, weights_N, kernel, log_p_of, block_rows
    )
    return total


class _SummedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_NL: Tensor,
        centers_KL: Tensor,
        weights_N: Tensor,
        kernel: Kernel,
        log_p_of: Callable[[slice], Tensor],
        block_rows: int,
    ) -> Tensor:
        total = z_NL.new_zeros(())
        grad_z_NL, grad_centers_KL = torch.empty_like(z_NL), torch.zeros_like(centers_KL)
        shift_L, unit = centers_KL.mean(dim=0), kernel.alpha * kernel.scale
        near_KL = centers_KL - shift_L
        for start in range(0, len(z_NL), block_rows):
            rows = slice(start, start + block_rows)
            squared_NK = squared_distances(z_NL[rows], centers_KL)
            log_q_NK, log_p_NK = log_similarity(squared_NK, kernel), log_p_of(rows)
            total += weights_N[rows] @ divergence(log_p_NK, log_q_NK)
            pull_NK = log_p_NK.exp().sub_(log_q_NK.exp_()).div_(squared_NK.div_(unit).add_(1.0))
            pull_NK.mul_(weights_N[rows, None] * ((kernel.alpha + 1.0) / unit))
            # z - c of rows and centers that are near the origin: a large offset would take digits.
            near_NL = z_NL[rows] - shift_L
            grad_z_NL[rows] = near_NL.mul(pull_NK.sum(dim=1, keepdim=True)).addmm_(pull_NK, near_KL, alpha=-1.0)
            grad_centers_KL.addcmul_(near_KL, pull_NK.sum(dim=0)[:, None]).addmm_(pull_NK.T, near_NL, alpha=-1.0)
        ctx.save_for_backward(grad_z_NL, grad_centers_KL)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_z_NL, grad_centers_KL = ctx.saved_tensors
        return grad * grad_z_NL, grad * grad_centers_KL, None, None, None, None


@dataclass(frozen=True)
class Target:
    """How the target is made, and how often; see `log_target`."""

    exponent: float = 2.0
    frequency_exponent: float = 1.0
    size_prior: str | Sequence[float] = "uniform"
    """uniform; kmeans, the sizes at the first refresh; or one number for each leaf, matched to them by rank."""

    refreshes_per_epoch: int = 1

    @classmethod
    def from_settings(cls, refine: RefineSettings) -> "Target":
        """Return the target of the settings."""
        return cls(refine.target_exponent, refine.frequency_exponent, refine.size_prior, refine.refreshes_per_epoch)

    def log_prior(self, frequencies_K: Tensor) -> Tensor:
        """Return log r, (K,) float64, from f at the first refresh."""
        if self.size_prior == "uniform":
            return torch.zeros_like(frequencies_K)
        if self.size_prior == "kmeans":
            return frequencies_K.clamp_min(1e-30).log()
        given = torch.tensor(self.size_prior, dtype=torch.float64, device=frequencies_K.device)
        by_size = frequencies_K.argsort(descending=True, stable=True)
        return torch.empty_like(given).index_copy_(0, by_size, given.sort(descending=True).values.log())


PAPER_TARGET = Target()


class Dec(Objective):
    """KL between the frozen target and the live soft assignment; encoder and centers learn."""

    log_prior: Tensor
    """(K,) float64, set at the first refresh."""

    def __init__(
        self,
        encoder: nn.Module,
        centers_KL: Tensor,
        kernel: Kernel,
        target: Target = PAPER_TARGET,
        *,
        arithmetic: str = "float32",
        num_local_rows: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.centers = nn.Parameter(centers_KL.clone())
        self.kernel, self.target, self.arithmetic = kernel, target, arithmetic
        self.num_local_rows = num_local_rows
        self.register_buffer("log_prior", torch.zeros(len(centers_KL), dtype=torch.float64))
        self.snapshot: Snapshot | None = None
        """The frozen state at the last refresh; no submodule, so neither optimizer nor ranks touch it."""

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        assert inputs.autoencoder is not None
        return cls(
            inputs.autoencoder.encoder,
            inputs.centers_KL,
            inputs.kernel,
            Target.from_settings(inputs.settings.refine),
            arithmetic=inputs.arithmetic,
            num_local_rows=inputs.num_local_rows,
        )

    def refresh(self, epoch: int, step: int, num_steps: int) -> Pass | None:
        """Return the pass that makes a new snapshot, `refreshes_per_epoch` times in an epoch."""
        times = self.target.refreshes_per_epoch
        if step not in {num_steps * r // times for r in range(times)}:
            return None
        assert self.encoder is not None
        return Refresh(
            self.encoder, self.centers, self.kernel, self.snapshot, self._keep, self.arithmetic, self.num_local_rows
        )

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its part `kl`."""
        return self.loss(batch.x_ND, batch.weights_N, self.log_target(batch))

    def log_target(self, batch: Minibatch) -> Callable[[slice], Tensor]:
        """Return what gives the (n, K) log target of a slice of a batch under the last snapshot."""
        snapshot = self.snapshot
        assert snapshot is not None
        z_NL = snapshot.codes(batch, self.arithmetic)

        @torch.no_grad()
        def of(rows: slice) -> Tensor:
            with torch.autocast(z_NL.device.type, enabled=False):
                return log_target(
                    log_soft_assign(z_NL[rows], snapshot.centers_KL, self.kernel),
                    snapshot.frequencies_K,
                    exponent=self.target.exponent,
                    frequency_exponent=self.target.frequency_exponent,
                    log_prior_K=self.log_prior,
                )

        return of

    def loss(self, x_ND: Tensor, weights_N: Tensor, log_p_of: Callable[[slice], Tensor]) -> dict[str, Tensor]:
        """Return the sums of `forward` under a given target (see `summed_divergence`)."""
        assert self.encoder is not None
        kl = self._divergence(self.encoder(x_ND), weights_N, log_p_of)
        return {"loss": kl, "kl": kl.detach()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the centers and the snapshot."""
        own = super().state_tensors()
        return own if self.snapshot is None else own | self.snapshot.tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state_tensors` gave."""
        assert self.encoder is not None
        of_snapshot = {n: t for n, t in tensors.items() if n.startswith("snapshot.")}
        super().load_state_tensors({n: t for n, t in tensors.items() if n not in of_snapshot})
        if of_snapshot:
            self.snapshot = Snapshot.from_tensors(of_snapshot, self.encoder)

    def _keep(self, snapshot: Snapshot) -> None:
        if self.snapshot is None:
            self.log_prior.copy_(self.target.log_prior(snapshot.frequencies_K))
        self.snapshot = snapshot

    def _divergence(self, z_NL: Tensor, weights_N: Tensor, log_p_of: Callable[[slice], Tensor]) -> Tensor:
        # The kernel, softmax and KL stay in float32: in bf16 a probability has three digits.
        with torch.autocast(z_NL.device.type, enabled=False):
            return summed_divergence(z_NL.float(), self.centers, weights_N, self.kernel, log_p_of)
