"""What a fit knows between two steps, and how it goes into a checkpoint and back: nothing depends on the ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.predictor import Predictor
from raydc.core.objectives.kernel import Kernel, top_soft_assign
from raydc.core.objectives.objective import Objective
from raydc.core.objectives.snapshot import encode
from raydc.core.search.nearest import SquaredDistances, nearest
from raydc.core.training import checkpoint
from raydc.core.training.progress import Progress


@dataclass(frozen=True)
class Clustering:
    """An encoder (None: the preprocessed rows themselves) and centers in its space."""

    encoder: nn.Module | None
    centers_KL: Tensor
    kernel: Kernel
    predictor: Predictor | None = None
    """What decides a row's leaf; None: the nearest center."""

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the (N, L) float32 points of (N, D) preprocessed rows in the clustering space."""
        return encode(self.encoder, x_ND, "float32")

    @torch.no_grad()
    def label(self, z_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the leaf (N,) int64 of each point, decided in float64, and its confidence (N,) float32.

        The confidence is the soft assignment to the nearest center, or the probability that the predictor gives. A
        row's answer does not depend on the rows beside it.
        """
        if self.predictor is not None:
            ids, top = self.predictor.best(z_NL, 1)
            return ids[:, 0], top[:, 0]
        distances = SquaredDistances(self.centers_KL)
        squared_NK = distances(z_NL)
        ids, _ = distances.nearest(z_NL, squared_NK, 1)
        return ids[:, 0], top_soft_assign(squared_NK, self.kernel)

    def reordered(self, order_K: Tensor) -> "Clustering":
        """Return the one whose leaf i is the present leaf order_K[i] (int64); leaves that are left out are gone."""
        predictor = None if self.predictor is None else self.predictor.reordered(order_K)
        return replace(self, centers_KL=self.centers_KL[order_K.to(self.centers_KL.device)], predictor=predictor)

    def assign(self, z_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the leaf (N,) int64 of each point and its squared distance (N,) to the leaf's center."""
        if self.predictor is None:
            ids, squared = nearest(z_NL, self.centers_KL)
            return ids[:, 0], squared[:, 0]
        leaf = self.predictor.best(z_NL, 1)[0][:, 0]
        return leaf, ((z_NL - self.centers_KL[leaf]) ** 2).sum(dim=1)


@dataclass(kw_only=True)
class State:
    """The state of a fit."""

    autoencoder: Autoencoder | None
    generator: torch.Generator
    phase: str = "pretrain"
    epoch: int = 0
    within: Progress | None = None
    """How far this epoch has come; None between two epochs."""

    converged: bool = False
    centers: Tensor | None = None
    """(K, L) centers of k-means, from which the objective starts."""

    kernel: Kernel | None = None
    baselines: dict[str, Clustering] = field(default_factory=dict)
    objective: Objective | None = None
    """From k-means on, unless k-means is the last step."""

    optimizer: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def to_checkpoint(state: State, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as tensors and JSON values; `fingerprint` is that of the settings."""
    tensors = {"generator": state.generator.get_state()} | checkpoint.prefixed("optimizer", state.optimizer)
    values: dict[str, Any] = {
        "fingerprint": fingerprint,
        "phase": state.phase,
        "epoch": state.epoch,
        "within": None if state.within is None else state.within.values(),
        "converged": state.converged,
        "history": state.history,
        "kernels": {name: [b.kernel.alpha, b.kernel.scale] for name, b in state.baselines.items()},
    }
    if state.within is not None:
        tensors |= checkpoint.prefixed("within", state.within.tensors())
    if state.autoencoder is not None:
        tensors |= checkpoint.prefixed("autoencoder", state.autoencoder.state_dict())
    if state.centers is not None and state.kernel is not None:
        tensors["centers"] = state.centers
        values["kernel"] = [state.kernel.alpha, state.kernel.scale]
    for name, baseline in state.baselines.items():
        tensors[f"baseline_centers.{name}"] = baseline.centers_KL
        if baseline.encoder is not None:
            tensors |= checkpoint.prefixed(f"baseline_encoder.{name}", baseline.encoder.state_dict())
    if state.objective is not None:
        tensors |= checkpoint.prefixed("objective", state.objective.state_tensors())
    # safetensors refuses two names for one storage: the autoencoder_kmeans centers are the first centers.
    return {name: tensor.clone() for name, tensor in tensors.items()}, values


def restore(
    state: State, tensors: dict[str, Tensor], values: dict[str, Any], new_autoencoder: Callable[[], Autoencoder]
) -> None:
    """Give a fresh state what `to_checkpoint` returned, on the CPU; the objective is left to the caller."""
    state.generator.set_state(tensors["generator"])
    state.phase, state.epoch, state.converged = values["phase"], values["epoch"], values["converged"]
    state.within = Progress.restored(values["within"], checkpoint.with_prefix("within", tensors))
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


def _loaded(new_autoencoder: Callable[[], Autoencoder], weights: dict[str, Tensor]) -> nn.Module:
    encoder = new_autoencoder().encoder
    encoder.load_state_dict(weights)
    return encoder.eval()
