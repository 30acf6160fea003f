"""An autoencoder with a loss on its code. Letters: N rows, K leaves, D width of a row, L width of the code."""

from typing import Self

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, Objective, ObjectiveInputs
from raydc.core.objectives.reconstruction import squared_error
from raydc.core.search.nearest import squared_distances


def to_nearest(z_NL: Tensor, centers_KL: Tensor) -> Tensor:
    """Return min_j |z_i - c_j|^2 as (N,) float32, with gradients for the point and its nearest center."""
    leaf = squared_distances(z_NL.detach(), centers_KL.detach()).argmin(dim=1)
    return ((z_NL - centers_KL[leaf]) ** 2).sum(dim=1)


class Ae(Objective):
    """L = (|x - y|^2 + beta C(z)) / D, with one C of three.

    C(z) is the squared distance to the nearest center (`nearest`; the centers learn too), |z|^2 (`l2`), or the sum of
    |z_d| (`l1`). Both terms are sums over their dimensions divided by the same D, so that beta means the same for any
    width of the rows. The code moves under the loss, so k-means has the last word.
    """

    final_centers = "kmeans"

    def __init__(
        self, autoencoder: Autoencoder, centers_KL: Tensor, kernel: Kernel, *, code_loss: str, beta: float
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.kernel = autoencoder.encoder, autoencoder.decoder, kernel
        if code_loss == "nearest":
            self.centers = nn.Parameter(centers_KL.clone())
        else:
            self.register_buffer("centers", centers_KL.clone())
        self.code_loss, self.beta = code_loss, beta

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        assert inputs.autoencoder is not None
        refine = inputs.settings.refine
        return cls(
            inputs.autoencoder, inputs.centers_KL, inputs.kernel, code_loss=refine.code_loss, beta=refine.code_weight
        )

    def forward(self, batch: Minibatch) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its parts `reconstruction` and `code`."""
        assert self.encoder is not None
        z = self.encoder(batch.x_ND).float()
        reconstruction = (batch.weights_N * squared_error(batch.x_ND, self.decoder(z))).sum()
        with torch.autocast(z.device.type, enabled=False):
            code = (batch.weights_N * self._code_loss(z)).sum() / batch.x_ND.shape[1]
        loss = reconstruction + self.beta * code
        return {"loss": loss, "reconstruction": reconstruction.detach(), "code": code.detach()}

    def _code_loss(self, z_NL: Tensor) -> Tensor:
        if self.code_loss == "nearest":
            return to_nearest(z_NL, self.centers)
        return (z_NL**2).sum(dim=1) if self.code_loss == "l2" else z_NL.abs().sum(dim=1)
