"""Deep Clustering Network (DCN): k-means and reconstruction in turns. Letters: N rows, K leaves, D width, L code."""

from typing import Any, Self

import torch
from torch import Tensor

from raydc.core.hashing import stream_seed
from raydc.core.models.autoencoder import Autoencoder
from raydc.core.objectives.ae import to_nearest
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, Objective, ObjectiveInputs, Pass
from raydc.core.objectives.reconstruction import squared_error
from raydc.core.objectives.snapshot import encode
from raydc.core.search.kmeans import LeafSums, reseed
from raydc.core.search.nearest import nearest
from raydc.core.training.settings import RefineSettings

FIRST_COUNT = 100.0
"""Published count of every leaf at the start: no row moves a center by more than 1 / 101 of the way."""

_RESEED_SHARE = 0.8
"""Share of the epochs in which leaves that no row chose get a new center. In the last fifth it would not settle."""


class Dcn(Objective):
    """L = (|x - y|^2 + lambda min_j |z - c_j|^2) / D, in turns with a step of k-means on the centers.

    Both terms are sums over their dimensions divided by the same D. (Other codes take the mean for one and the sum for
    the other, which makes lambda some 1e5 times larger than it looks.) The optimizer never moves the centers: after its
    step the rows of the step are encoded anew and go to their nearest center, and the center moves to

        c_k <- (n_k c_k + sum of its rows) / (n_k + their weight)      counts; n_k grows from 100
        c_k <- S_k / W_k, S <- d S + (1 - d) sums, W likewise          ema

    The first is the authors' c <- c - (c - z) / n_k, one row after the other, if all rows of the step are assigned
    before any center moves. Then their order plays no role, and the ranks need to add up no more than sums and weights.
    Another difference: a row's center in the loss is the nearest now, not that of the row's last visit.

    Source: Yang, Fu, Sidiropoulos, Hong, "Toward K-means-friendly Spaces: Simultaneous Deep Learning and Clustering",
    ICML 2017; github.com/boyangumn/DCN-New. Moving averages: van den Oord et al., arXiv:1711.00937, appendix A.1.
    """

    means: Tensor
    """(K, L) float64, of which `centers` are the float32."""

    moving: Tensor
    """(K,) float64: W, or n."""

    tally: Tensor
    """(K, L + 2) float64: LeafSums of the rows of the epoch, packed."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        centers_KL: Tensor,
        kernel: Kernel,
        refine: RefineSettings,
        *,
        seed: int = 0,
        arithmetic: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.kernel = autoencoder.encoder, autoencoder.decoder, kernel
        self.refine, self.seed, self.arithmetic = refine, seed, arithmetic
        self.final_centers = "lloyd" if refine.centroid_update == "ema" else "kmeans"
        num_leaves, width = centers_KL.shape
        self.register_buffer("centers", centers_KL.clone())
        self.register_buffer("means", centers_KL.double())
        self.register_buffer("moving", torch.full((num_leaves,), FIRST_COUNT, dtype=torch.float64))
        self.register_buffer("tally", torch.zeros(num_leaves, width + 2, dtype=torch.float64))

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        assert inputs.autoencoder is not None
        settings = inputs.settings
        return cls(
            inputs.autoencoder,
            inputs.centers_KL,
            inputs.kernel,
            settings.refine,
            seed=settings.seed,
            arithmetic=inputs.arithmetic,
        )

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its parts `reconstruction` and `distance`."""
        assert self.encoder is not None
        z = self.encoder(batch.x_ND).float()
        reconstruction = (batch.weights_N * squared_error(batch.x_ND, self.decoder(z))).sum()
        with torch.autocast(z.device.type, enabled=False):
            distance = (batch.weights_N * to_nearest(z, self.centers)).sum() / batch.x_ND.shape[1]
        loss = reconstruction + self.refine.distance_weight * distance
        return {"loss": loss, "reconstruction": reconstruction.detach(), "distance": distance.detach()}

    def refresh(self, epoch: int, step: int, num_steps: int) -> Pass | None:
        """Before an epoch: give dead leaves new centers; a pass where moving averages have to start from all rows."""
        if step > 0:
            return None
        last = LeafSums.unpacked(self.tally.clone())
        self.tally.zero_()
        if epoch == 0 or self.reclusters(epoch):
            return _AllRows(self) if self.refine.centroid_update == "ema" else None
        dead = last.weights_K == 0
        if bool(dead.any()) and epoch < _RESEED_SHARE * self.refine.num_epochs:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, 11, epoch))
            self._move(reseed(self.means, last, generator))
            self.moving[dead] = self.moving[~dead].mean()
        return None

    def reclusters(self, epoch: int) -> bool:
        """Return whether Lloyd's iterations come before this epoch."""
        every = self.refine.recluster_epochs
        return every is not None and epoch > 0 and epoch % every == 0

    def step_sums(self, batch: Minibatch) -> Tensor:
        """Return the packed LeafSums of the rows under the weights just stepped."""
        sums = LeafSums.zeros(len(self.centers), self.centers.shape[1], self.centers.device)
        self.count(batch, sums)
        return sums.packed()

    def after_step(self, sums: Tensor | None) -> None:
        """Move the centers toward the rows of the step."""
        assert sums is not None
        self.tally += sums
        step = LeafSums.unpacked(sums)
        if self.refine.centroid_update == "counts":
            new = self.moving + step.weights_K
            self._move((self.means * self.moving[:, None] + step.sums_KD) / new[:, None])
        else:
            decay = self.refine.centroid_decay
            old = decay * self.moving
            new = old + (1.0 - decay) * step.weights_K
            moved = (self.means * old[:, None] + (1.0 - decay) * step.sums_KD) / new.clamp_min(1e-300)[:, None]
            # A leaf without rows stays where it is, however small its average has become.
            self._move(torch.where((step.weights_K > 0)[:, None], moved, self.means))
        self.moving.copy_(new)

    def set_centers(self, centers_KL: Tensor, kernel: Kernel) -> None:
        """Take the centers of k-means; the counts start again."""
        super().set_centers(centers_KL, kernel)
        self.means.copy_(centers_KL)
        self.moving.fill_(FIRST_COUNT)

    def count(self, batch: Minibatch, sums: LeafSums) -> None:
        """Add the rows to the statistics of their nearest centers."""
        z = encode(self.encoder, batch.x_ND, self.arithmetic)
        ids, squared = nearest(z, self.centers)
        sums.add(z, ids[:, 0], squared[:, 0], batch.weights_N)

    def begin_averages(self, sums: LeafSums) -> None:
        """Start the moving averages from all rows: the means, and each leaf's weight in an average step."""
        self._move(sums.means(self.means))
        self.moving.copy_(sums.weights_K / sums.weights_K.sum() * self.refine.batch_rows)

    def _move(self, means_KL: Tensor) -> None:
        self.means.copy_(means_KL)
        self.centers.copy_(means_KL)


class _AllRows:
    """The pass over all rows from which the moving averages start."""

    def __init__(self, dcn: Dcn) -> None:
        self._dcn = dcn
        self._sums = LeafSums.zeros(len(dcn.centers), dcn.centers.shape[1], dcn.centers.device)

    def add(self, batch: Minibatch) -> None:
        """Count rows of this rank."""
        self._dcn.count(batch, self._sums)

    def sums(self) -> Tensor:
        """Return the packed LeafSums."""
        return self._sums.packed()

    def end(self, sums: Tensor) -> dict[str, Any]:
        """Start the averages; return how many leaves are empty and the largest one's share."""
        leaves = LeafSums.unpacked(sums)
        self._dcn.begin_averages(leaves)
        return {
            "empty": int((leaves.weights_K == 0).sum()),
            "largest_share": float(leaves.weights_K.max() / leaves.weights_K.sum()),
        }
