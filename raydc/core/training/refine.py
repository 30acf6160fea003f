"""Training on the objective, after k-means. Letters: K leaves, L width of the code."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from raydc.core.hashing import stream_seed
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, Objective, run_pass
from raydc.core.process import release_memory
from raydc.core.training import checkpoint
from raydc.core.training.context import Recorder
from raydc.core.training.epochs import Epoch, Trainer, make_optimizer
from raydc.core.training.kmeans_on_codes import (
    calibrated,
    find_optimum,
    latent_blocks,
    run_lloyd,
    same_rows_each_pass,
    sample_latents,
    start_centers,
    start_rows,
)
from raydc.core.training.rows import Batch, Step
from raydc.core.training.state import State


class PairSource(Protocol):
    """A source of positives: a second row for each row, such as a random one of its neighbors."""

    def __call__(self, batch: Batch, seed: int) -> Batch:
        """Return one positive for each row, in their order; chosen by hash of (row key, seed).

        The positives may lie on other ranks: every rank calls it in every step, with no rows where it has none.
        """


@dataclass(frozen=True)
class Refinement:
    """What all epochs on the objective work with."""

    trainer: Trainer
    state: State
    objective: Objective
    pairs: PairSource | None = None

    def run(self, recorder: Recorder) -> None:
        """Train until few rows change their leaf, then settle the centers."""
        objective, state, plan = self.objective, self.state, self.trainer.settings.refine
        module = self.trainer.distributed(objective)
        groups = objective.parameter_groups(plan.learning_rate)
        optimizer = make_optimizer(plan.optimizer, groups, learning_rate=plan.learning_rate)
        rates = [group["lr"] for group in optimizer.param_groups]
        checkpoint.restore_optimizer(optimizer, state.optimizer)
        for number in range(state.epoch, plan.num_epochs):
            if state.converged:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * objective.rate_factor(number)
            if objective.reclusters(number) and state.within is None:
                objective.set_centers(*self.recluster(anew=False))
            epoch = RefineEpoch(self, module, optimizer, number)
            keeper = recorder.keeper(self.trainer, number, plan.num_epochs, optimizer)
            entry = self.trainer.run_epoch(epoch, state.within, keeper)
            recorder.end_epoch(number, plan.num_epochs, entry | epoch.pass_numbers, optimizer)
        if objective.final_centers != "keep":
            objective.set_centers(*self.recluster(anew=objective.final_centers == "kmeans"))
        state.phase = "done"

    def recluster(self, *, anew: bool) -> tuple[Tensor, Kernel]:
        """Return (K, L) centers by k-means over all rows, and the kernel calibrated to them.

        Lloyd's iterations go on from the objective's centers, or all begins `anew` from a start on a sample.
        """
        trainer, objective = self.trainer, self.objective
        sample = sample_latents(trainer, objective.encoder, start_rows(trainer.settings.cluster))
        blocks, generator = latent_blocks(trainer, objective.encoder, trainer.arithmetic), self.state.generator
        if anew:
            first = start_centers(trainer, sample, stream_seed(trainer.settings.seed, 4))
            sample.shrink_to_calibrate(len(first))
            keep_ids = same_rows_each_pass(trainer, objective.encoder)
            kmeans = find_optimum(trainer, blocks, first, generator, keep_ids=keep_ids)
        else:
            sample.shrink_to_calibrate(len(objective.centers))
            kmeans = run_lloyd(trainer, blocks, objective.centers.detach(), generator)
        return kmeans.centers_KD, calibrated(trainer, sample, kmeans.centers_KD)[0]


class RefineEpoch(Epoch):
    """An epoch on the objective: its passes over all rows, its loss, and what it learns from each step."""

    def __init__(
        self, refinement: Refinement, module: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int
    ) -> None:
        """Train `module`, the objective with its gradients averaged over the ranks."""
        trainer, plan = refinement.trainer, refinement.trainer.settings.refine
        super().__init__(
            "refine",
            number,
            optimizer,
            max_grad_norm=plan.max_grad_norm,
            encoder=refinement.objective.encoder,
            num_steps=trainer.rows.num_steps(plan.batch_rows),
        )
        self.trainer, self.plan, self.module = trainer, plan, module
        self.objective, self.state, self.pairs = refinement.objective, refinement.state, refinement.pairs
        self.seed = stream_seed(trainer.settings.seed, 7, number)
        self._batch: Minibatch | None = None

    def steps(self, first: int) -> Iterator[Step]:
        """Yield this rank's rows of each step, from number `first` on."""
        seed = stream_seed(self.trainer.settings.seed, 5, self.number)
        return self.trainer.rows.steps(self.plan.batch_rows, seed, first)

    def before_step(self, number: int) -> bool:
        """Make the pass over all rows that the objective asks for; False when few rows changed their leaf."""
        refresh = self.objective.refresh(self.number, number, self.num_steps)
        if refresh is None:
            return True
        trainer = self.trainer
        blocks = (trainer.minibatch(batch, self.seed) for batch in trainer.rows.blocks(trainer.block_rows))
        self.pass_numbers |= run_pass(refresh, blocks, trainer.ranks.sum)
        # The steps need it in other sizes.
        release_memory()
        self.state.converged = self.pass_numbers.get("changed", 1.0) < self.plan.tolerance
        return not self.state.converged

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the objective's sums over the rows of a step."""
        batch = self._batch = self._with_positives(step)
        with torch.no_grad():
            sums = self.objective.batch_sums(batch)
        if sums is not None:
            batch = replace(batch, sums=self.trainer.ranks.sum(sums))
        with self.trainer.layers():
            losses: dict[str, Tensor] = self.module(batch)
        return losses

    def after_step(self) -> None:
        """Give the objective its sums over the step's rows on all ranks, under the weights just stepped."""
        batch, self._batch = self._batch, None
        assert batch is not None
        with torch.no_grad():
            sums = self.objective.step_sums(batch)
            self.objective.after_step(None if sums is None else self.trainer.ranks.sum(sums))

    def _with_positives(self, step: Step) -> Minibatch:
        batch = replace(self.trainer.minibatch(step.batch, self.seed), total_weight=step.total_weight)
        if self.pairs is None:
            return batch
        return replace(batch, positives=self.trainer.minibatch(self.pairs(step.batch, self.seed), self.seed))
