"""How a point of the clustering space gets its leaf, where it is not the nearest center. Letters: N rows, K leaves, L.

A predictor is saved with the model: its kind in config.json, its tensors in predictor.safetensors. With one, the
centers of the model are the means of its leaves: distances are told from them and the tree is built over them, but they
decide no label.
"""

from typing import Protocol

import torch
from torch import Tensor

from raydc.core.models.head import HeadPredictor
from raydc.core.models.mixture import Mixture
from raydc.core.models.prototypes import Prototypes


class Predictor(Protocol):
    """A rule that gives each point its leaves by probability."""

    @property
    def kind(self) -> str:
        """The name that `build_predictor` knows."""

    def best(self, z_NL: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the `num` most probable leaves of each point, (N, num) int64, and their probabilities, float32.

        Most probable first, ties by the lower leaf; a row's answer must not depend on the rows beside it.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return all that `build_predictor` needs to make it again."""

    def reordered(self, order_K: Tensor) -> "Predictor":
        """Return the one whose leaf i is the present leaf order_K[i]; leaves that are left out get no row."""

    def to(self, device: torch.device) -> "Predictor":
        """Return it on another device."""


def build_predictor(kind: str, tensors: dict[str, Tensor]) -> Predictor:
    """Return the predictor of a kind that `tensors` describes, on the CPU.

    Raises:
        ValueError: no predictor has this kind.
    """
    if kind == Mixture.kind:
        return Mixture(**tensors)
    if kind == Prototypes.kind:
        return Prototypes(**tensors)
    if kind == "head":
        return HeadPredictor.from_tensors(tensors)
    raise ValueError(f"unknown kind of predictor {kind!r}")
