"""The mixture of Gaussians: its density in log space, its posterior, its start by expectation maximization."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from raydc.core.models.mixture import Mixture, fit_mixture, log_joint, most_probable


def mixture(num_components=4, dim=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.log_softmax(torch.randn(num_components, generator=generator), dim=0)
    means = torch.randn(num_components, dim, generator=generator) * 2.0
    variances = torch.randn(num_components, dim, generator=generator) * 0.7
    return Mixture(weights.to(dtype), means.to(dtype), variances.to(dtype))


def test_the_density_of_one_point_under_two_components_by_hand():
    found = log_joint(
        torch.tensor([[1.0]]),
        Mixture(torch.tensor([0.25, 0.75]).log(), torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [4.0]]).log()),
    )
    # 1/4 N(1; 0, 1) and 3/4 N(1; 3, 4).
    expected = [0.25 * 0.24197072, 0.75 * 0.12098536]
    np.testing.assert_allclose(found.exp(), [expected], rtol=1e-6)


def test_the_density_is_that_of_scipy():
    prior = mixture(dtype=torch.float64)
    z = torch.randn(50, 3, dtype=torch.float64)
    expected = [
        float(prior.log_weights_K[c])
        + multivariate_normal(prior.means_KL[c].numpy(), np.diag(prior.log_variances_KL[c].exp().numpy())).logpdf(z)
        for c in range(4)
    ]
    np.testing.assert_allclose(log_joint(z, prior), np.stack(expected, 1), rtol=1e-10)


def test_a_small_variance_far_from_the_origin_costs_no_digits():
    prior = Mixture(torch.zeros(1), torch.full((1, 4), 100.0), torch.full((1, 4), -8.0))
    z = torch.full((1, 4), 100.01)
    exact = Mixture(*(t.double() for t in prior.tensors().values()))
    torch.testing.assert_close(log_joint(z, prior).double(), log_joint(z.double(), exact), rtol=1e-5, atol=0)


def test_the_posterior_does_not_depend_on_the_rows_beside_it():
    prior, z = mixture(), torch.randn(300, 3)
    ids, top = most_probable(z, prior, num=2)
    full = torch.log_softmax(log_joint(z.double(), Mixture(*(t.double() for t in prior.tensors().values()))), dim=1)
    np.testing.assert_array_equal(ids[:, 0], full.argmax(dim=1))
    torch.testing.assert_close(top[:, 0], full.max(dim=1).values)
    assert (top[:, 0] >= top[:, 1]).all() and (ids[:, 0] != ids[:, 1]).all()
    again = most_probable(z, prior, num=2, block_rows=7)
    assert torch.equal(again[0], ids) and torch.equal(again[1], top)
    assert torch.equal(most_probable(z[7:8], prior, num=2)[1], top[7:8])
    assert most_probable(z[:0], prior, num=2)[0].shape == (0, 2)


def test_equal_components_go_to_the_lower_id():
    prior = Mixture(torch.full((3,), 1 / 3).log(), torch.zeros(3, 2), torch.zeros(3, 2))
    ids, top = most_probable(torch.randn(5, 2), prior, num=2)
    np.testing.assert_array_equal(ids, [[0, 1]] * 5)
    np.testing.assert_allclose(top.exp(), 1 / 3, rtol=1e-6)


def test_leaving_components_out_shares_their_weight():
    prior = mixture(4)
    kept = prior.reordered(torch.tensor([2, 0]))
    torch.testing.assert_close(kept.log_weights_K.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(
        kept.log_weights_K[0] - kept.log_weights_K[1], prior.log_weights_K[2] - prior.log_weights_K[0]
    )
    assert torch.equal(kept.means_KL, prior.means_KL[[2, 0]])


def two_clouds(num=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(num, generator=generator) < 0.3).long()
    spread = torch.tensor([[0.5, 1.0], [2.0, 0.3]])
    offset = torch.tensor([[0.0, 0.0], [6.0, 4.0]])
    return torch.randn(num, 2, generator=generator) * spread[ids] + offset[ids], ids


def test_the_start_finds_weights_means_and_variances():
    z, ids = two_clouds()
    wrong = torch.where(torch.arange(len(ids)) % 5 == 0, 1 - ids, ids)
    found, iterations = fit_mixture(z, wrong, num_components=2, num_iterations=100, floor=1e-6)
    assert 1 < iterations < 100
    np.testing.assert_allclose(found.log_weights_K.exp(), [0.7, 0.3], atol=0.03)
    np.testing.assert_allclose(found.means_KL, [[0, 0], [6, 4]], atol=0.25)
    np.testing.assert_allclose(found.log_variances_KL.exp().sqrt(), [[0.5, 1.0], [2.0, 0.3]], rtol=0.1)


def test_without_iterations_the_start_has_the_moments_of_the_assignment():
    z, ids = two_clouds()
    found, iterations = fit_mixture(z, ids, num_components=3, num_iterations=0, floor=0.0)
    assert iterations == 0
    for c in range(2):
        np.testing.assert_allclose(found.means_KL[c], z[ids == c].mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.log_variances_KL[c].exp(), z[ids == c].var(0, unbiased=False), rtol=1e-5)
    # The component without rows is as wide as all rows together.
    np.testing.assert_allclose(found.log_variances_KL[2].exp(), z.var(0, unbiased=False), rtol=1e-5)
    assert torch.isfinite(found.log_weights_K).all()


def test_the_floor_keeps_a_component_of_equal_rows_wide():
    z = torch.cat([torch.zeros(50, 2), torch.randn(50, 2) + 10.0])
    ids = torch.cat([torch.zeros(50), torch.ones(50)]).long()
    found, _ = fit_mixture(z, ids, num_components=2, num_iterations=20, floor=1e-3)
    assert float(found.log_variances_KL[0].exp()[0]) == pytest.approx(
        1e-3 * float(z.double().var(dim=0, unbiased=False).mean()), rel=1e-3
    )
