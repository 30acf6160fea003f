"""I-Con's debiased InfoNCE clustering: neighbors share a leaf. Letters: N rows, M negatives, K leaves, D width."""

import math

import torch
from torch import Tensor

from raydc.core.hashing import stream_seed
from raydc.core.objectives.heads import Heads, log_marginal, rotating_rows
from raydc.core.objectives.objective import Minibatch, ObjectiveInputs


def log_lift(log_phi_NK: Tensor, log_phi2_NK: Tensor, log_pk_K: Tensor) -> Tensor:
    """Return log(N q(j | i)) of each pair (i, j), as (N,): how much likelier j is than a row drawn at random.

    q(j | i) = sum_c phi_i(c) phi_j(c) / E[size_c], and E[size_c] = N p_k(c).

    Source: Alshammari, Hershey, Feldmann, Freeman, Hamilton, "I-Con: A Unifying Framework for Representation Learning",
    ICLR 2025, arXiv:2504.16929, section 4.
    """
    return torch.logsumexp(log_phi_NK + log_phi2_NK - log_pk_K.to(log_phi_NK.dtype), dim=1)


def log_debiased(log_lift: Tensor, alpha: float) -> Tensor:
    """Return log(N q~(j | i)) with q~ = (1 - alpha) q + alpha / N.

    Source: the same, section 4, on debiasing.
    """
    if alpha == 0.0:
        return log_lift
    return torch.logaddexp(log_lift + math.log1p(-alpha), log_lift.new_tensor(math.log(alpha)))


def negative_loss(
    phi_NK: Tensor, phi_MK: Tensor, pk_K: Tensor, alpha: float, weights_M: Tensor | None = None
) -> Tensor:
    """Return -mean_j log(N q~(j | i)) over M rows drawn at random, as (N,).

    Without logarithms inside: alpha keeps the sum away from 0, and one matrix product makes all N x M pairs.

    Args:
        phi_NK: (N, K) p(c | x) of the rows.
        phi_MK: (M, K) p(c | x) of the drawn ones.
        pk_K: (K,) marginals.
        alpha: above 0.
        weights_M: (M,) row weights of the mean; None for 1 each.
    """
    lift = (phi_NK / pk_K.clamp_min(1e-8).to(phi_NK.dtype)) @ phi_MK.T
    logs = torch.log((1.0 - alpha) * lift + alpha)
    return -logs.mean(dim=1) if weights_M is None else -(logs @ weights_M) / weights_M.sum()


class Icon(Heads):
    """KL(p~ || q~) up to its constant, with p uniform on the neighbors of a row and p~ = (1 - alpha) p + alpha / N.

    L_i = -(1 - alpha) mean_{j in neighbors} log(N q~(j | i)) - alpha mean_{j in all rows} log(N q~(j | i)); a step
    draws one neighbor for each row, and `num_negatives` rows for the second mean.

    Where we differ from the paper: its second mean is over the batch. A batch lies scattered over the ranks, so ours is
    over a sample of the rows that every rank holds, a part of it in each step: the same expectation, and nothing to
    exchange. The first mean has no gradient through E[size_c] (see raydc.core.objectives.heads).
    """

    negatives: Tensor
    """(P, D) float32 pool of rows from which each step takes its negatives."""

    negative_weights: Tensor
    """(P,) float32 row weights of the pool; (0,) where all are 1."""

    steps: Tensor
    """() int64 steps so far."""

    def __init__(self, inputs: ObjectiveInputs) -> None:
        super().__init__(inputs)
        self.register_buffer("negatives", torch.empty(0, inputs.dim))
        self.register_buffer("negative_weights", torch.empty(0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def initialize(self, sample_NL: Tensor, weights_N: Tensor | None = None) -> None:
        """Start the head, and choose the rows from which each step takes its negatives."""
        super().initialize(sample_NL, weights_N)
        if self.plan.debiasing > 0:
            chosen = rotating_rows(len(sample_NL), 16 * self.plan.num_negatives, 0, stream_seed(self.seed, 16))
            chosen = chosen.to(sample_NL.device)
            self.negatives = sample_NL[chosen].clone()
            if weights_N is not None:
                self.negative_weights = weights_N[chosen].clone()

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its part `attraction`."""
        assert batch.positives is not None
        alpha, head, marginals = self.plan.debiasing, self.heads[0], self.marginals[0]
        log_phi = head(batch.x_ND)
        lift = log_lift(log_phi, head(batch.positives.x_ND), log_marginal(marginals))
        losses = -(1.0 - alpha) * log_debiased(lift, alpha)
        attraction = (batch.weights_N * losses).sum()
        if alpha > 0:
            rows = rotating_rows(len(self.negatives), self.plan.num_negatives, int(self.steps), self.seed)
            rows = rows.to(self.negatives.device)
            weights = self.negative_weights[rows].to(log_phi.dtype) if len(self.negative_weights) else None
            others = head(self.negatives[rows]).exp()
            losses = losses + alpha * negative_loss(log_phi.exp(), others, marginals, alpha, weights)
        self._note_step(batch, [log_phi], [losses])
        return {"loss": (batch.weights_N * losses).sum(), "attraction": attraction.detach()}

    def after_step(self, sums: Tensor | None) -> None:
        """Count the step."""
        super().after_step(sums)
        self.steps += 1

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state_tensors` gave; the negatives' number is known only now."""
        self.negatives = tensors["negatives"].to(self.negatives.device)
        self.negative_weights = tensors["negative_weights"].to(self.negatives.device)
        super().load_state_tensors(tensors)
