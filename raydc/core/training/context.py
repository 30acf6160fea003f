"""What a fit needs from its launcher, and the records that it hands over to it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from raydc.core.training import checkpoint
from raydc.core.training.settings import FitSettings
from raydc.core.training.state import State, to_checkpoint


class Context(Protocol):
    """What the fit needs from its launcher: Ray Train in a job, a plain object in tests."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Publish metrics, and on rank 0 a checkpoint folder. Every rank calls it equally often."""

    def latest_checkpoint(self) -> Path | None:
        """Return the folder of the last checkpoint, or None."""


class LocalContext:
    """A launcher in the present process: one rank, no Ray, and no checkpoints of its own."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        *,
        device: torch.device | None = None,
        start_from: Path | None = None,
        on_report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Launch a fit here.

        Args:
            device: where it computes; the CPU by default.
            start_from: folder of a checkpoint that the fit goes on from.
            on_report: called with each entry of the history.
        """
        self.device = device if device is not None else torch.device("cpu")
        self._start_from, self._on_report = start_from, on_report

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Hand the entry on; the checkpoint is not kept."""
        if self._on_report is not None:
            self._on_report(metrics)

    def latest_checkpoint(self) -> Path | None:
        """Return the checkpoint to go on from."""
        return self._start_from


class Recorder:
    """Writes the history of a fit, and hands its checkpoints to the launcher."""

    def __init__(self, state: State, settings: FitSettings, context: Context) -> None:
        self._state, self._settings, self._context = state, settings, context

    def end_epoch(self, epoch: int, num_epochs: int, entry: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Record an epoch, and keep a checkpoint where one is due.

        Args:
            epoch: counted from 0.
            num_epochs: how many the phase has at most.
            entry: of the history.
            optimizer: as the epoch left it.
        """
        self._state.epoch = epoch + 1
        self._state.optimizer = checkpoint.optimizer_tensors(optimizer)
        last = epoch + 1 == num_epochs or self._state.converged
        self.record(
            entry | {"num_epochs": num_epochs}, keep=last or (epoch + 1) % self._settings.checkpoint_epochs == 0
        )

    def record(self, entry: dict[str, Any], *, keep: bool = True) -> None:
        """Add an entry to the history and report it, with a checkpoint if it is to be kept."""
        entry["num_workers"] = self._context.world_size
        self._state.history.append(entry)
        if self._context.rank == 0 and keep:
            with tempfile.TemporaryDirectory(prefix="raydc-checkpoint-") as folder:
                checkpoint.save(Path(folder), *to_checkpoint(self._state, self._settings.fingerprint))
                self._context.report(entry, Path(folder))
        else:
            self._context.report(entry)
