"""TEMI: teacher and student heads that agree on neighboring rows. Letters: N rows, H heads, K leaves, D width."""

import copy

import torch
from torch import Tensor

from raydc.core.models.head import Head
from raydc.core.objectives.heads import Heads, log_marginal
from raydc.core.objectives.objective import Minibatch, ObjectiveInputs


def pair_loss(log_s_NK: Tensor, log_t_NK: Tensor, log_pk_K: Tensor, *, beta: float) -> Tensor:
    """Return -log sum_c (p_s(c | x) p_t(c | x'))^beta / p_k(c) of each pair, as (N,).

    In logarithms throughout: for beta < 1 the power has an infinite slope at 0.

    Args:
        log_s_NK: (N, K) log p_s of the rows, by the student.
        log_t_NK: (N, K) log p_t of their positives, by the teacher.
        log_pk_K: (K,) log of the marginals.
        beta: 1 is pointwise mutual information; less keeps the leaves even, also where that cuts large groups.

    Source: Adaloglou, Michels, Kalisch, Kollmann, "Exploring the Limits of Deep Image Clustering using Pretrained
    Models", BMVC 2023, arXiv:2303.17896, section 3.
    """
    return -torch.logsumexp(beta * (log_s_NK + log_t_NK) - log_pk_K.to(log_s_NK.dtype), dim=1)


def pair_weight(log_t_NK: Tensor, log_t2_NK: Tensor) -> Tensor:
    """Return sum_c p_t(c | x) p_t(c | x') of each pair, as (N,): how surely the teacher puts both in one leaf.

    Source: the same, section 3.
    """
    return torch.logsumexp(log_t_NK + log_t2_NK, dim=1).exp()


class Temi(Heads):
    """The loss of pairs (x, x'), x' a neighbor of x, symmetrized and weighted by the mean weight of all heads.

    The teacher is a moving average of the student. Its labels are the result, those of the head of the least loss.

    Where we differ from the authors' code: the marginals are exact at the start of an epoch and otherwise lag one step;
    prototypes may grow (see Head); and heads without hidden layers may start at k-means centers.
    """

    def __init__(self, inputs: ObjectiveInputs) -> None:
        super().__init__(inputs, inputs.settings.head.num_heads)
        self.teachers = copy.deepcopy(self.heads).requires_grad_(False)

    def initialize(self, sample_NL: Tensor, weights_N: Tensor | None = None) -> None:
        """Start the students, and the teachers at the same numbers."""
        super().initialize(sample_NL, weights_N)
        self.teachers.load_state_dict(self.heads.state_dict())

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return the weighted sum over the rows, `loss`, its mean over the heads."""
        assert batch.positives is not None
        x, x2 = batch.x_ND, batch.positives.x_ND
        with torch.no_grad():
            targets = [(teacher(x), teacher(x2)) for teacher in self.labeling_heads()]
            weight = torch.stack([pair_weight(t, t2) for t, t2 in targets]).mean(dim=0)
        losses = []
        for head, (t, t2), marginals in zip(self.heads, targets, self.marginals, strict=True):
            log_pk = log_marginal(marginals)
            s, s2 = head(x), head(x2)
            both = pair_loss(s, t2, log_pk, beta=self.plan.pair_exponent) + pair_loss(
                s2, t, log_pk, beta=self.plan.pair_exponent
            )
            losses.append(weight * 0.5 * both)
        self._note_step(batch, [t for t, _ in targets], losses)
        return {"loss": (batch.weights_N * torch.stack(losses).mean(dim=0)).sum()}

    def after_step(self, sums: Tensor | None) -> None:
        """Let the teachers follow the students."""
        super().after_step(sums)
        for ours, theirs in zip(self.teachers.parameters(), self.heads.parameters(), strict=True):
            ours.lerp_(theirs.detach(), 1.0 - self.plan.teacher_momentum)

    def labeling_heads(self) -> list[Head]:
        """Return the teachers."""
        return [head for head in self.teachers if isinstance(head, Head)]
