"""Improved Deep Embedded Clustering (IDEC): DEC that keeps its decoder. Letters: N rows, K leaves, D width."""

from collections.abc import Callable
from typing import Self

from torch import Tensor

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.objectives.dec import PAPER_TARGET, Dec, Target
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import ObjectiveInputs
from raydc.core.objectives.reconstruction import squared_error


class Idec(Dec):
    """L = reconstruction + gamma KL(P || Q).

    The reconstruction is the mean squared error over elements and gamma multiplies the clustering loss only, as in the
    authors' code; the balance of gamma = 0.1 holds for these two reductions.

    Source: Guo, Gao, Liu, Yin, "Improved Deep Embedded Clustering with Local Structure Preservation", IJCAI 2017,
    eq. 9.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        centers_KL: Tensor,
        kernel: Kernel,
        target: Target = PAPER_TARGET,
        *,
        gamma: float,
        arithmetic: str = "float32",
        num_local_rows: int = 0,
    ) -> None:
        super().__init__(
            autoencoder.encoder, centers_KL, kernel, target, arithmetic=arithmetic, num_local_rows=num_local_rows
        )
        self.decoder = autoencoder.decoder
        self.gamma = gamma

    @classmethod
    def from_inputs(cls, inputs: ObjectiveInputs) -> Self:
        """Return the objective that starts from these inputs."""
        assert inputs.autoencoder is not None
        return cls(
            inputs.autoencoder,
            inputs.centers_KL,
            inputs.kernel,
            Target.from_settings(inputs.settings.refine),
            gamma=inputs.settings.refine.clustering_weight,
            arithmetic=inputs.arithmetic,
            num_local_rows=inputs.num_local_rows,
        )

    def loss(self, x_ND: Tensor, weights_N: Tensor, log_p_of: Callable[[slice], Tensor]) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its parts `reconstruction` and `kl`."""
        assert self.encoder is not None
        z = self.encoder(x_ND)
        kl = self._divergence(z, weights_N, log_p_of)
        reconstruction = (weights_N * squared_error(x_ND, self.decoder(z))).sum()
        loss = reconstruction + self.gamma * kl
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}
