"""Minibatches and a forward pass in float64 by hand, for the tests of objectives."""

import torch

from raydc.core.models.autoencoder import Autoencoder, initialize
from raydc.core.objectives.objective import Minibatch


def minibatch(x, weights=None, seed=0, **others):
    """Return rows as an objective meets them, with keys from 0."""
    weights = torch.ones(len(x)) if weights is None else weights
    return Minibatch(torch.arange(len(x)), x, weights, positions_N=None, seed=seed, **others)


def network(dim=6, hidden=(8,), latent=3, seed=0):
    """Return a small autoencoder."""
    autoencoder = Autoencoder(dim, hidden, latent)
    initialize(autoencoder, torch.Generator().manual_seed(seed))
    return autoencoder


def weights_of(layers):
    """Return [(weight, bias)] of the linear layers in float64, with gradients."""
    linear = [m for m in layers if isinstance(m, torch.nn.Linear)]
    return [tuple(p.detach().double().requires_grad_() for p in (m.weight, m.bias)) for m in linear]


def forward_by_hand(x, weights, last_is_linear=True):
    """Return the output of linear layers with ReLU between them, from plain matrices."""
    for number, (weight, bias) in enumerate(weights):
        x = x @ weight.T + bias
        if number < len(weights) - 1 or not last_is_linear:
            x = torch.where(x > 0, x, torch.zeros_like(x))
    return x


def assert_same_gradients(loss, parameters, loss_by_hand, by_hand, **tolerance):
    """Compare the gradients of two losses, the second in float64."""
    ours = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(loss_by_hand, by_hand)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))
