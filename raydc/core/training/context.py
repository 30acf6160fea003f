"""What a fit needs from its launcher, and the records that it hands over to it."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from raydc.core.training import checkpoint
from raydc.core.training.epochs import Trainer
from raydc.core.training.progress import Progress
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

    def should_checkpoint(self) -> bool:
        """Return whether a checkpoint is wanted now, as before a node is taken away. Every rank asks equally often."""


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

    def should_checkpoint(self) -> bool:
        """Return False: none would be kept."""
        return False


class Recorder:
    """Writes the history of a fit, and hands its checkpoints to the launcher."""

    def __init__(self, state: State, settings: FitSettings, context: Context) -> None:
        self._state, self._settings, self._context = state, settings, context
        self.last_checkpoint = time.monotonic()
        """When the last one was made, or the fit began, by this rank's clock."""

    def end_epoch(self, epoch: int, num_epochs: int, entry: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Record an epoch, and keep a checkpoint where one is due.

        Args:
            epoch: counted from 0.
            num_epochs: how many the phase has at most.
            entry: of the history.
            optimizer: as the epoch left it.
        """
        self._state.epoch, self._state.within = epoch + 1, None
        self._state.optimizer = checkpoint.optimizer_tensors(optimizer)
        keep = epoch + 1 == num_epochs or self._state.converged
        keep = keep or (epoch + 1) % self._settings.checkpoint_epochs == 0 or self.is_late()
        self.record(entry | {"num_epochs": num_epochs}, keep=keep)

    def is_late(self) -> bool:
        """Return whether the last checkpoint is checkpoint_seconds old, by this rank's clock; rank 0's counts."""
        seconds = self._settings.checkpoint_seconds
        return seconds is not None and time.monotonic() - self.last_checkpoint >= seconds

    def keeper(self, trainer: Trainer, epoch: int, num_epochs: int, optimizer: torch.optim.Optimizer) -> "StepKeeper":
        """Return what makes checkpoints inside an epoch; see `end_epoch` for the numbers."""
        place = {"phase": self._state.phase, "epoch": epoch, "num_epochs": num_epochs}
        return StepKeeper(self, self._state, trainer, optimizer, place)

    def wanted(self) -> bool:
        """Return whether the launcher wants a checkpoint now; every rank asks."""
        return self._context.should_checkpoint()

    def record(self, entry: dict[str, Any], *, keep: bool = True) -> None:
        """Add an entry to the history and report it, with a checkpoint if it is to be kept."""
        entry["num_workers"] = self._context.world_size
        self._state.history.append(entry)
        self.hand_over(entry, keep=keep)

    def hand_over(self, entry: dict[str, Any], *, keep: bool) -> None:
        """Report an entry, with a checkpoint of the state if it is to be kept; every rank calls it."""
        if keep:
            self.last_checkpoint = time.monotonic()
        if self._context.rank == 0 and keep:
            with tempfile.TemporaryDirectory(prefix="raydc-checkpoint-") as folder:
                checkpoint.save(Path(folder), *to_checkpoint(self._state, self._settings.fingerprint))
                self._context.report(entry, Path(folder))
        else:
            self._context.report(entry)


class StepKeeper:
    """Makes checkpoints inside an epoch: every checkpoint_seconds, and when the launcher wants one."""

    def __init__(
        self,
        recorder: Recorder,
        state: State,
        trainer: Trainer,
        optimizer: torch.optim.Optimizer,
        place: dict[str, Any],
    ) -> None:
        """Keep the state of an epoch.

        Args:
            recorder: of the fit.
            state: of the fit.
            trainer: for the ranks, and for whether the rows can be taken up inside an epoch.
            optimizer: of the epoch.
            place: phase, epoch and num_epochs, as in the history.
        """
        self._recorder, self._state, self._trainer = recorder, state, trainer
        self._optimizer, self._place = optimizer, place
        self._looked = time.monotonic()

    def due(self) -> bool:
        """Return whether a checkpoint is to be made now; rank 0's clock and any rank's launcher decide."""
        if not self._trainer.rows.steps_are_fixed:
            return False
        now, settings = time.monotonic(), self._trainer.settings
        look, late = self._trainer.ranks.broadcast(
            torch.tensor([int(now - self._looked >= settings.look_seconds), int(self._recorder.is_late())])
        ).tolist()
        if not look:
            return bool(late)
        self._looked = now
        wanted = torch.tensor([int(self._recorder.wanted())])
        return bool(late) or bool(self._trainer.ranks.max(wanted)[0])

    def keep(self, progress: Progress) -> None:
        """Make a checkpoint that goes on after the last step."""
        state = self._state
        state.within, state.optimizer = progress, checkpoint.optimizer_tensors(self._optimizer)
        step = {"step": progress.steps, "num_workers": self._trainer.ranks.world_size}
        self._recorder.hand_over(self._place | step, keep=True)
