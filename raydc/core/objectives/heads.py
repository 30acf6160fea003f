"""What TEMI and I-Con share: heads on frozen rows, the marginals of their leaves, and the look at all rows.

Letters: N rows, H heads, K leaves, D width of a row.

The marginal p_k(c), the mean of p(c | x) over all rows, stands in the denominator of both losses. It is exact at the
start of an epoch, by a pass over all rows of all ranks, and follows the steps in between as a moving average of their
means, which the trainer adds up over the ranks. No gradient goes through it, and none is missing where it matters: the
derivative of the loss by log p_k(c) is the mass of the pairs in leaf c, and as long as that is p_k(c) itself, as it is
when neighbors share their leaf, the sum over c is the derivative of sum_c p_k(c) = 1.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from raydc.core.hashing import hash_keys, stream_seed
from raydc.core.models.head import Head, HeadPredictor, calibrated_temperature
from raydc.core.objectives.objective import Minibatch, Objective, Parts
from raydc.core.search.starts import sample_kmeans
from raydc.core.training.settings import HeadSettings

_RANDOM_TEMPERATURE = 0.1
"""Of a head that starts at random, as in TEMI."""


def log_marginal(marginals_K: Tensor) -> Tensor:
    """Return log p_k, at least log 1e-8: a leaf that nothing belongs to must not make its pairs infinitely rare."""
    return marginals_K.clamp_min(1e-8).log()


class Heads(Objective):
    """Heads, their marginals, and which of them is the best so far."""

    encoder = None
    needs_partners = True
    marginals: Tensor
    losses: Tensor
    best: Tensor
    passes: Tensor

    def __init__(self, parts: Parts, plan: HeadSettings, num_heads: int) -> None:
        super().__init__()
        num_leaves = len(parts.centers_KL)
        self.plan, self.kernel, self.seed = plan, parts.kernel, parts.settings.seed
        self._start, self._moves = parts.settings.cluster.start, parts.settings.cluster.moves
        self._target_top_p = parts.settings.refine.target_top_q
        self.heads = nn.ModuleList(Head(parts.dim, plan.hidden_dims, num_leaves) for _ in range(num_heads))
        self.judged = Head(parts.dim, plan.hidden_dims, num_leaves).requires_grad_(False)
        """The best head as it was at the last pass."""
        self.sample_rows = min(parts.settings.cluster.init_rows, max(16384, 64 * num_leaves))
        self.register_buffer("centers", parts.centers_KL.clone())
        self.register_buffer("marginals", torch.full((num_heads, num_leaves), 1.0 / num_leaves, dtype=torch.float64))
        # Sum of each head's loss since the last pass, and of the weights.
        self.register_buffer("losses", torch.zeros(num_heads + 1, dtype=torch.float64))
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self._seen = torch.empty(0)

    def start(self, sample_NL: Tensor) -> None:
        """Give the heads their first numbers: the first from the fit's k-means, others from k-means of other seeds."""
        mean = sample_NL.double().mean(dim=0).float()
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
                found = sample_kmeans(sample_NL.cpu(), len(centers), seed=seed, how=self._start, moves=self._moves)
                centers = found.to(centers.device)
            head.start_at_centers(mean, 1.0, centers)
            if self.plan.temperature == "auto":
                found = calibrated_temperature(head, sample_NL, target_top_p=self._target_top_p)
            else:
                found = float(self.plan.temperature)
            head.temperature.fill_(found)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return one group with the heads' own rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.plan.learning_rate}]

    def refresh(self, epoch: int, step: int, num_steps: int) -> "MarginalPass | None":
        """Return the pass over all rows that begins an epoch."""
        return MarginalPass(self) if step == 0 else None

    def step_sums(self, batch: Minibatch) -> Tensor | None:
        """Return the sums of the last call: (H, K) of p(c | x), H losses and the weight."""
        return self._seen

    def after_step(self, sums: Tensor | None) -> None:
        """Move the marginals toward the means of the step, and count the losses."""
        assert sums is not None
        found, counted = sums[: self.marginals.numel()].view_as(self.marginals), sums[self.marginals.numel() :]
        self.marginals.lerp_(found / counted[-1], 1.0 - self.plan.marginal_momentum)
        self.losses += counted

    def predictor(self) -> HeadPredictor:
        """Return the best head."""
        return HeadPredictor(self.judges()[self._best_now()])

    def judges(self) -> list[Head]:
        """Return the heads whose marginals are kept and which label rows."""
        return self._heads()

    def _heads(self) -> list[Head]:
        return [head for head in self.heads if isinstance(head, Head)]

    def _best_now(self) -> int:
        return int(self.losses[:-1].argmin()) if float(self.losses[-1]) > 0 else int(self.best)

    def _keep_sums(self, batch: Minibatch, log_p_HNK: list[Tensor], losses_HN: list[Tensor]) -> None:
        """Keep what `step_sums` returns of a call of `forward`."""
        w = batch.weights_N.double()
        with torch.no_grad():
            mass = [w @ p.detach().exp().double() for p in log_p_HNK]
            losses = [(w * loss.detach().double()).sum() for loss in losses_HN]
            self._seen = torch.cat([*mass, torch.stack([*losses, w.sum()])])


class MarginalPass:
    """The exact marginals over all rows of all ranks, and how many rows have changed their leaf since the last pass."""

    def __init__(self, objective: Heads) -> None:
        self._objective = objective
        self._best = objective._best_now()
        self._mass = torch.zeros_like(objective.marginals)
        self._sizes = torch.zeros_like(objective.marginals[0])
        # Weight, rows, changed rows, sum of the largest p.
        self._scalars = torch.zeros(4, dtype=torch.float64, device=self._mass.device)

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""
        w = batch.weights_N.double()
        for number, judge in enumerate(self._objective.judges()):
            p = judge(batch.x_ND).exp()
            self._mass[number] += w @ p.double()
            if number == self._best:
                top, leaves = p.max(dim=1)
        self._sizes += torch.bincount(leaves, minlength=len(self._sizes))
        changed = (self._objective.judged(batch.x_ND).argmax(dim=1) != leaves).sum()
        counted = (w.sum(), len(batch), changed, top.sum())
        self._scalars += torch.stack([torch.as_tensor(v, device=w.device).double() for v in counted])

    def sums(self) -> Tensor:
        """Return the mass of every leaf, the sizes and the four scalars as one tensor."""
        return torch.cat([self._mass.flatten(), self._sizes, self._scalars])

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Keep the marginals and the best head; return changed, top_q, empty and largest_share."""
        objective = self._objective
        mass, rest = sums[: self._mass.numel()].view_as(self._mass), sums[self._mass.numel() :]
        sizes, (weight, count, changed, top) = rest[:-4], rest[-4:].tolist()
        first = int(objective.passes) == 0
        objective.marginals.copy_(mass / weight)
        objective.best.fill_(self._best)
        objective.losses.zero_()
        objective.passes += 1
        objective.judged.load_state_dict(objective.judges()[self._best].state_dict())
        return {
            "changed": 1.0 if first else changed / count,
            "top_q": top / count,
            "empty": int((sizes == 0).sum()),
            "largest_share": float(sizes.max()) / count,
            "best_head": self._best,
        }


def rotating_rows(pool_size: int, num: int, step: int, seed: int) -> Tensor:
    """Return the places of the `num` rows of a pool that belong to a step; in pool_size / num steps each comes once."""
    shuffled = hash_keys(torch.arange(pool_size), seed).argsort()
    return shuffled[(torch.arange(min(num, pool_size)) + step * num) % pool_size]
