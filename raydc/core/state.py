"""What a fit knows between two steps, and how it goes into a checkpoint and back: nothing of it depends on ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raydc.core import checkpoint
from raydc.core.autoencoder import Autoencoder
from raydc.core.objectives.kernel import Kernel
from raydc.core.snapshot import Snapshot


@dataclass(frozen=True)
class Clustering:
    """An encoder (None: the preprocessed rows themselves) and centres in its space."""

    encoder: nn.Module | None
    centers_KL: Tensor
    kernel: Kernel


@dataclass
class State:
    """The state of a fit."""

    autoencoder: Autoencoder | None
    generator: torch.Generator
    phase: str = "pretrain"
    epoch: int = 0
    converged: bool = False
    centers: Tensor | None = None
    kernel: Kernel | None = None
    baselines: dict[str, Clustering] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def to_checkpoint(state: State, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as tensors and JSON values; `fingerprint` is that of the settings."""
    tensors = {"generator": state.generator.get_state()} | checkpoint.prefixed("optimizer", state.optimizer)
    values: dict[str, Any] = {
        "fingerprint": fingerprint,
        "phase": state.phase,
        "epoch": state.epoch,
        "converged": state.converged,
        "history": state.history,
        "kernels": {name: [b.kernel.alpha, b.kernel.scale] for name, b in state.baselines.items()},
    }
    if state.autoencoder is not None:
        tensors |= checkpoint.prefixed("autoencoder", state.autoencoder.state_dict())
    if state.centers is not None and state.kernel is not None:
        tensors["centers"] = state.centers
        values["kernel"] = [state.kernel.alpha, state.kernel.scale]
    for name, baseline in state.baselines.items():
        tensors[f"baseline_centers.{name}"] = baseline.centers_KL
        if baseline.encoder is not None:
            tensors |= checkpoint.prefixed(f"baseline_encoder.{name}", baseline.encoder.state_dict())
    if state.snapshot is not None:
        tensors |= checkpoint.prefixed("snapshot_encoder", state.snapshot.encoder.state_dict())
        tensors["snapshot_centers"] = state.snapshot.centers_KL
        tensors["snapshot_frequencies"] = state.snapshot.frequencies_K
    # safetensors refuses two names for one storage: the autoencoder_kmeans centres are the first centres.
    return {name: tensor.clone() for name, tensor in tensors.items()}, values


def restore(
    state: State, tensors: dict[str, Tensor], values: dict[str, Any], new_autoencoder: Callable[[], Autoencoder]
) -> None:
    """Give a fresh state what `to_checkpoint` returned, on the CPU."""
    state.generator.set_state(tensors["generator"])
    state.phase, state.epoch, state.converged = values["phase"], values["epoch"], values["converged"]
    state.history = values["history"]
    state.optimizer = checkpoint.with_prefix("optimizer", tensors)
    if state.autoencoder is not None:
        state.autoencoder.load_state_dict(checkpoint.with_prefix("autoencoder", tensors))
    if "centers" in tensors:
        state.centers, state.kernel = tensors["centers"], Kernel(*values["kernel"])
    for name, kernel in values["kernels"].items():
        weights = checkpoint.with_prefix(f"baseline_encoder.{name}", tensors)
        encoder = _loaded(new_autoencoder, weights) if weights else None
        state.baselines[name] = Clustering(encoder, tensors[f"baseline_centers.{name}"], Kernel(*kernel))
    if "snapshot_centers" in tensors:
        encoder = _loaded(new_autoencoder, checkpoint.with_prefix("snapshot_encoder", tensors))
        state.snapshot = Snapshot(encoder, tensors["snapshot_centers"], tensors["snapshot_frequencies"])


def _loaded(new_autoencoder: Callable[[], Autoencoder], weights: dict[str, Tensor]) -> nn.Module:
    encoder = new_autoencoder().encoder
    encoder.load_state_dict(weights)
    return encoder.eval()
