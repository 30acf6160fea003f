"""Pretraining of the autoencoder: layer by layer, then as a whole. Letters: N rows, D width of a row.

Both go on where they left off, between two steps: everything random is a hash of the rows' keys.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raydc.core.hashing import stream_seed
from raydc.core.objectives.layer import LayerPair
from raydc.core.objectives.reconstruction import Reconstruction, corrupt
from raydc.core.training import checkpoint
from raydc.core.training.context import Recorder
from raydc.core.training.epochs import Epoch, Trainer, make_optimizer
from raydc.core.training.rows import Step
from raydc.core.training.settings import PretrainSettings
from raydc.core.training.state import State


def pretrain_layers(trainer: Trainer, state: State, recorder: Recorder) -> None:
    """Train one pair of layers after the other, each on the codes of those below it."""
    plan, autoencoder = trainer.settings.pretrain, state.autoencoder
    assert autoencoder is not None
    num_layers = len(trainer.settings.autoencoder.hidden_dims) + 1
    for layer in range(state.epoch // plan.layer_epochs, num_layers):
        pair = LayerPair(autoencoder, layer, share=plan.layer_corruption)
        module = trainer.distributed(pair)
        optimizer = _optimizer(plan, pair)
        if state.epoch > layer * plan.layer_epochs or state.within is not None:
            checkpoint.restore_optimizer(optimizer, state.optimizer)
        for number in range(state.epoch, (layer + 1) * plan.layer_epochs):
            keeper = recorder.keeper(trainer, number, num_layers * plan.layer_epochs, optimizer)
            epoch = LayerEpoch(trainer, module, optimizer, layer, number)
            entry = trainer.run_epoch(epoch, state.within, keeper)
            recorder.end_epoch(number, num_layers * plan.layer_epochs, entry | {"layer": layer}, optimizer)
    state.phase, state.epoch, state.optimizer = "pretrain", 0, {}


def pretrain_whole(trainer: Trainer, state: State, recorder: Recorder) -> None:
    """Train all layers together on reconstruction."""
    plan, autoencoder = trainer.settings.pretrain, state.autoencoder
    assert autoencoder is not None
    module = trainer.distributed(Reconstruction(autoencoder))
    optimizer = _optimizer(plan, autoencoder)
    checkpoint.restore_optimizer(optimizer, state.optimizer)
    for number in range(state.epoch, plan.num_epochs):
        epoch = PretrainEpoch(trainer, module, optimizer, autoencoder.encoder, number)
        keeper = recorder.keeper(trainer, number, plan.num_epochs, optimizer)
        entry = trainer.run_epoch(epoch, state.within, keeper)
        recorder.end_epoch(number, plan.num_epochs, entry, optimizer)


class _ScheduledEpoch(Epoch):
    """An epoch whose learning rate follows the schedule of the pretraining."""

    section = "pretrain"

    def __init__(
        self,
        phase: str,
        number: int,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        *,
        seed: int,
        epochs_done: int,
        num_epochs: int,
        encoder: nn.Module | None = None,
    ) -> None:
        """Describe an epoch; the schedule spans `num_epochs`, and `epochs_done` of these are over."""
        plan = trainer.settings.pretrain
        self._steps_per_epoch = trainer.rows.num_steps(plan.batch_rows)
        super().__init__(
            phase,
            number,
            optimizer,
            max_grad_norm=plan.max_grad_norm,
            encoder=encoder,
            num_steps=self._steps_per_epoch if encoder is not None else 1,
        )
        self.trainer, self.plan, self.seed = trainer, plan, seed
        self._first_step = epochs_done * self._steps_per_epoch
        self._num_steps = num_epochs * self._steps_per_epoch

    def steps(self, first: int) -> Iterator[Step]:
        """Yield this rank's rows of each step, from number `first` on."""
        return self.trainer.rows.steps(self.plan.batch_rows, self.seed, first)

    def before_step(self, number: int) -> bool:
        """Set the learning rate."""
        rate = learning_rate(self.plan, self._first_step + number, self._num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return True


class LayerEpoch(_ScheduledEpoch):
    """An epoch on one pair of layers."""

    def __init__(
        self, trainer: Trainer, module: nn.Module, optimizer: torch.optim.Optimizer, layer: int, number: int
    ) -> None:
        """Train `module`, the pair of this layer; `number` counts the epochs of all layers."""
        layer_epochs = trainer.settings.pretrain.layer_epochs
        of_layer = number - layer * layer_epochs
        seed = stream_seed(trainer.settings.seed, 10, layer, of_layer)
        super().__init__("layers", number, optimizer, trainer, seed=seed, epochs_done=of_layer, num_epochs=layer_epochs)
        self._module = module

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the reconstruction of the layer's input."""
        with self.trainer.layers():
            x = self.trainer.preprocess(step.batch.x_ND)
            sums: dict[str, Tensor] = self._module(x, step.batch.weights_N, step.batch.keys_N, self.seed)
        return sums


class PretrainEpoch(_ScheduledEpoch):
    """An epoch on the reconstruction of (corrupted) rows by the whole autoencoder."""

    def __init__(
        self, trainer: Trainer, module: nn.Module, optimizer: torch.optim.Optimizer, encoder: nn.Module, number: int
    ) -> None:
        """Train `module`; the codes of `encoder` are watched."""
        seed = stream_seed(trainer.settings.seed, 2, number)
        num_epochs = trainer.settings.pretrain.num_epochs
        super().__init__(
            "pretrain",
            number,
            optimizer,
            trainer,
            seed=seed,
            epochs_done=number,
            num_epochs=num_epochs,
            encoder=encoder,
        )
        self._module = module

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Return the reconstruction of the rows."""
        x = self.trainer.preprocess(step.batch.x_ND)
        noisy = corrupt(x, step.batch.keys_N, share=self.plan.corruption, seed=self.seed)
        with self.trainer.layers():
            sums: dict[str, Tensor] = self._module(x, step.batch.weights_N, noisy)
        return sums


def learning_rate(plan: PretrainSettings, step: int, num_steps: int) -> float:
    """Return the rate of a step: a linear rise, then constant, a cosine to zero, or falls to a tenth."""
    warmup = min(plan.warmup_steps, num_steps // 10)
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    if plan.schedule == "constant":
        return plan.learning_rate
    if plan.schedule == "steps":
        return plan.learning_rate * 0.1 ** (step // plan.decay_steps)
    done = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    return plan.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def _optimizer(plan: PretrainSettings, module: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(
        plan.optimizer, list(module.parameters()), learning_rate=plan.learning_rate, weight_decay=plan.weight_decay
    )
