"""VaDE: the evidence bound beside brute force and Monte Carlo, its gradients, its noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.mixture import Mixture, log_joint
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, run_pass
from raydc.core.objectives.vade import (
    Vade,
    bernoulli_loss,
    gaussian_loss,
    latent_noise,
    prior_divergence,
    rescale,
    to_logits,
)
from raydc.core.training.collectives import Ranks
from tests.core.models.test_mixture import mixture
from tests.core.ranks import SETTINGS, fit_blobs, order_of_leaves, run_ranks, with_objective


def posterior(num_rows=20, dim=3, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(num_rows, dim, generator=generator, dtype=dtype) * 2.0
    return mean, torch.randn(num_rows, dim, generator=generator, dtype=dtype) * 0.8 - 1.0


def test_the_bound_is_the_brute_force_sum_over_components():
    prior, (mean, log_variance) = mixture(dtype=torch.float64), posterior()
    log_gamma = torch.log_softmax(log_joint(mean, prior), dim=1)
    found = prior_divergence(log_gamma, mean, log_variance, prior)
    gamma, v = log_gamma.exp().numpy(), log_variance.exp().numpy()
    pi, mu, s2 = prior.log_weights_K.exp().numpy(), prior.means_KL.numpy(), prior.log_variances_KL.exp().numpy()
    for i in range(len(mean)):
        expected = -0.5 * np.sum(1 + np.log(v[i]))
        for c in range(len(pi)):
            inside = np.log(s2[c]) + v[i] / s2[c] + (mean[i].numpy() - mu[c]) ** 2 / s2[c]
            expected += gamma[i, c] * (0.5 * inside.sum() - np.log(pi[c]) + np.log(gamma[i, c]))
        assert float(found[i]) == pytest.approx(expected, rel=1e-10)


def test_the_bound_is_the_expectation_that_it_integrates():
    """E over z of log q(z | x) + sum_c gamma_c (log gamma_c - log p(z, c)), by 400,000 draws."""
    prior, (mean, log_variance) = mixture(dtype=torch.float64), posterior(num_rows=3)
    log_gamma = torch.log_softmax(torch.randn(3, 4, dtype=torch.float64), dim=1)
    found = prior_divergence(log_gamma, mean, log_variance, prior)
    generator = torch.Generator().manual_seed(2)
    for i in range(3):
        noise = torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
        z = mean[i] + torch.exp(0.5 * log_variance[i]) * noise
        own = Mixture(torch.zeros(1, dtype=torch.float64), mean[i : i + 1], log_variance[i : i + 1])
        terms = log_joint(z, own)[:, 0] + (log_gamma[i].exp() * (log_gamma[i] - log_joint(z, prior))).sum(dim=1)
        assert abs(float(found[i] - terms.mean())) < 5 * float(terms.std()) / 400_000**0.5


def test_the_divergence_is_zero_where_posterior_and_prior_agree_and_positive_elsewhere():
    prior = Mixture(torch.zeros(1), torch.tensor([[1.0, -2.0]]), torch.tensor([[0.3, -0.4]]))
    certain = torch.zeros(1, 1)
    assert float(prior_divergence(certain, prior.means_KL, prior.log_variances_KL, prior)) == pytest.approx(0, abs=1e-6)
    prior, (mean, log_variance) = mixture(dtype=torch.float64), posterior(500)
    log_gamma = torch.log_softmax(log_joint(mean, prior), dim=1)
    assert (prior_divergence(log_gamma, mean, log_variance, prior) > 0).all()


def test_the_reconstruction_losses_by_hand():
    x = torch.tensor([[1.0, 0.0, 0.5]])
    logits = torch.tensor([[0.0, np.log(3.0), 0.0]])
    # -log 1/2, -log(1 - 3/4) and the cross-entropy of 1/2 with 1/2.
    assert float(bernoulli_loss(x, logits)) == pytest.approx(np.log(2) + np.log(4) + np.log(2), rel=1e-6)
    found = gaussian_loss(x, torch.zeros(1, 3), torch.tensor(np.log(2.0)))
    assert float(found) == pytest.approx(1.5 * np.log(4 * np.pi) + 1.25 / 4, rel=1e-6)


def small(likelihood="bernoulli", num_rows=16, dtype=torch.float32):
    torch.manual_seed(0)
    autoencoder = Autoencoder(6, (8,), 3)
    settings = replace(SETTINGS.vade, likelihood=likelihood)
    model = Vade(autoencoder, 4, Kernel(), settings)
    with torch.no_grad():
        for parameter, values in zip(
            (model.weight_logits, model.means, model.log_variances), mixture().tensors().values()
        ):
            parameter.copy_(values)
    model = model.to(dtype)
    x = torch.rand(num_rows, 6, dtype=dtype)
    return model, x, torch.ones(num_rows, dtype=dtype), torch.randn(num_rows, 3, dtype=dtype)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_loss_and_gradients_are_finite_at_a_thousand_from_every_mode(likelihood):
    model, x, weights, noise = small(likelihood)
    with torch.no_grad():
        model.encoder[-1].bias.add_(1000.0)
    sums = model.evidence(x, weights, noise, 1.0)
    sums["loss"].backward()
    assert all(torch.isfinite(value).all() for value in sums.values())
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    # A posterior that had underflowed to a uniform one would not pull the rows back.
    assert float(model.encoder[-1].bias.grad.abs().min()) > 0


class _Evidence(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model.evidence(*arguments)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_gradients_are_those_of_finite_differences(likelihood):
    model, x, weights, noise = small(likelihood, num_rows=4, dtype=torch.float64)
    with torch.no_grad():
        model.log_variance.weight.normal_()
    parameters = dict(_Evidence(model).named_parameters())

    def loss(*values):
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(_Evidence(model), given, (x, weights, noise, 0.7))["loss"]

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_the_warm_up_weighs_the_divergence_only():
    model, x, weights, noise = small()
    whole, half = (model.evidence(x, weights, noise, w) for w in (1.0, 0.5))
    assert float(whole["loss"].detach()) == pytest.approx(float(whole["reconstruction"] + whole["kl"]), rel=1e-6)
    assert float(half["loss"].detach()) == pytest.approx(float(half["reconstruction"] + 0.5 * half["kl"]), rel=1e-6)


def test_row_weights_multiply_rows():
    model, x, _, noise = small(num_rows=6)
    twice = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    weights = torch.tensor([2.0, 1, 1, 1, 1, 1])
    weighted = model.evidence(x, weights, noise, 1.0)
    repeated = model.evidence(x[twice], torch.ones(7), noise[twice], 1.0)
    for name in weighted:
        torch.testing.assert_close(weighted[name], repeated[name])


def test_variances_stay_within_their_bounds():
    model, x, weights, noise = small()
    with torch.no_grad():
        model.log_variances.fill_(-1e4)
        model.log_variance.bias.fill_(1e4)
        model.weight_logits[0] = 1e4
    assert torch.isfinite(model.evidence(x, weights, noise, 1.0)["loss"])
    prior = model.predictor()
    assert float(prior.log_variances_KL.min()) == -8.0
    assert float(prior.log_weights_K.exp().sum()) == pytest.approx(1.0)
    # Beyond its bound a variance has no gradient; it is taken back to where it has one.
    with torch.no_grad():
        model.after_step(None)
    model.evidence(x, weights, noise, 1.0)["loss"].backward()
    assert model.log_variances.grad.abs().max() > 0


def test_another_unit_of_the_code_leaves_reconstructions_as_they_were():
    torch.manual_seed(0)
    autoencoder, x = Autoencoder(6, (8, 7), 3), torch.rand(20, 6)
    z, y = autoencoder(x)
    shift, deviation = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 3.0, 20.0])
    rescale(autoencoder.encoder, autoencoder.decoder, shift, deviation)
    again, same = autoencoder(x)
    torch.testing.assert_close(again, (z - shift) / deviation, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, y, rtol=1e-4, atol=1e-4)


def test_a_linear_output_becomes_logits():
    torch.manual_seed(0)
    autoencoder, x = Autoencoder(6, (8,), 3), torch.rand(20, 6)
    y = autoencoder(x)[1]
    to_logits(autoencoder.decoder)
    torch.testing.assert_close(autoencoder(x)[1], 8.0 * (y - 0.5), rtol=1e-4, atol=1e-5)


def test_the_noise_is_standard_normal_and_follows_the_row():
    keys = torch.arange(50_000)
    noise = latent_noise(keys, 4, seed=3)
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise**4).mean()) - 3.0) < 0.1
    correlation = np.corrcoef(noise.T.numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.02
    order = torch.randperm(len(keys))
    assert torch.equal(latent_noise(keys[order], 4, seed=3), noise[order])
    assert not torch.equal(latent_noise(keys, 4, seed=4), noise)


VADE = with_objective("vade", refine=replace(SETTINGS.refine, num_epochs=3, learning_rate=2e-3))


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(1, fit_blobs, VADE)[0]


def losses(result):
    return np.array([h["loss"] for h in result["history"] if "loss" in h])


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_loss_curve_is_the_same_on_any_number_of_ranks(world_size, on_one_rank):
    for result in run_ranks(world_size, fit_blobs, VADE):
        np.testing.assert_allclose(losses(result), losses(on_one_rank), rtol=1e-4, atol=1e-3)
        order = order_of_leaves(result, on_one_rank)
        np.testing.assert_allclose(result["weights"][order], on_one_rank["weights"], atol=1)
        for name, values in on_one_rank["predictor"].items():
            np.testing.assert_allclose(result["predictor"][name][order], values, atol=1e-2)


def test_streamed_rows_train_on_two_ranks():
    for result in run_ranks(2, fit_blobs, VADE, True):
        assert result["weights"].sum() == 1000
        assert np.isfinite(losses(result)).all()


@pytest.mark.parametrize("stop_after", [4, 5, 6])
def test_a_resumed_fit_ends_like_an_unbroken_one(tmp_path, stop_after, on_one_rank):
    """Stopped after k-means, and after the first and second epoch of the refinement."""
    assert fit_blobs(Ranks(), VADE, folder=tmp_path, stop_after=stop_after)["stopped"]
    resumed = fit_blobs(Ranks(), VADE, folder=tmp_path)
    np.testing.assert_array_equal(losses(resumed), losses(on_one_rank))
    np.testing.assert_array_equal(resumed["centers"], on_one_rank["centers"])
    for name, values in on_one_rank["predictor"].items():
        np.testing.assert_array_equal(resumed["predictor"][name], values)


def test_uniform_weights_stay_uniform():
    result = fit_blobs(Ranks(), replace(VADE, vade=replace(VADE.vade, component_weights="uniform")))
    np.testing.assert_allclose(result["predictor"]["log_weights_K"], -np.log(6), rtol=1e-6)
    assert result["weights"].sum() == 1000 and np.isfinite(losses(result)).all()


def test_vdc_is_another_name_of_the_same_objective(on_one_rank):
    np.testing.assert_array_equal(losses(fit_blobs(Ranks(), replace(VADE, objective="vdc"))), losses(on_one_rank))


def test_the_weight_of_the_divergence_warms_up_and_the_rates_decay():
    model = small()[0]
    model.settings = replace(model.settings, kl_weight=2.0, warmup_epochs=2.0, decay=0.9, decay_epochs=10)
    weights = []
    for epoch, step in ((0, 0), (0, 9), (1, 4), (1, 9), (5, 0)):
        assert model.refresh(epoch, step, 10) is None
        weights.append(model.kl_weight)
    np.testing.assert_allclose(weights, [0.1, 1.0, 1.5, 2.0, 2.0])
    assert [model.rate_factor(e) for e in (0, 9, 10, 25)] == pytest.approx([1, 1, 0.9, 0.81])
    model.settings = replace(model.settings, decay_floor=0.5)
    assert model.rate_factor(100) == 0.5
    model.settings = replace(model.settings, warmup_epochs=0.0, mixture_learning_rate=0.5)
    model.refresh(0, 0, 10)
    assert model.kl_weight == 2.0
    network, prior = model.parameter_groups(0.01)
    assert (network["lr"], prior["lr"]) == (0.01, 0.5)
    assert {id(p) for p in prior["params"]} == {id(model.weight_logits), id(model.means), id(model.log_variances)}
    assert len(network["params"]) + 3 == len(list(model.parameters()))


def test_the_noise_of_a_gaussian_decoder_starts_at_the_error_of_the_autoencoder():
    model, x, weights, _ = small("gaussian")
    batch = Minibatch(torch.arange(len(x)), x, weights * 3.0, positions_N=None, seed=0)
    found = run_pass(model.refresh(0, 0, 10), [batch], lambda sums: sums)
    expected = float(((model.decoder(model.encoder(x)) - x) ** 2).mean().detach())
    assert found == {"noise": pytest.approx(expected, rel=1e-5)}
    assert float(model.log_noise.detach().exp()) == pytest.approx(expected, rel=1e-5)
    assert model.refresh(0, 1, 10) is None and model.refresh(1, 0, 10) is None
