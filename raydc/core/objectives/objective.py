"""What the trainer asks of a clustering objective, and what it hands over.

An objective is a module that holds what it trains. It sees rows, returns sums, and never calls a collective: the
trainer (raydc.core.training.fit) adds its sums up over the ranks, steps the optimizer and saves its tensors. What it
does must not depend on which rank holds which row, so its randomness is a hash of the rows' keys and its decisions come
from added-up sums alone.

The course of a fit, and the member that is called:

1. `check_inputs`, before anything is trained: a pass that refuses rows which the objective cannot take.
2. `from_inputs` makes the objective, in a new fit and in a resumed one. What must be known before, such as its title
   and whether it needs an autoencoder or pairs, is its line in raydc.core.objectives.table.
3. New fit only: `initialize` with a sample of the codes, the same on every rank. Resumed fit: `load_state_tensors`,
   with what `state_tensors` gave to the checkpoint.
4. Before an epoch `reclusters`: whether Lloyd's iterations move the centers (`set_centers`). Before each step
   `refresh`: None, or a pass over all rows of all ranks (`run_pass`).
5. `batch_sums`, if the loss needs numbers of the whole step's rows; the trainer puts their sum into `Minibatch.sums`.
   Passes and such sums run without gradients and outside autocast: `snapshot.encode` brings the training's arithmetic.
6. The module is called with the `Minibatch`, in the training's arithmetic, and returns weighted sums over its rows. The
   trainer divides by the weight of the step's rows on all ranks, goes backward and lets the optimizer step.
7. `after_step`, with the sums that `step_sums` returned, added up over the ranks.
8. After the last epoch: `final_centers` says whether the centers stay as they are or k-means has the last word; then
   `centers` and `predictor` decide the leaf of a row (raydc.core.models.predictor).

Letters: N rows, K leaves, D width of a preprocessed row, L width of the code (D where there is no encoder).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.predictor import Predictor
from raydc.core.models.teacher import Teacher
from raydc.core.objectives.kernel import Kernel
from raydc.core.training.settings import FitSettings

_KERNEL = "kernel"
"""Name of the kernel among the state tensors."""

_AUTOENCODER = ("encoder.", "decoder.")
"""Beginnings of the names of weights that are saved with the autoencoder."""


@dataclass(frozen=True)
class Minibatch:
    """Rows as an objective sees them; possibly none."""

    keys_N: Tensor
    """(n,) int64, the row's place in the input: the same in every run, on every rank."""

    x_ND: Tensor
    """(n, D) float32 preprocessed rows."""

    weights_N: Tensor
    """(n,) float32 row weights; a mean divides by their sum, never by n."""

    positions_N: Tensor | None
    """(n,) int64 places in this rank's resident shard, where numbers may be kept per row; None for streamed rows."""

    seed: int
    """Seed of this epoch's noise: hash it with the keys (raydc.core.hashing)."""

    total_weight: Tensor | None = None
    """Float64 scalar: the weight of the step's rows on all ranks. None in a pass."""

    sums: Tensor | None = None
    """What `batch_sums` returned, added up over all ranks. None where it returned None, and in a pass."""

    positives: "Minibatch | None" = None
    """(n,) a second row for each row, such as a neighbor, where the table of objectives says `needs_pairs`."""

    def __len__(self) -> int:
        return len(self.keys_N)


@dataclass(frozen=True, kw_only=True)
class ObjectiveInputs:
    """What an objective is made from, the same on every rank."""

    autoencoder: Autoencoder | None
    """Pretrained; None for an objective that works on the preprocessed rows (see raydc.core.objectives.table)."""

    centers_KL: Tensor
    """(K, L) float32 centers of k-means over all rows, on the training device."""

    kernel: Kernel
    """Calibrated to the centers."""

    settings: FitSettings
    arithmetic: str
    """Arithmetic of the layers in training: `bf16` or `float32`."""

    num_rows: int
    """Rows of all ranks."""

    dim: int
    """D."""

    num_local_rows: int = 0
    """Rows that a pass sees on this rank, where that is known: room to take for what is kept of them."""

    teacher: Teacher | None = None
    """A fitted model whose classes are to be learned."""


class Pass(Protocol):
    """A sweep over all rows of all ranks."""

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""

    def sums(self) -> Tensor:
        """Return what was counted, in float64, so that adding two ranks' tensors gives that of their rows together."""

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Take the sums of all ranks; return numbers for the history of the epoch.

        `changed`, the share of the rows whose leaf is another one than at the last pass (1 in the first), ends the fit
        when it falls below refine.tolerance. Both are weights of rows, never their number.
        """


def run_pass(sweep: Pass, blocks: Iterable[Minibatch], all_sum: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return the numbers of a pass over this rank's rows; `all_sum` adds up a tensor over the ranks."""
    with torch.no_grad():
        for batch in blocks:
            sweep.add(batch)
        return sweep.end(all_sum(sweep.sums()))


class Objective(nn.Module):
    """An objective that needs nothing beside its loss; others override what they need.

    A subclass sets `encoder`, `centers` and `kernel`. Where it takes over the autoencoder's encoder and decoder it
    calls them so: their weights are saved with the autoencoder, once.
    Parameters that are not to be trained must have requires_grad False; every other one takes part in each call.
    """

    encoder: nn.Module | None
    """Network into the clustering space; None for the preprocessed rows themselves."""

    centers: Tensor
    """(K, L) centers as they are now: a parameter, or a buffer where the optimizer is not to move them."""

    kernel: Kernel
    """Shape of the confidence of a label by the nearest center."""

    sample_rows = 0
    """Rows of the sample that `initialize` gets, about."""

    final_centers: Literal["keep", "lloyd", "kmeans"] = "keep"
    """After the last epoch: keep the centers; Lloyd's iterations from them; or k-means anew."""

    @classmethod
    def check_inputs(cls, settings: FitSettings) -> Pass | None:
        """Return a pass over all rows that comes before any training and refuses what the objective cannot take."""
        return None

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        raise NotImplementedError

    def initialize(self, sample_NL: Tensor, weights_N: Tensor | None = None) -> None:
        """Begin a new fit.

        Every rank gets the same rows and must end with the same numbers.

        Args:
            sample_NL: (N, L) float32 codes, or preprocessed rows, on the training device; (0, L) for `sample_rows` 0.
            weights_N: (N,) float32 row weights; None where all are 1.
        """

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups; one with a `lr` of its own has that rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": learning_rate}]

    def rate_factor(self, epoch: int) -> float:
        """Return what every rate of `parameter_groups` is multiplied with in this epoch."""
        return 1.0

    def refresh(self, epoch: int, step: int, num_steps: int) -> Pass | None:
        """Return the pass that comes before this step of an epoch, if any; the same on every rank."""
        return None

    def reclusters(self, epoch: int) -> bool:
        """Return whether Lloyd's iterations over all rows move the centers (`set_centers`) before this epoch."""
        return False

    def batch_sums(self, batch: Minibatch) -> Tensor | None:
        """Return numbers of this rank's rows of the step, to be added up over the ranks before the loss."""
        return None

    def step_sums(self, batch: Minibatch) -> Tensor | None:
        """Return numbers of this rank's rows of the step under the weights just stepped, to be added up."""
        return None

    def after_step(self, sums: Tensor | None) -> None:
        """Take the sums of all ranks after the optimizer's step."""

    def set_centers(self, centers_KL: Tensor, kernel: Kernel) -> None:
        """Take (K, L) centers from k-means, and the kernel calibrated to them."""
        with torch.no_grad():
            self.centers.copy_(centers_KL)
        self.kernel = kernel

    def predictor(self) -> Predictor | None:
        """Return what decides a row's leaf and confidence; None: the nearest center and the kernel."""
        return None

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside the autoencoder's weights; nothing of one rank alone."""
        own = {k: t for k, t in self.state_dict().items() if not k.startswith(_AUTOENCODER)}
        return own | {_KERNEL: torch.tensor([self.kernel.alpha, self.kernel.scale], dtype=torch.float64)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state_tensors` gave.

        Raises:
            ValueError: tensors are missing, or unknown.
        """
        self.kernel = Kernel(*tensors[_KERNEL].tolist())
        missing, unexpected = self.load_state_dict({k: t for k, t in tensors.items() if k != _KERNEL}, strict=False)
        lost = [k for k in missing if not k.startswith(_AUTOENCODER)]
        if lost or unexpected:
            raise ValueError(f"the checkpoint lacks {lost} and has {unexpected} that the objective does not know")


def weighted_mean(z_NL: Tensor, weights_N: Tensor | None) -> Tensor:
    """Return the (L,) float64 mean of rows by their weights; None for 1 each."""
    if weights_N is None:
        return z_NL.double().mean(dim=0)
    weights = weights_N.double()
    return weights @ z_NL.double() / weights.sum()
