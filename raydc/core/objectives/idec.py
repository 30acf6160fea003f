"""Improved Deep Embedded Clustering (IDEC): DEC that keeps its decoder. Letters: N rows, K leaves, D width."""

from collections.abc import Callable

from torch import Tensor, nn

from raydc.core.objectives.dec import PAPER_TARGET, Dec, Target
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Parts
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
        encoder: nn.Module,
        decoder: nn.Module,
        centers_KL: Tensor,
        kernel: Kernel,
        target: Target = PAPER_TARGET,
        *,
        gamma: float,
        arithmetic: str = "float32",
    ) -> None:
        super().__init__(encoder, centers_KL, kernel, target, arithmetic=arithmetic)
        self.decoder = decoder
        self.gamma = gamma

    @classmethod
    def from_parts(cls, parts: Parts) -> "Idec":
        """Return the objective that starts from these parts."""
        assert parts.autoencoder is not None
        net, refine = parts.autoencoder, parts.settings.refine
        return cls(
            net.encoder,
            net.decoder,
            parts.centers_KL,
            parts.kernel,
            Target.of(refine),
            gamma=refine.clustering_weight,
            arithmetic=parts.arithmetic,
        )

    def loss(self, x_ND: Tensor, weights_N: Tensor, log_p_of: Callable[[slice], Tensor]) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its parts `reconstruction` and `kl`."""
        assert self.encoder is not None
        z = self.encoder(x_ND)
        kl = self._divergence(z, weights_N, log_p_of)
        reconstruction = (weights_N * squared_error(x_ND, self.decoder(z))).sum()
        loss = reconstruction + self.gamma * kl
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}
