"""A fitted clustering that teaches another. Letters: N rows, M leaves, K classes, D width of a row, L latent width."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.predictor import Predictor
from raydc.core.search.nearest import nearest_exact


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A fitted model whose classes are to be learned; it sees preprocessed rows, as the objective does."""

    encoder: nn.Module | None
    """Float32 and frozen; None: the preprocessed rows themselves."""

    decoder: nn.Module | None
    """The decoder of the teacher's autoencoder; None where it has none that reconstructs rows."""

    centers_ML: Tensor
    """(M, L) centers of its leaves."""

    classes_M: Tensor
    """(M,) int64 class of each leaf: itself, or its group at a level."""

    predictor: Predictor | None = None
    """What decides the leaf of a row; None: the nearest center."""

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.classes_M.max()) + 1

    @torch.no_grad()
    def classes(self, x_ND: Tensor) -> Tensor:
        """Return the (N,) int64 class of each row."""
        # float32 whatever the training precision: these are the labels that the teacher's own run wrote.
        with torch.autocast(x_ND.device.type, enabled=False):
            z = x_ND if self.encoder is None else self.encoder(x_ND)
            if self.predictor is not None:
                leaves = self.predictor.best(z, 1)[0][:, 0]
            else:
                leaves = nearest_exact(z, self.centers_ML, num=1)[0][:, 0]
        return self.classes_M[leaves]

    @torch.no_grad()
    def copy_network(self, autoencoder: Autoencoder) -> None:
        """Give an autoencoder of the same widths the teacher's weights, as far as it has them."""
        if self.encoder is not None:
            autoencoder.encoder.load_state_dict(self.encoder.state_dict())
        if self.decoder is not None:
            autoencoder.decoder.load_state_dict(self.decoder.state_dict())

    def to(self, device: torch.device) -> "Teacher":
        """Return it on another device."""
        return Teacher(
            encoder=self.encoder.to(device) if self.encoder is not None else None,
            decoder=self.decoder.to(device) if self.decoder is not None else None,
            centers_ML=self.centers_ML.to(device),
            classes_M=self.classes_M.to(device),
            predictor=self.predictor.to(device) if self.predictor is not None else None,
        )
