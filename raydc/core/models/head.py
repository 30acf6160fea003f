"""A head: a softmax over leaves, from prototypes and a few layers, on frozen rows. Letters: N rows, D, K leaves, L.

With it a leaf has no center: a row belongs to the leaf of its largest probability.
"""

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Log-probabilities of the leaves.

    p(c | x) = softmax over c of <h(x), v_c> / T, with h(x) = unit(x - m), or unit(mlp(unit(x - m))) with hidden layers.

    The mean m is taken off because rows that share a large part, such as images without negative pixels, have cosines
    close to one. The prototypes v start at unit norm and may grow, so each leaf finds its own sharpness; TEMI's code
    keeps them at unit norm, which leaves I-Con too little range (digits, 10 leaves: NMI .75 against .82 in one run).
    """

    mean: Tensor
    temperature: Tensor

    def __init__(self, dim: int, hidden_dims: Sequence[int], num_leaves: int) -> None:
        """Make a head of these widths; `start_at_centers` or `start_at_random` gives it its first numbers."""
        super().__init__()
        widths = [dim, *hidden_dims]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Parameter(torch.zeros(num_leaves, widths[-1]))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("temperature", torch.ones(()))

    def features(self, x_ND: Tensor) -> Tensor:
        """Return h(x), (N, L), each of unit norm."""
        h = F.normalize(x_ND - self.mean, dim=1)
        if len(self.layers):
            # Elements of about one are what the layers' start is made for.
            h = F.normalize(self.layers(h * h.shape[1] ** 0.5).to(self.prototypes.dtype), dim=1)
        return h

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return (N, K) float32 log-probabilities; the product with the prototypes is float32 in any arithmetic."""
        h = self.features(x_ND)
        with torch.autocast(x_ND.device.type, enabled=False):
            return torch.log_softmax(h @ self.prototypes.T / self.temperature, dim=1)

    @torch.no_grad()
    def start_at_random(self, mean_D: Tensor, temperature: float, generator: torch.Generator) -> None:
        """Draw layers and prototypes (CPU): layers uniform within 1 / sqrt(fan_in), prototypes of random direction."""
        self.mean.copy_(mean_D)
        self.temperature.fill_(temperature)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                drawn = torch.rand(layer.weight.shape, generator=generator) * 2.0 - 1.0
                layer.weight.copy_(drawn * bound)
                nn.init.zeros_(layer.bias)
        self.prototypes.copy_(F.normalize(torch.randn(self.prototypes.shape, generator=generator), dim=1))

    @torch.no_grad()
    def start_at_centers(self, mean_D: Tensor, temperature: float, centers_KD: Tensor) -> None:
        """Take the directions of (K, D) centers, seen from the mean, as prototypes; for a head without layers."""
        self.mean.copy_(mean_D)
        self.temperature.fill_(temperature)
        self.prototypes.copy_(F.normalize(centers_KD - self.mean, dim=1))


@torch.no_grad()
def calibrated_temperature(
    head: Head,
    x_ND: Tensor,
    *,
    target_top_p: float,
    weights_N: Tensor | None = None,
    most_numbers: int = 20_000_000,
) -> float:
    """Return the T at which the mean largest p(c | x) over the rows is `target_top_p`.

    Args:
        head: its own temperature plays no part.
        x_ND: (N, D) float32 rows, N >= 1; if more than `most_numbers` / K, rows at even steps.
        target_top_p: in (1/K, 1).
        weights_N: (N,) float32 row weights of the mean; None for 1 each.
        most_numbers: rows times leaves of the probabilities held at once.

    Raises:
        ValueError: no rows.
    """
    if not len(x_ND):
        raise ValueError("calibration needs at least one row")
    most = max(256, most_numbers // len(head.prototypes))
    rows = torch.linspace(0, len(x_ND) - 1, min(most, len(x_ND)), device=x_ND.device).long()
    cosines = head.features(x_ND[rows]) @ head.prototypes.T
    weights = None if weights_N is None else weights_N[rows]
    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        top_N = torch.softmax(cosines / middle, dim=1).max(dim=1).values
        top = float(top_N.mean() if weights is None else top_N @ weights / weights.sum())
        low, high = (middle, high) if top > target_top_p else (low, middle)
    return float((low * high) ** 0.5)


class HeadPredictor:
    """A trained head as the rule that decides a row's leaf."""

    kind = "head"

    def __init__(self, head: Head) -> None:
        """Keep a copy of the head without gradients."""
        self.head = copy.deepcopy(head).eval().requires_grad_(False)
        self._double = copy.deepcopy(self.head).double()

    @torch.no_grad()
    def best(self, z_NL: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the `num` most probable leaves of each point, (N, num) int64, and their probabilities, float32.

        The product of all prototypes in float32 proposes one leaf more than asked; float64 decides among these, ties
        by the lower leaf. So a row's answer does not depend on the rows beside it.
        """
        prototypes, temperature = self._double.prototypes, self._double.temperature
        h = self._double.features(z_NL.double())
        rough = h.float() @ self.head.prototypes.T / self.head.temperature
        ids = rough.topk(min(num + 1, rough.shape[1]), dim=1).indices.sort(dim=1).values
        logits = torch.stack([(h * prototypes[ids[:, m]]).sum(dim=1) / temperature for m in range(ids.shape[1])], dim=1)
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :num]
        top = logits.gather(1, order) - rough.double().logsumexp(dim=1, keepdim=True)
        return ids.gather(1, order), top.exp().clamp_max(1.0).float()

    def tensors(self) -> dict[str, Tensor]:
        """Return the head's weights, mean and temperature."""
        return dict(self.head.state_dict())

    def reordered(self, order_K: Tensor) -> "HeadPredictor":
        """Return the one whose leaf i is the present leaf order_K[i]; leaves that are left out get no row."""
        head = copy.deepcopy(self.head)
        head.prototypes = nn.Parameter(head.prototypes[order_K.to(head.prototypes.device)].clone())
        return HeadPredictor(head)

    def to(self, device: torch.device) -> "HeadPredictor":
        """Return it on another device."""
        return HeadPredictor(copy.deepcopy(self.head).to(device))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "HeadPredictor":
        """Return the one that `tensors` gave.

        Raises:
            KeyError, RuntimeError: the tensors are not those of a head.
        """
        names = sorted((n for n in tensors if n.endswith(".bias")), key=lambda n: int(n.split(".")[1]))
        head = Head(len(tensors["mean"]), [len(tensors[n]) for n in names], len(tensors["prototypes"]))
        head.load_state_dict(tensors)
        return cls(head)
