"""What the trainer asks of a clustering objective, and what it hands over.

An objective is a module that holds what it trains. It sees rows, returns sums, and never calls a collective: the
trainer (raydc.core.training.fit) adds its sums up over the ranks, steps the optimizer and saves its tensors. What it
does must not depend on which rank holds which row, so its randomness is a hash of the rows' keys and its decisions come
from added-up sums alone.

The course of a fit, and the member that is called:

1. `build` (raydc.core.objectives.build) makes the objective from `Parts`, in a new fit and in a resumed one.
2. New fit only: `start` with a sample of the codes, the same on every rank. Resumed fit: `recall` with the tensors that
   `memory` gave to the checkpoint.
3. Before each step `refresh`: None, or a pass over all rows of all ranks (`run_pass`).
4. `batch_sums`, if the loss needs numbers of the whole step's rows; the trainer puts their sum into `Minibatch.sums`.
   Passes and such sums run without gradients and outside autocast: `snapshot.encode` brings the training's arithmetic.
5. The module is called with the `Minibatch`, in the training's arithmetic, and returns weighted sums over its rows. The
   trainer divides by the weight of the step's rows on all ranks, goes backward and lets the optimizer step.
6. `after_step`, with the sums that `step_sums` returned, added up over the ranks.
7. After the last epoch: `ending` says whether the centers stay as they are or k-means has the last word; then
   `centers` and `predictor` decide the leaf of a row (raydc.core.models.predictor).

Letters: N rows, K leaves, D width of a preprocessed row, L width of the code (D where there is no encoder).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.predictor import Predictor
from raydc.core.models.teacher import Teacher
from raydc.core.objectives.kernel import Kernel
from raydc.core.training.settings import FitSettings

_KERNEL = "kernel"


@dataclass(frozen=True)
class Minibatch:
    """Rows as an objective meets them; possibly none."""

    keys_N: Tensor
    """(n,) int64, the row's place in the input: the same in every run, on every rank."""

    x_ND: Tensor
    """(n, D) float32 preprocessed rows."""

    weights_N: Tensor
    """(n,) float32 row weights; a mean divides by their sum, never by n."""

    positions_N: Tensor | None
    """(n,) int64 places in this rank's resident shard, where numbers may be kept per row; None for streamed rows."""

    seed: int
    """Of the noise of this epoch: hash it with the keys (raydc.core.hashing)."""

    total_weight: Tensor | None = None
    """Float64 scalar: the weight of the step's rows on all ranks. None in a pass."""

    sums: Tensor | None = None
    """What `batch_sums` returned, added up over all ranks. None where it returned None, and in a pass."""

    partners: "Minibatch | None" = None
    """A second row for each row, where the fit was given a source of them (`needs_partners`)."""

    def __len__(self) -> int:
        return len(self.keys_N)


@dataclass(frozen=True)
class Parts:
    """What an objective is made from, the same on every rank."""

    autoencoder: Autoencoder | None
    """Pretrained; None for an objective that works on the preprocessed rows (see raydc.core.objectives.table)."""

    centers_KL: Tensor
    """Those of k-means over all rows."""

    kernel: Kernel
    """Calibrated to them."""

    settings: FitSettings
    arithmetic: str
    """`bf16` or `float32`, of the layers in training."""

    num_rows: int
    """Of all ranks."""

    dim: int
    """D."""

    teacher: Teacher | None = None
    """Whose classes are to be learned."""


class Pass(Protocol):
    """One look at all rows of all ranks."""

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""

    def sums(self) -> Tensor:
        """Return what was counted, in float64, so that adding two ranks' tensors gives that of their rows together."""

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Take the sums of all ranks; return numbers for the history of the epoch.

        `changed`, the share of the rows whose leaf is another one than at the last pass (1 in the first), ends the fit
        when it falls below refine.tolerance.
        """


def run_pass(one: Pass, blocks: Iterable[Minibatch], all_sum: Any) -> dict[str, Any]:
    """Return the numbers of a pass over this rank's rows; `all_sum` adds up a tensor over the ranks."""
    with torch.no_grad():
        for batch in blocks:
            one.add(batch)
        return one.end(all_sum(one.sums()))


class Objective(nn.Module):
    """An objective that needs nothing beside its loss; others override what they need.

    A subclass sets `encoder`, `centers` and `kernel`. Where it takes over the autoencoder's encoder and decoder it
    calls them so: their weights are saved with the autoencoder, once.
    Parameters that are not to be trained must have requires_grad False; every other one takes part in each call.
    """

    encoder: nn.Module | None
    """Of the clustering space; None for the preprocessed rows themselves."""

    centers: Tensor
    """(K, L) centers as they are now: a parameter, or a buffer where the optimizer is not to move them."""

    kernel: Kernel
    """Of the confidence of a label by the nearest center."""

    sample_rows = 0
    """Rows of the sample that `start` gets, about."""

    num_local = 0
    """Rows that a pass meets on this rank, where that is known; for what it keeps of them. Set by the fit."""

    needs_partners = False
    """Whether each row comes with a second one (`Minibatch.partners`)."""

    ending: Literal["keep", "lloyd", "kmeans"] = "keep"
    """After the last epoch: keep the centers; Lloyd's iterations from them; or k-means anew."""

    @classmethod
    def from_parts(cls, parts: Parts) -> "Objective":
        """Return the objective that starts from these parts."""
        raise NotImplementedError(f"{cls.__name__} has no from_parts")

    @classmethod
    def check_inputs(cls, settings: FitSettings) -> "Pass | None":
        """Return a pass over all rows, before any training, that refuses what the objective cannot take."""
        return None

    def start(self, sample_NL: Tensor) -> None:
        """Begin a new fit; the sample is of the codes (or preprocessed rows), on the training device, (0, L) if none.

        Every rank gets the same rows and must end with the same numbers.
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
        """Return whether Lloyd's iterations over all rows move the centers (`take_centers`) before this epoch."""
        return False

    def batch_sums(self, batch: Minibatch) -> Tensor | None:
        """Return numbers of this rank's rows of the step, to be added up over the ranks before the loss."""
        return None

    @property
    def looks_back(self) -> bool:
        """Whether it has a `step_sums`; the rows of a step need not be kept for one that has none."""
        return type(self).step_sums is not Objective.step_sums

    def step_sums(self, batch: Minibatch) -> Tensor | None:
        """Return numbers of this rank's rows of the step under the weights just stepped, to be added up."""
        return None

    def after_step(self, sums: Tensor | None) -> None:
        """Take the sums of all ranks after the optimizer's step."""

    def take_centers(self, centers_KL: Tensor, kernel: Kernel) -> None:
        """Take the centers that k-means found, and the kernel calibrated to them."""
        with torch.no_grad():
            self.centers.copy_(centers_KL)
        self.kernel = kernel

    def predictor(self) -> Predictor | None:
        """Return what decides a row's leaf and confidence; None: the nearest center and the kernel."""
        return None

    def memory(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside the autoencoder's weights; nothing of one rank alone."""
        kept = {k: t for k, t in self.state_dict().items() if not k.startswith(("encoder.", "decoder."))}
        return kept | {_KERNEL: torch.tensor([self.kernel.alpha, self.kernel.scale], dtype=torch.float64)}

    def recall(self, tensors: dict[str, Tensor]) -> None:
        """Take what `memory` gave."""
        self.kernel = Kernel(*tensors[_KERNEL].tolist())
        kept = {k: t for k, t in tensors.items() if k != _KERNEL}
        missing, unexpected = self.load_state_dict(kept, strict=False)
        lost = [k for k in missing if not k.startswith(("encoder.", "decoder."))]
        if lost or unexpected:
            raise ValueError(f"the checkpoint lacks {lost} and has {unexpected} that the objective does not know")
