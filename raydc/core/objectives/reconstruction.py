"""Reconstruction by an autoencoder, plain or denoising. Letters: N rows, D width of a row."""

import torch
from torch import Tensor, nn

from raydc.core.hashing import hash_keys, uniform
from raydc.core.models.autoencoder import Autoencoder


def squared_error(x_ND: Tensor, reconstructed_ND: Tensor) -> Tensor:
    """Return |x_i - y_i|^2 / D of each row as (N,) float32: the mean over elements, so widths compare."""
    difference = reconstructed_ND.float() - x_ND
    squared: Tensor = torch.linalg.vecdot(difference, difference)
    return squared / x_ND.shape[1]


def corrupt(x_ND: Tensor, keys_N: Tensor, *, share: float, seed: int) -> Tensor:
    """Return the rows with each element set to zero with probability `share`.

    Which elements go is a hash of (row key, column, seed), so a row meets the same noise on any worker, in any batch.

    Source: Vincent et al., "Stacked Denoising Autoencoders", JMLR 2010, section 3.3 (masking noise).
    """
    if share == 0.0:
        return x_ND
    columns = hash_keys(torch.arange(x_ND.shape[1], device=x_ND.device), seed)
    return x_ND * (uniform(keys_N[:, None] ^ columns, seed) >= share)


class Reconstruction(nn.Module):
    """Mean squared error between a row and the decoder's answer to its (corrupted) self."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x_ND: Tensor, weights_N: Tensor, corrupted_ND: Tensor) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its part `reconstruction`."""
        _, y = self.autoencoder(corrupted_ND)
        loss = (weights_N * squared_error(x_ND, y)).sum()
        return {"loss": loss, "reconstruction": loss.detach()}
