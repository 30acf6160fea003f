"""What TEMI and I-Con share: heads on frozen rows, the marginals of their leaves, and the pass over all rows.

Letters: N rows, H heads, K leaves, D width of a row.

The marginal p_k(c), the mean of p(c | x) over all rows, stands in the denominator of both losses. It is exact at the
start of an epoch, by a pass over all rows of all ranks, and follows the steps in between as a moving average of their
means, which the trainer adds up over the ranks. No gradient goes through it, and none is missing where it matters: the
derivative of the loss by log p_k(c) is the mass of the pairs in leaf c, and as long as that is p_k(c) itself, as it is
when neighbors share their leaf, the sum over c is the derivative of sum_c p_k(c) = 1.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from raydc.core.hashing import hash_keys, stream_seed
from raydc.core.models.head import Head, HeadPredictor, calibrated_temperature
from raydc.core.objectives.objective import Minibatch, Objective, ObjectiveInputs, weighted_mean
from raydc.core.search.starts import sample_kmeans

_RANDOM_TEMPERATURE = 0.1
"""Temperature of a head that starts at random, as in TEMI."""


def log_marginal(marginals_K: Tensor) -> Tensor:
    """Return log p_k, at least log 1e-8: a leaf that nothing belongs to must not make its pairs infinitely rare."""
    return marginals_K.clamp_min(1e-8).log()


class Heads(Objective):
    """Heads, their marginals, and which of them is the best so far."""

    encoder = None

    marginals: Tensor
    """(H, K) float64 p_k of each head."""

    losses: Tensor
    """(H + 1,) float64 sum of each head's loss since the last pass, and of the weights."""

    best: Tensor
    """() int64 number of the best head at the last pass."""

    passes: Tensor
    """() int64 passes so far."""

    def __init__(self, inputs: ObjectiveInputs, num_heads: int = 1) -> None:
        super().__init__()
        plan = inputs.settings.head
        num_leaves = len(inputs.centers_KL)
        self.plan, self.kernel, self.seed = plan, inputs.kernel, inputs.settings.seed
        self._cluster = inputs.settings.cluster
        self._target_top_p = inputs.settings.refine.target_top_q
        self.heads = nn.ModuleList(Head(inputs.dim, plan.hidden_dims, num_leaves) for _ in range(num_heads))
        self.last_best = Head(inputs.dim, plan.hidden_dims, num_leaves).requires_grad_(False)
        """The best head as it was at the last pass."""
        self.sample_rows = min(inputs.settings.cluster.init_rows, max(16384, 64 * num_leaves))
        self.register_buffer("centers", inputs.centers_KL.clone())
        self.register_buffer("marginals", torch.full((num_heads, num_leaves), 1.0 / num_leaves, dtype=torch.float64))
        self.register_buffer("losses", torch.zeros(num_heads + 1, dtype=torch.float64))
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self._step_sums = torch.empty(0)

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        return cls(inputs)

    def initialize(self, sample_NL: Tensor, weights_N: Tensor | None = None) -> None:
        """Give the heads their first numbers: the first from the fit's k-means, others from k-means of other seeds."""
        mean = weighted_mean(sample_NL, weights_N).float()
        for number, head in enumerate(self._heads()):
            seed = stream_seed(self.seed, 15, number)
            if self.plan.start == "random":
                temperature = _RANDOM_TEMPERATURE if self.plan.temperature == "auto" else float(self.plan.temperature)
                # Drawn on the CPU, so that every device starts alike.
                drawn = copy.deepcopy(head).cpu()
                drawn.start_at_random(mean.cpu(), temperature, torch.Generator().manual_seed(seed))
                head.load_state_dict(drawn.state_dict())
                continue
            centers = self.centers
            if number:
                other = sample_kmeans(
                    sample_NL.cpu(),
                    len(centers),
                    seed=seed,
                    how=self._cluster.start,
                    moves=self._cluster.moves,
                    weights_N=None if weights_N is None else weights_N.cpu(),
                )
                centers = other.to(centers.device)
            head.start_at_centers(mean, 1.0, centers)
            if self.plan.temperature == "auto":
                temperature = calibrated_temperature(
                    head, sample_NL, target_top_p=self._target_top_p, weights_N=weights_N
                )
            else:
                temperature = float(self.plan.temperature)
            head.temperature.fill_(temperature)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return one group with the heads' own rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.plan.learning_rate}]

    def refresh(self, epoch: int, step: int, num_steps: int) -> "MarginalPass | None":
        """Return the pass over all rows that begins an epoch."""
        return MarginalPass(self) if step == 0 else None

    def step_sums(self, batch: Minibatch) -> Tensor | None:
        """Return the sums of the last call: (H, K) of p(c | x), H losses and the weight."""
        return self._step_sums

    def after_step(self, sums: Tensor | None) -> None:
        """Move the marginals toward the means of the step, and count the losses."""
        assert sums is not None
        mass_HK = sums[: self.marginals.numel()].view_as(self.marginals)
        losses = sums[self.marginals.numel() :]
        self.marginals.lerp_(mass_HK / losses[-1], 1.0 - self.plan.marginal_momentum)
        self.losses += losses

    def predictor(self) -> HeadPredictor:
        """Return the best head."""
        return HeadPredictor(self.labeling_heads()[self._best_now()])

    def labeling_heads(self) -> list[Head]:
        """Return the heads whose marginals are kept and which label rows."""
        return self._heads()

    def _heads(self) -> list[Head]:
        return [head for head in self.heads if isinstance(head, Head)]

    def _best_now(self) -> int:
        return int(self.losses[:-1].argmin()) if float(self.losses[-1]) > 0 else int(self.best)

    def _note_step(self, batch: Minibatch, log_p_HNK: list[Tensor], losses_HN: list[Tensor]) -> None:
        """Keep what `step_sums` returns after this call of `forward`."""
        w = batch.weights_N.double()
        with torch.no_grad():
            mass = [w @ p.detach().exp().double() for p in log_p_HNK]
            losses = [(w * loss.detach().double()).sum() for loss in losses_HN]
            self._step_sums = torch.cat([*mass, torch.stack([*losses, w.sum()])])


class MarginalPass:
    """The exact marginals over all rows of all ranks, and the share of the rows that changed their leaf."""

    def __init__(self, objective: Heads) -> None:
        self._objective = objective
        self._best = objective._best_now()
        self._mass = torch.zeros_like(objective.marginals)
        self._sizes = torch.zeros_like(objective.marginals[0])
        # Weights of the rows, of the changed ones, and of the largest p.
        self._scalars = torch.zeros(3, dtype=torch.float64, device=self._mass.device)

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""
        w = batch.weights_N.double()
        for number, head in enumerate(self._objective.labeling_heads()):
            p = head(batch.x_ND).exp()
            self._mass[number] += w @ p.double()
            if number == self._best:
                top, leaves = p.max(dim=1)
        self._sizes.index_add_(0, leaves, w)
        changed = w * (self._objective.last_best(batch.x_ND).argmax(dim=1) != leaves)
        self._scalars += torch.stack([w.sum(), changed.sum(), (batch.weights_N * top).sum().double()])

    def sums(self) -> Tensor:
        """Return the mass of every leaf, the sizes and the three scalars as one tensor."""
        return torch.cat([self._mass.flatten(), self._sizes, self._scalars])

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Keep the marginals and the best head; return changed, top_q, empty and largest_share."""
        objective = self._objective
        mass, rest = sums[: self._mass.numel()].view_as(self._mass), sums[self._mass.numel() :]
        sizes, (weight, changed, top) = rest[:-3], rest[-3:].tolist()
        first = int(objective.passes) == 0
        objective.marginals.copy_(mass / weight)
        objective.best.fill_(self._best)
        objective.losses.zero_()
        objective.passes += 1
        objective.last_best.load_state_dict(objective.labeling_heads()[self._best].state_dict())
        return {
            "changed": 1.0 if first else changed / weight,
            "top_q": top / weight,
            "empty": int((sizes == 0).sum()),
            "largest_share": float(sizes.max()) / weight,
            "best_head": self._best,
        }


def rotating_rows(pool_size: int, num: int, step: int, seed: int) -> Tensor:
    """Return the places of the `num` rows of a pool that belong to a step; in pool_size / num steps each comes once."""
    shuffled = hash_keys(torch.arange(pool_size), seed).argsort()
    return shuffled[(torch.arange(min(num, pool_size)) + step * num) % pool_size]
