"""k-means: the FAISS start, Lloyd over ranks, empty leaves, float64 sums."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ScikitKMeans

from raydc.core.search.kmeans import LeafSums, leaf_sums, lloyd, start
from raydc.core.search.nearest import SquaredDistances, nearest, nearest_exact
from raydc.core.training.collectives import Ranks
from tests.core.ranks import blobs, run_ranks, shard


def run_lloyd(ranks, x, centers, num_iterations=50):
    mine = torch.from_numpy(x[shard(ranks, len(x))])
    inertias = []
    found = lloyd(
        lambda: [(part, torch.ones(len(part))) for part in mine.split(100)],
        torch.from_numpy(centers),
        all_sum=ranks.sum,
        generator=torch.Generator().manual_seed(0),
        num_iterations=num_iterations,
        tolerance=0.0,
        on_iteration=lambda _, inertia: inertias.append(inertia),
    )
    return found.centers_KD.numpy(), inertias, found.num_reseeded


def test_lloyd_is_scikit_learns():
    x, _ = blobs(2000)
    centers, inertias, _ = run_lloyd(Ranks(), x, x[:6])
    theirs = ScikitKMeans(6, init=x[:6], n_init=1, max_iter=300, tol=0).fit(x)
    np.testing.assert_allclose(centers, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert inertias[-1] == pytest.approx(theirs.inertia_, rel=1e-5)


def test_the_inertia_never_rises():
    x, _ = blobs(2000, seed=4)
    _, inertias, _ = run_lloyd(Ranks(), x, x[:6])
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(inertias))


@pytest.mark.parametrize("world_size", [2, 4])
def test_lloyd_is_the_same_on_any_number_of_ranks_empty_leaves_included(world_size):
    x, _ = blobs(1000)
    # Two centers so far away that no row is theirs: they must be re-seeded, alike on every rank.
    centers = np.concatenate([x[:4], np.full((2, 12), 1e4, np.float32)])
    alone, inertias, reseeded = run_lloyd(Ranks(), x, centers)
    assert reseeded >= 2
    for found, other_inertias, other_reseeded in run_ranks(world_size, run_lloyd, x, centers):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
        assert other_inertias[-1] == pytest.approx(inertias[-1], rel=1e-6)
        assert other_reseeded == reseeded
    sizes = np.bincount(nearest(torch.from_numpy(x), torch.from_numpy(alone))[0][:, 0], minlength=6)
    assert (sizes > 0).all()


def test_sums_go_on_beyond_where_float32_stands_still():
    # 2^24 + 8 rows at distance 1, counted by weight: a float32 sum would stay at 2^24.
    weights = torch.tensor([float(2**24), *[1.0] * 8])
    z = torch.ones(9, 1)
    sums = leaf_sums(
        [(z[:1], weights[:1]), *[(z[i : i + 1], weights[i : i + 1]) for i in range(1, 9)]],
        torch.zeros(1, 1),
        all_sum=lambda t: t,
    )
    assert float(sums.sse_K[0]) == 2**24 + 8
    assert float(sums.sums_KD[0, 0]) == 2**24 + 8


def test_the_start_finds_separated_blobs_and_repeats_itself():
    x, labels = blobs(3000)
    centers = start(torch.from_numpy(x), 6, num_restarts=5, seed=0)
    np.testing.assert_array_equal(centers, start(torch.from_numpy(x), 6, num_restarts=5, seed=0))
    ids = nearest(torch.from_numpy(x), centers)[0][:, 0].numpy()
    assert all(len(np.unique(ids[labels == blob])) == 1 for blob in range(6))


def test_more_leaves_than_rows_are_refused():
    with pytest.raises(ValueError, match="7 leaves need at least as many rows, the sample has 5"):
        start(torch.zeros(5, 2), 7, num_restarts=1, seed=0)


def test_sse_around_the_means_of_two_points():
    sums = LeafSums.zeros(1, 1, torch.device("cpu"))
    sums.add(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 0]), torch.tensor([0.0, 4.0]), torch.ones(2))
    # Around the center 0 the SSE is 4, around the mean 1 it is 2.
    assert float(sums.sse_around_means(torch.zeros(1, 1))[0]) == 2.0


def test_exact_neighbors_do_not_depend_on_the_rows_beside_them():
    generator = torch.Generator().manual_seed(0)
    z, centers = torch.randn(3000, 17, generator=generator), torch.randn(40, 17, generator=generator)
    ids, squared = nearest_exact(z, centers, num=2)
    by_hand = ((z[:, None, :].double() - centers[None].double()) ** 2).sum(-1)
    np.testing.assert_array_equal(ids, by_hand.argsort(dim=1)[:, :2])
    np.testing.assert_allclose(squared, by_hand.sort(dim=1).values[:, :2], rtol=1e-12)
    alone = torch.cat([nearest_exact(z[i : i + 1], centers, num=2)[0] for i in range(50)])
    np.testing.assert_array_equal(alone, ids[:50])


def test_neighbors_survive_a_large_offset():
    generator = torch.Generator().manual_seed(1)
    z, centers = torch.randn(500, 8, generator=generator) * 0.05, torch.randn(30, 8, generator=generator) * 0.05
    near = nearest(z, centers)[0]
    far = nearest(z + 10.0, centers + 10.0)[0]
    assert (near == far).float().mean() > 0.998


def test_the_sums_of_leaves_are_those_of_float64_however_many_rows_come_at_once():
    generator = torch.Generator().manual_seed(2)
    z, ids = 1000.0 + torch.randn(9000, 40, generator=generator), torch.randint(0, 5, (9000,), generator=generator)
    weights, squared = torch.rand(9000, generator=generator), torch.rand(9000, generator=generator)
    sums = LeafSums.zeros(5, 40, z.device)
    sums.add(z, ids, squared, weights)
    for leaf in range(5):
        own = ids == leaf
        w = weights[own].double()
        torch.testing.assert_close(sums.sums_KD[leaf], w @ z[own].double(), rtol=1e-13, atol=0.0)
        torch.testing.assert_close(sums.sse_K[leaf], w @ squared[own].double(), rtol=1e-13, atol=0.0)
        torch.testing.assert_close(sums.weights_K[leaf], w.sum(), rtol=1e-13, atol=0.0)
    parts = LeafSums.zeros(5, 40, z.device)
    for rows in torch.arange(9000).split(77):
        parts.add(z[rows], ids[rows], squared[rows], weights[rows])
    torch.testing.assert_close(parts.packed(), sums.packed(), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_centers_that_float32_cannot_tell_apart_are_ranked_by_float64(offset):
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(64, 24, generator=generator) + offset
    # Ten copies of each of four centers, the copies a few roundings apart or equal.
    centers = torch.randn(4, 24, generator=generator).repeat_interleave(10, dim=0) + offset
    centers[1::3] += 1e-6 * torch.randn(13, 24, generator=generator)
    distances = SquaredDistances(centers)
    ids, squared = distances.nearest(z, distances(z), 2)
    exact = ((z[:, None].double() - centers.double()) ** 2).sum(dim=2)
    order = exact.argsort(dim=1, stable=True)[:, :2]
    assert torch.equal(ids, order)
    torch.testing.assert_close(squared, exact.gather(1, order), rtol=1e-12, atol=0.0)
    assert torch.equal(torch.cat([distances(row) for row in z.split(1)]), distances(z))


@pytest.mark.parametrize("num_distinct", [1, 5])
def test_lloyd_ends_where_there_are_fewer_distinct_rows_than_leaves(num_distinct):
    generator = np.random.default_rng(3)
    distinct = (5.0 + generator.normal(size=(num_distinct, 8))).astype(np.float32)
    x = distinct[generator.integers(0, num_distinct, 200)]
    _, inertias, _ = run_lloyd(Ranks(), x, x[:6] + generator.normal(0, 0.1, (6, 8)).astype(np.float32))
    assert len(inertias) < 10
