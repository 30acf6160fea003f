"""The epochs of any phase: steps, gradients over all ranks, the check for numbers that are not finite.

Letters: N rows, D width of a row.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydc.core.models.autoencoder import precision
from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.objective import Minibatch
from raydc.core.process import block_rows
from raydc.core.training.collapse import SpaceWatch, effective_rank
from raydc.core.training.collectives import Ranks
from raydc.core.training.progress import Keeper, Progress
from raydc.core.training.rows import Batch, Rows, Step
from raydc.core.training.settings import FitSettings


def make_optimizer(
    name: str, parameters: Iterable[Any], *, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Return the optimizer of a name: `adam` is AdamW, `sgd` has momentum 0.9.

    Args:
        name: `adam` or `sgd`.
        parameters: tensors or groups, as PyTorch takes them.
        learning_rate: of the groups without one of their own.
        weight_decay: decoupled for `adam`.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=weight_decay, fused=True)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


class Epoch(ABC):
    """One training pass over the rows: what a phase does before, in and after each step."""

    section = "refine"
    """Field of FitSettings that holds the settings of the phase, for messages."""

    def __init__(
        self,
        phase: str,
        number: int,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None,
        encoder: nn.Module | None = None,
        num_steps: int = 1,
    ) -> None:
        """Describe an epoch.

        Args:
            phase: for the history and messages.
            number: counted from 0.
            optimizer: of the parameters in the loss.
            max_grad_norm: longer gradients are scaled down to it; None leaves them.
            encoder: its codes are watched for collapse, and the history gets their effective rank.
            num_steps: about how many there will be; the watch sees every n-th of many.
        """
        self.phase, self.number, self.optimizer = phase, number, optimizer
        self.max_grad_norm, self.encoder, self.num_steps = max_grad_norm, encoder, num_steps
        self.pass_numbers: dict[str, Any] = {}
        """Numbers of the passes over all rows, for the history."""

    @abstractmethod
    def steps(self, first: int) -> Iterator[Step]:
        """Yield this rank's rows of each step, from number `first` on."""

    def before_step(self, number: int) -> bool:
        """Prepare the step of this number; return False to end the epoch before it."""
        return True

    @abstractmethod
    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return weighted sums over the rows of a step: `loss` is minimized, the others go to the history."""

    def after_step(self) -> None:  # noqa: B027 - most phases have nothing to do here
        """Follow up on the optimizer's step."""


class FiniteCheck:
    """Stops a fit on every rank when a loss is not finite; nothing is saved before the check."""

    def __init__(self, epoch: Epoch, ranks: Ranks, check_steps: int) -> None:
        self._epoch, self._ranks, self._check_steps = epoch, ranks, check_steps
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor, number: int) -> bool:
        """Keep the loss of the step of this number; look at all that are kept when they are many, and return True."""
        self._losses.append(loss)
        if len(self._losses) < self._check_steps:
            return False
        self.check(number)
        return True

    def check(self, last_number: int) -> None:
        """Look at the losses since the last check; every rank calls it.

        Raises:
            FloatingPointError: one is not finite, on any rank.
        """
        first_bad = torch.zeros(self._ranks.world_size, dtype=torch.int64)
        if self._losses:
            bad = ~torch.isfinite(torch.stack(self._losses))
            if bool(bad.any()):
                first_bad[self._ranks.rank] = last_number + 1 - len(self._losses) + int(bad.int().argmax()) + 1
        first_bad = self._ranks.sum(first_bad)
        if bool((first_bad > 0).any()):
            # The earliest step: from the next one on, the gradients have carried it to every rank.
            rank = int(torch.where(first_bad > 0, first_bad, torch.iinfo(first_bad.dtype).max).argmin())
            section = self._epoch.section
            raise FloatingPointError(
                f"{self._epoch.phase} epoch {self._epoch.number + 1}: the loss is not finite at step "
                f"{int(first_bad[rank])} on rank {rank}. Lower {section}.learning_rate or {section}.max_grad_norm, or "
                "preprocess the rows to a smaller scale."
            )
        self._losses.clear()


class _Sums:
    """What the entry of an epoch in the history is made from: sums over this rank's rows, or all ranks' on rank 0."""

    def __init__(self, epoch: Epoch, watch: SpaceWatch, ranks: Ranks, before: Progress | None) -> None:
        """Begin an epoch, or go on where `before` left it."""
        self._epoch, self._watch, self._ranks = epoch, watch, ranks
        self._losses: dict[str, Tensor] = {}
        self._weight = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._started = time.perf_counter()
        if before is not None:
            # The sums are those of all ranks, and are added up again.
            alone = ranks.rank == 0
            self._losses = {
                name: torch.tensor(value if alone else 0.0, dtype=torch.float64, device=ranks.device)
                for name, value in before.losses.items()
            }
            self._weight += before.weight
            self._started -= before.seconds
            watched = before.watched.to(ranks.device) if alone and before.watched is not None else None
            watch.go_on(before.watched_calls, watched)
            epoch.pass_numbers |= before.numbers

    def add(self, sums: dict[str, Tensor], step: Step) -> None:
        """Count a step."""
        for name, value in sums.items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach().double()
        self._weight += step.total_weight

    def progress(self, steps: int) -> Progress:
        """Return where the epoch stands after so many steps; every rank asks."""
        losses = self._ranks.sum(torch.stack(list(self._losses.values()))).tolist() if self._losses else []
        calls, watched = self._watch.so_far(self._ranks)
        return Progress(
            steps=steps,
            weight=float(self._weight),
            seconds=time.perf_counter() - self._started,
            losses=dict(zip(self._losses, losses, strict=True)),
            numbers=dict(self._epoch.pass_numbers),
            watched_calls=calls,
            watched=watched,
        )


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What every phase works with, on one rank."""

    rows: Rows
    preprocess: Preprocess
    settings: FitSettings
    ranks: Ranks
    arithmetic: str
    """Arithmetic of the layers: `bf16` or `float32`."""

    @property
    def block_rows(self) -> int:
        """Rows to encode at once."""
        return block_rows(self.ranks.device, self.settings.block_rows)

    def layers(self) -> AbstractContextManager[None]:
        """Return the context in which the layers compute in `arithmetic`."""
        return precision(self.ranks.device, self.arithmetic)

    def distributed(self, module: nn.Module) -> nn.Module:
        """Return the module with its gradients averaged over the ranks."""
        module.to(self.ranks.device)
        if self.ranks.world_size == 1:
            return module
        device_ids = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)

    def minibatch(self, batch: Batch, seed: int) -> Minibatch:
        """Return preprocessed rows as an objective sees them; `seed` is that of the epoch's noise."""
        return Minibatch(
            batch.keys_N, self.preprocess(batch.x_ND), batch.weights_N, positions_N=batch.positions_N, seed=seed
        )

    def run_epoch(self, epoch: Epoch, before: Progress | None = None, keeper: Keeper | None = None) -> dict[str, Any]:
        """Step the optimizer through an epoch; return its entry in the history, with the mean of each loss over rows.

        Args:
            epoch: what a step does.
            before: where an earlier attempt at this epoch left off; None begins it.
            keeper: makes checkpoints inside the epoch, after a check of the losses; None makes none.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        finite = FiniteCheck(epoch, self.ranks, self.settings.check_steps)
        first = 0 if before is None else before.steps
        number = first - 1
        with SpaceWatch(epoch.encoder, epoch.num_steps) as watch:
            so_far = _Sums(epoch, watch, self.ranks, before)
            for number, step in enumerate(epoch.steps(first), first):
                if not epoch.before_step(number):
                    break
                sums = epoch.losses(step)
                # DDP averages the gradients over the ranks; times world_size over the step's global weight is the mean
                # over all rows of the step, whichever rank holds them.
                loss = sums["loss"] * (self.ranks.world_size / step.total_weight).float()
                epoch.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if epoch.max_grad_norm is not None:
                    _limit_gradients(epoch.optimizer, epoch.max_grad_norm)
                epoch.optimizer.step()
                epoch.after_step()
                so_far.add(sums, step)
                if finite.add(loss.detach(), number) and keeper is not None and keeper.due():
                    keeper.keep(so_far.progress(number + 1))
        finite.check(number)
        done = so_far.progress(number + 1)
        entry: dict[str, Any] = {"phase": epoch.phase, "epoch": epoch.number, "steps": done.steps}
        entry |= {name: value / done.weight for name, value in done.losses.items()}
        if done.watched is not None:
            entry["effective_rank"] = effective_rank(done.watched)
        return entry | {"seconds": done.seconds, "rows_per_second": self.rows.num_rows / done.seconds}


def _limit_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients down to this norm, as clip_grad_norm_ does, without a pass over those that are below it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On a GPU the question itself would cost more than the pass: the CPU would wait for the answer.
    if norm.device.type == "cpu" and bool(norm <= max_norm):
        return
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
