"""The autoencoder with a loss on its code."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.objectives.ae import Ae, to_nearest
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.reconstruction import Reconstruction
from tests.core.objectives.minibatches import assert_same_gradients, forward_by_hand, minibatch, network, weights_of
from tests.core.ranks import SETTINGS, fit_blobs, run_ranks, with_objective

CODE_LOSSES = {
    "nearest": lambda z, c: ((z[:, None] - c[None]) ** 2).sum(-1).min(1).values,
    "l2": lambda z, c: (z**2).sum(1),
    "l1": lambda z, c: z.abs().sum(1),
}


def settings(**changes):
    return with_objective("ae", refine=replace(SETTINGS.refine, **changes))


@pytest.mark.parametrize("code_loss", CODE_LOSSES)
def test_the_loss_and_its_gradients_are_those_computed_by_hand_in_float64(code_loss):
    generator = torch.Generator().manual_seed(0)
    net = network()
    x, w = torch.randn(20, 6, generator=generator), torch.rand(20, generator=generator)
    centers = torch.randn(4, 3, generator=generator)
    ae = Ae(net, centers, Kernel(), code_loss=code_loss, beta=0.7)
    ours = ae(minibatch(x, w))["loss"]
    encoder, decoder = weights_of(net.encoder), weights_of(net.decoder)
    c = centers.double().requires_grad_()
    z = forward_by_hand(x.double(), encoder)
    squared = ((forward_by_hand(z, decoder) - x.double()) ** 2).sum(1)
    expected = (w.double() * (squared + 0.7 * CODE_LOSSES[code_loss](z, c))).sum() / 6
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters, by_hand = list(net.parameters()), [p for pair in encoder + decoder for p in pair]
    if code_loss == "nearest":
        parameters, by_hand = [ae.centers, *parameters], [c, *by_hand]
    else:
        assert not any(name == "centers" for name, _ in ae.named_parameters())
    assert_same_gradients(ours, parameters, expected, by_hand)


def test_the_distance_to_the_nearest_center_passes_finite_differences():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(to_nearest, (z, c))


def test_a_weightless_code_loss_is_plain_reconstruction():
    net, x, w = network(), torch.randn(16, 6), torch.rand(16)
    ae = Ae(net, torch.randn(4, 3), Kernel(), code_loss="l2", beta=0.0)
    ours, plain = ae(minibatch(x, w))["loss"], Reconstruction(net)(x, w, x)["loss"]
    assert float(ours.detach()) == float(plain.detach())
    for a, b in zip(*(torch.autograd.grad(v, list(net.parameters())) for v in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_fit_without_code_loss_is_exactly_the_autoencoder_baseline():
    ours = run_ranks(1, fit_blobs, settings(code_weight=0.0))[0]
    plain = run_ranks(1, fit_blobs, with_objective("autoencoder"))[0]
    np.testing.assert_array_equal(ours["centers"], plain["centers"])
    for name, weights in plain["encoder"].items():
        np.testing.assert_array_equal(ours["encoder"][name], weights)


def test_a_penalty_shrinks_the_code_and_k_means_finds_its_leaves_again():
    result = run_ranks(1, fit_blobs, settings(code_loss="l2", code_weight=5.0, num_epochs=4))[0]
    before = np.linalg.norm(result["baselines"]["autoencoder_kmeans"], axis=1).mean()
    assert np.linalg.norm(result["centers"], axis=1).mean() < before
    assert (result["weights"] > 0).all()
