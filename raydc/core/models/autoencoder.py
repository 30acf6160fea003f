"""The fully connected autoencoder. Letters: N rows, D width of a row, L width of the code."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TILE_ROWS = 32


class Autoencoder(nn.Module):
    """An encoder D - hidden - L and its mirror image, ReLU between layers, linear code and linear output.

    Source: Xie, Girshick, Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", arXiv:1511.06335, section 3.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        widths = [dim, *hidden_dims, latent_dim]
        self.encoder = perceptron(widths)
        self.decoder = perceptron(widths[::-1])

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (N, L) code and the (N, D) reconstruction, both float32."""
        z = self.encoder(x_ND)
        return z.float(), self.decoder(z).float()


class Perceptron(nn.Sequential):
    """Layers one after the other.

    The batches are made by hash, so their sizes differ, and on a CPU in bf16 every layer is compiled anew for every
    size, which takes milliseconds and stays in memory. There rows of zeros follow a batch, up to two whole tiles of the
    matrix unit, whose answers nobody sees: a few sizes in place of a hundred.
    """

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the (N, L) answer of the last layer."""
        missing = -len(x_ND) % _TILE_ROWS if x_ND.device.type == "cpu" and torch.is_autocast_enabled("cpu") else 0
        padded = nn.functional.pad(x_ND, (0, 0, 0, missing)) if missing else x_ND
        z: Tensor = super().forward(padded)  # type: ignore[no-untyped-call]
        return z[: len(x_ND)] if missing else z


def perceptron(widths: Sequence[int]) -> Perceptron:
    """Return linear layers of these widths with ReLU between them; the last one stays linear."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return Perceptron(*layers[:-1])


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every linear layer's weights anew: uniform within 1 / sqrt(fan_in), biases zero.

    The DEC paper draws N(0, 0.01^2) and relies on layer-wise pretraining to get away from it; end-to-end training needs
    a start that keeps some variance. This one is that of the authors' later code (variance 1 / (3 fan_in), as in
    github.com/XifengGuo/DEC-keras); He's larger variance gave poorer clusters in a single short MNIST run.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)


@contextmanager
def precision(device: torch.device, name: str) -> Iterator[None]:
    """Run the layers inside the block in `bf16` by autocast, or in `float32`."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
        yield


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return `bf16` or `float32`; `auto` is bf16 where the hardware multiplies in it, else float32.

    On a CPU that means AVX512-BF16 or AMX; without them bf16 is emulated and slower than float32.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
