"""Pretraining of the autoencoder: layer by layer, then as a whole. Letters: N rows, D width of a row.

Both end where they left off: an epoch is the unit of resuming, and everything random is a hash of the rows' keys.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raydc.core.hashing import stream_seed
from raydc.core.objectives.layer import LayerPair
from raydc.core.objectives.reconstruction import Reconstruction, corrupt
from raydc.core.training import checkpoint
from raydc.core.training.epochs import Trainer
from raydc.core.training.rows import Step
from raydc.core.training.settings import PretrainSettings
from raydc.core.training.state import State

EndEpoch = Callable[[int, int, dict[str, Any], torch.optim.Optimizer], None]
"""Called with (epoch, number of epochs, history entry, optimizer) when an epoch is done."""


def pretrain_layers(trainer: Trainer, state: State, end_epoch: EndEpoch) -> None:
    """Train one pair of layers after the other, each on the codes of those below it."""
    plan, autoencoder = trainer.settings.pretrain, state.autoencoder
    assert autoencoder is not None
    num_layers = len(trainer.settings.autoencoder.hidden_dims) + 1
    num_steps = trainer.rows.num_steps(plan.batch_rows)
    for layer in range(state.epoch // plan.layer_epochs, num_layers):
        pair = LayerPair(autoencoder, layer, share=plan.layer_corruption)
        module = trainer.distributed(pair)
        optimizer = _optimizer(plan, list(pair.parameters()))
        first = state.epoch - layer * plan.layer_epochs
        if first > 0:
            checkpoint.restore_optimizer(optimizer, state.optimizer)
        for epoch in range(first, plan.layer_epochs):
            seed = stream_seed(trainer.settings.seed, 10, layer, epoch)

            def loss_of(step: Step, seed: int = seed, module: torch.nn.Module = module) -> dict[str, Tensor]:
                with trainer.layers():
                    return module(trainer.preprocess(step.batch.x_ND), step.batch.weights_N, step.batch.keys_N, seed)

            def set_rate(step: int, epoch: int = epoch, optimizer: torch.optim.Optimizer = optimizer) -> None:
                _set_rate(optimizer, learning_rate(plan, epoch * num_steps + step, plan.layer_epochs * num_steps))

            steps = trainer.rows.steps(plan.batch_rows, seed)
            number = layer * plan.layer_epochs + epoch
            entry = trainer.run_epoch(
                "layers", number, steps, loss_of, optimizer, max_grad_norm=plan.max_grad_norm, before_step=set_rate
            )
            end_epoch(number, num_layers * plan.layer_epochs, entry | {"layer": layer}, optimizer)
    state.phase, state.epoch, state.optimizer = "pretrain", 0, {}


def pretrain_whole(trainer: Trainer, state: State, end_epoch: EndEpoch) -> None:
    """Train all layers together on reconstruction."""
    plan, autoencoder = trainer.settings.pretrain, state.autoencoder
    assert autoencoder is not None
    module = trainer.distributed(Reconstruction(autoencoder))
    optimizer = _optimizer(plan, list(autoencoder.parameters()))
    checkpoint.restore_optimizer(optimizer, state.optimizer)
    num_steps = trainer.rows.num_steps(plan.batch_rows)
    for epoch in range(state.epoch, plan.num_epochs):
        seed = stream_seed(trainer.settings.seed, 2, epoch)

        def loss_of(step: Step, seed: int = seed) -> dict[str, Tensor]:
            x = trainer.preprocess(step.batch.x_ND)
            noisy = corrupt(x, step.batch.keys_N, share=plan.corruption, seed=seed)
            with trainer.layers():
                return module(x, step.batch.weights_N, noisy)

        def set_rate(step: int, epoch: int = epoch) -> None:
            _set_rate(optimizer, learning_rate(plan, epoch * num_steps + step, plan.num_epochs * num_steps))

        steps = trainer.rows.steps(plan.batch_rows, seed)
        entry = trainer.run_epoch(
            "pretrain",
            epoch,
            steps,
            loss_of,
            optimizer,
            max_grad_norm=plan.max_grad_norm,
            encoder=autoencoder.encoder,
            num_steps=num_steps,
            before_step=set_rate,
        )
        end_epoch(epoch, plan.num_epochs, entry, optimizer)


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


def _optimizer(plan: PretrainSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if plan.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=plan.learning_rate, momentum=0.9, weight_decay=plan.weight_decay, fused=True
        )
    return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
