"""One pair of layers of a stacked denoising autoencoder. Letters: N rows, D width of a row, H width of the layer."""

import torch
from torch import Tensor, nn

from raydc.core.hashing import stream_seed
from raydc.core.models.autoencoder import Autoencoder
from raydc.core.objectives.reconstruction import corrupt, squared_error


class LayerPair(nn.Module):
    """An encoder layer and the decoder layer that mirrors it, trained on the codes of the layers below.

    h = f(drop(x)), y = g(drop(h)), loss |y - x|^2 / D, with x the clean code of the layers below, which stay as they
    are. As in the authors' code, the input of the first layer and the code of the last one are not dropped; f is ReLU
    but for the linear code, g is ReLU but for the linear output of the first pair. What drop keeps is divided by the
    share that it keeps, and a hash of (row key, column, seed) chooses it, so that no number of ranks changes the loss.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, section 3.1.2, and github.com/piiswrong/dec; Vincent et al.,
    "Stacked Denoising Autoencoders", JMLR 2010.
    """

    def __init__(self, autoencoder: Autoencoder, layer: int, *, share: float) -> None:
        """Take layer number `layer`, from 0, and its mirror; `share` of the elements are dropped."""
        super().__init__()
        self.down = autoencoder.encoder[2 * layer]
        self.up = autoencoder.decoder[len(autoencoder.decoder) - 1 - 2 * layer]
        # No submodule: the layers below are not to be trained, averaged or saved with this pair.
        self._below = [autoencoder.encoder[: 2 * layer]]
        self._first, self._last = layer == 0, 2 * layer == len(autoencoder.encoder) - 1
        self._share = share

    def forward(self, x_ND: Tensor, weights_N: Tensor, keys_N: Tensor, seed: int) -> dict[str, Tensor]:
        """Return weighted sums over the rows: `loss`, and its part `reconstruction`."""
        with torch.no_grad():
            x = self._below[0](x_ND).float()
        h = self.down(x if self._first else self._drop(x, keys_N, stream_seed(seed, 1)))
        y = self.up(h if self._last else self._drop(torch.relu(h), keys_N, stream_seed(seed, 2)))
        loss = (weights_N * squared_error(x, y if self._first else torch.relu(y))).sum()
        return {"loss": loss, "reconstruction": loss.detach()}

    def _drop(self, x_NH: Tensor, keys_N: Tensor, seed: int) -> Tensor:
        return corrupt(x_NH, keys_N, share=self._share, seed=seed) / (1.0 - self._share)
