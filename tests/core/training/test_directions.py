"""k-means among the directions of the whitened codes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from raydc.core.training.collectives import Ranks
from raydc.core.training.kmeans_on_codes import Directions, Sample, cluster
from tests.core.ranks import SETTINGS, fit_blobs, order_of_leaves, run_ranks, shard

TURNED = replace(SETTINGS, cluster=replace(SETTINGS.cluster, space="directions"))


def codes(num_rows=400, width=4):
    """Return correlated codes far from the origin, and weights."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(num_rows, width)) @ rng.normal(size=(width, width)) + 7.0
    return torch.from_numpy(z).float(), torch.from_numpy(rng.integers(1, 4, num_rows)).float()


def whiten_on(ranks, z, weights):
    """Return the directions of all rows by those that this rank has."""
    mine = shard(ranks, len(z))
    return Directions.from_blocks([(z[mine], weights[mine])], z.shape[1], ranks)(z)


def test_directions_are_the_whitened_codes_at_unit_length():
    z, weights = codes()
    found = Directions.from_blocks(zip(z.split(100), weights.split(100), strict=True), 4, Ranks())

    whitened = ((z - found.mean_L) @ found.whiten_LL).double().numpy()
    np.testing.assert_allclose(np.average(whitened, axis=0, weights=weights), 0.0, atol=1e-5)
    np.testing.assert_allclose(np.cov(whitened.T, aweights=weights, ddof=0), np.eye(4), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found(z), axis=1), 1.0, rtol=1e-6)
    assert not found(found.mean_L[None]).any()


def test_they_are_the_same_on_any_number_of_ranks():
    z, weights = codes()
    one = whiten_on(Ranks(), z, weights)
    for found in run_ranks(2, whiten_on, z, weights):
        np.testing.assert_allclose(found.numpy(), one.numpy(), rtol=1e-4, atol=1e-5)


def test_an_axis_that_holds_only_rounding_is_left_out():
    z, weights = codes()
    flat = torch.cat([z, z[:, :1] * 1e-4], dim=1)
    found = Directions.from_blocks([(flat, weights)], 5, Ranks())
    assert torch.linalg.matrix_rank(found.whiten_LL, rtol=1e-5) == 4
    assert torch.isfinite(found(flat)).all()


def test_groups_along_a_narrow_axis_are_found_and_the_centers_are_means_of_the_codes():
    rng = np.random.default_rng(0)
    group = np.arange(600) % 2
    # The widest axis says nothing of the groups.
    wide, narrow = 10 * rng.normal(size=600), 2.0 * group - 1 + 0.1 * rng.normal(size=600)
    z = torch.from_numpy(np.stack([wide, narrow], axis=1)).float()
    weights = torch.ones(600)

    def found_in(space):
        plan = replace(SETTINGS.cluster, num_leaves=2, num_restarts=5, space=space)
        trainer = SimpleNamespace(settings=replace(SETTINGS, cluster=plan), ranks=Ranks())
        return cluster(trainer, lambda: iter([(z, weights)]), Sample(z, weights), torch.Generator())

    plain, turned = found_in("codes"), found_in("directions")
    assert abs(float(plain.centers_KD[0, 0] - plain.centers_KD[1, 0])) > 10
    order = turned.centers_KD[:, 1].argsort()
    np.testing.assert_allclose(turned.centers_KD[order, 1], [-1.0, 1.0], atol=0.1)
    means = [z[torch.from_numpy(group == g)].mean(dim=0).numpy() for g in (0, 1)]
    np.testing.assert_allclose(turned.centers_KD[order], means, atol=0.5)
    # The inertia is that of the codes around these centers, so k-means on the codes has less.
    apart = ((z[:, None] - turned.centers_KD) ** 2).sum(dim=2)
    assert plain.inertia < turned.inertia
    assert turned.inertia >= float(apart.min(dim=1).values.sum()) * (1 - 1e-5)


def test_a_fit_that_starts_there_is_the_same_on_one_and_two_ranks():
    one = run_ranks(1, fit_blobs, TURNED)[0]
    for found in run_ranks(2, fit_blobs, TURNED):
        loss = [[h["loss"] for h in result["history"] if "loss" in h] for result in (found, one)]
        np.testing.assert_allclose(loss[0], loss[1], rtol=1e-4)
        np.testing.assert_allclose(found["weights"][order_of_leaves(found, one)], one["weights"], atol=1)
