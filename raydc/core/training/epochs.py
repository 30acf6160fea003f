"""The epochs of any phase: steps, gradients over all ranks, the check for numbers that are not finite.

Letters: N rows, D width of a row.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raydc.core.models.autoencoder import precision
from raydc.core.models.preprocess import Preprocess
from raydc.core.process import block_rows
from raydc.core.training.collapse import SpaceWatch
from raydc.core.training.collectives import Ranks
from raydc.core.training.rows import Rows, Step
from raydc.core.training.settings import FitSettings

_CHECK_STEPS = 100


def _limit_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients down to this norm, as clip_grad_norm_ does, without a pass over those that are below it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On a GPU the question itself would cost more than the pass: the CPU would wait for the answer.
    if norm.device.type == "cpu" and bool(norm <= max_norm):
        return
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def _nothing(step: Step) -> None:
    """Do nothing after a step."""


@dataclass(frozen=True)
class Trainer:
    """What every phase works with, on one rank."""

    rows: Rows
    preprocess: Preprocess
    settings: FitSettings
    ranks: Ranks
    arithmetic: str
    """`bf16` or `float32`, of the layers."""

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

    def run_epoch(
        self,
        phase: str,
        epoch: int,
        steps: Iterator[Step],
        loss_of: Callable[[Step], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None = None,
        encoder: nn.Module | None = None,
        num_steps: int = 1,
        before_step: Callable[[int], bool | None],
        after_step: Callable[[Step], None] = _nothing,
    ) -> dict[str, Any]:
        """Return the means of the epoch's sums, after a step of the optimizer for each training step.

        Args:
            phase: for the history and messages.
            epoch: counted from 0.
            steps: this rank's rows of each step.
            loss_of: weighted sums over the rows of a step; `loss` is stepped, the others are told.
            optimizer: of the parameters in the loss.
            max_grad_norm: gradients are scaled down to it.
            encoder: its codes are watched for collapse; the history gets their effective rank.
            num_steps: about how many there will be; of many the watch sees some.
            before_step: called with the number of the step; False ends the epoch.
            after_step: called when the optimizer has stepped.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        started = time.perf_counter()
        totals: dict[str, Tensor] = {}
        weight = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        unchecked: list[Tensor] = []
        number = -1
        where = f"{phase} epoch {epoch + 1}"
        with SpaceWatch(encoder, num_steps) as watch:
            for number, step in enumerate(steps):
                if before_step(number) is False:
                    break
                sums = loss_of(step)
                # DDP averages the gradients over the ranks; times world_size over the step's global weight is the mean
                # over all rows of the step, whichever rank holds them.
                loss = sums["loss"] * (self.ranks.world_size / step.total_weight).float()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if max_grad_norm is not None:
                    _limit_gradients(optimizer, max_grad_norm)
                optimizer.step()
                after_step(step)
                unchecked.append(loss.detach())
                if len(unchecked) == _CHECK_STEPS:
                    self._check_finite(unchecked, number, where)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value.detach().double()
                weight += step.total_weight
        self._check_finite(unchecked, number, where)
        entry: dict[str, Any] = {"phase": phase, "epoch": epoch, "steps": number + 1}
        if totals:
            means = self.ranks.sum(torch.stack(list(totals.values()))) / weight
            entry |= dict(zip(totals, means.tolist(), strict=True))
        if (rank := watch.effective_rank(self.ranks)) is not None:
            entry["effective_rank"] = rank
        seconds = time.perf_counter() - started
        return entry | {"seconds": seconds, "rows_per_second": self.rows.num_rows / seconds}

    def _check_finite(self, losses: list[Tensor], last_step: int, where: str) -> None:
        # Nothing is saved between two checks, so a broken step never reaches a checkpoint.
        first_bad = torch.zeros(self.ranks.world_size, dtype=torch.int64)
        if losses:
            bad = ~torch.isfinite(torch.stack(losses))
            if bool(bad.any()):
                first_bad[self.ranks.rank] = last_step + 1 - len(losses) + int(bad.int().argmax()) + 1
        first_bad = self.ranks.sum(first_bad)
        if bool((first_bad > 0).any()):
            # The earliest step: from the next one on, the gradients have carried it to every rank.
            rank = int(torch.where(first_bad > 0, first_bad, torch.iinfo(first_bad.dtype).max).argmin())
            raise FloatingPointError(
                f"{where}: the loss is not finite at step {int(first_bad[rank])} on rank {rank}. Lower the learning "
                "rate, set refine.max_grad_norm, or scale the rows (preprocess.method=scale or standardize)."
            )
        losses.clear()
