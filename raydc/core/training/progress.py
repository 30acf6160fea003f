"""How far an epoch has come: all that its remaining steps and its entry in the history need. Letter: L, code width."""

from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

_WATCHED = "watched"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The part of an epoch that is done, over all ranks: nothing depends on which rank held which row."""

    steps: int
    """Steps done; the next one has this number."""

    weight: float
    """Weight of their rows."""

    seconds: float
    losses: dict[str, float]
    """Sum of each loss over their rows."""

    numbers: dict[str, Any]
    """Numbers of the passes over all rows, for the history."""

    watched_calls: int
    """Calls of the encoder that its watch has counted."""

    watched: Tensor | None
    """(1 + L, 1 + L) float64 sums of the codes that were watched; None where none were."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds as tensors."""
        return {} if self.watched is None else {_WATCHED: self.watched}

    def values(self) -> dict[str, Any]:
        """Return what a checkpoint holds as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != _WATCHED}

    @classmethod
    def restored(cls, values: dict[str, Any] | None, tensors: dict[str, Tensor]) -> "Progress | None":
        """Return what `values` and `tensors` gave; None where the checkpoint is one between two epochs."""
        return None if values is None else cls(**values, watched=tensors.get(_WATCHED))


class Keeper(Protocol):
    """What makes the checkpoints inside an epoch."""

    def due(self) -> bool:
        """Return whether one is to be made now. Every rank asks equally often, and gets the same answer."""

    def keep(self, progress: Progress) -> None:
        """Make one; every rank calls it."""
