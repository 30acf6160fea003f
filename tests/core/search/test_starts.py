"""The starts of k-means: the tree of fine leaves, the restarts, and which of them is taken."""

import numpy as np
import pytest
import torch

from raydc.core.metrics.scores import counted, external
from raydc.core.search.fine_leaves import FineLeaves, fine_leaves, num_fine_leaves
from raydc.core.search.kmeans import lloyd, start
from raydc.core.search.nearest import nearest
from raydc.core.search.starts import first_centers, sample_kmeans
from raydc.core.search.tree_start import MOST_EXACT, cut_means, tree_start


def planted(num_rows=6000, num_clusters=100, dim=32, noise=0.6, seed=0, power=0.0):
    """Return rows around nested centers, and the cluster of each."""
    rng = np.random.default_rng(seed)
    centers = np.zeros((1, dim))
    for spread in (1.0, 0.7):
        branches = round(num_clusters**0.5)
        centers = (centers[:, None] + rng.normal(scale=spread, size=(len(centers), branches, dim))).reshape(-1, dim)
    share = 1.0 / np.arange(1, len(centers) + 1) ** power
    labels = rng.choice(len(centers), num_rows, p=share / share.sum())
    return (centers[labels] + noise * rng.normal(size=(num_rows, dim))).astype(np.float32), labels


def accuracy(x, labels, centers):
    return external(counted(nearest(torch.from_numpy(x), centers)[0][:, 0].numpy(), labels))["acc"]


@pytest.mark.parametrize("num_clusters", [49, 100, 196])
def test_planted_clusters_are_found_where_a_faiss_start_misses_some(num_clusters):
    x, labels = planted(40 * num_clusters, num_clusters)
    z = torch.from_numpy(x)
    found = sample_kmeans(z, num_clusters, seed=0, how="tree")
    assert accuracy(x, labels, found) >= 0.99
    assert accuracy(x, labels, start(z, num_clusters, num_restarts=1, seed=0)) < 0.95


def test_below_fifty_leaves_the_centers_are_those_of_the_restarts_bit_for_bit():
    x, _ = planted(2000, 25)
    z, weights = torch.from_numpy(x), torch.from_numpy(np.random.default_rng(0).random(2000).astype(np.float32))
    for w in (None, weights):
        before = start(z, 49, num_restarts=3, seed=5, weights_N=w)
        assert torch.equal(first_centers(z, 49, num_restarts=3, seed=5, weights_N=w), before)
        assert torch.equal(sample_kmeans(z, 49, num_restarts=3, seed=5, weights_N=w), before)
    assert not torch.equal(first_centers(z, 50, num_restarts=3, seed=5), start(z, 50, num_restarts=3, seed=5))
    assert torch.equal(
        first_centers(z, 50, how="restarts", num_restarts=3, seed=5), start(z, 50, num_restarts=3, seed=5)
    )


def test_the_tree_start_does_not_depend_on_threads_and_repeats_itself():
    x, _ = planted()
    z = torch.from_numpy(x)
    one = tree_start(z, 100, num_fine=500, seed=3)
    assert torch.equal(one, tree_start(z, 100, num_fine=500, seed=3))
    assert torch.equal(one, tree_start(z, 100, num_fine=500, seed=3, num_threads=3))
    assert not torch.equal(one, tree_start(z, 100, num_fine=500, seed=4))


def test_fine_leaves_hold_every_row_once_by_weight():
    x, _ = planted(3000)
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 4, 3000).astype(np.float32)
    fine = fine_leaves(torch.from_numpy(x), 300, seed=0, weights_N=torch.from_numpy(weights))
    assert 200 <= len(fine.weights_M) <= 400
    assert float(fine.weights_M.sum()) == weights.sum() and (fine.weights_M > 0).all()
    np.testing.assert_allclose(fine.weights_M @ fine.means_MD, weights.astype(float) @ x.astype(float), rtol=1e-6)


def test_the_cut_of_four_fine_leaves_by_hand():
    fine = fine_leaves(
        torch.tensor([[0.0], [2.0], [100.0], [104.0]]), 4, seed=0, weights_N=torch.tensor([1.0, 3, 1, 1])
    )
    assert sorted(cut_means(fine, 2)[:, 0].tolist()) == [1.5, 102.0]


def test_how_many_fine_leaves_a_sample_gives():
    assert num_fine_leaves(1_000_000, 1000) == 8000
    assert num_fine_leaves(50_000, 1000) == 5000
    assert num_fine_leaves(10_000, 1000) == 2000
    assert num_fine_leaves(7_999, 1000) == 0


def test_a_sample_of_few_rows_for_each_leaf_takes_one_faiss_start():
    x, _ = planted(700)
    z = torch.from_numpy(x)
    assert torch.equal(first_centers(z, 100, seed=2), start(z, 100, num_restarts=1, seed=2))


def test_rows_without_weight_do_not_make_leaves():
    x, _ = planted(3000)
    far = np.full((500, 32), 100.0, np.float32)
    z = torch.from_numpy(np.concatenate([x, far]))
    weights = torch.cat([torch.ones(3000), torch.zeros(500)])
    assert float(first_centers(z, 100, seed=0, weights_N=weights).max()) < 50


@pytest.mark.parametrize("distinct", [1, 30])
def test_more_leaves_than_distinct_rows_end_in_few_passes(distinct):
    rows = torch.randn(distinct, 4, generator=torch.Generator().manual_seed(0)).repeat(1200 // distinct, 1)
    centers = first_centers(rows, 60, seed=0)
    assert torch.isfinite(centers).all() and len(centers) == 60
    passes = []
    found = lloyd(
        lambda: [(rows, torch.ones(len(rows)))],
        centers,
        all_sum=lambda values: values,
        generator=torch.Generator().manual_seed(0),
        num_iterations=50,
        tolerance=1e-5,
        on_iteration=lambda number, inertia: passes.append(inertia),
    )
    assert len(passes) <= 3 and found.inertia == pytest.approx(0.0, abs=1e-6)


def test_leaves_nearly_as_many_as_rows_end_in_few_passes():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([x, x[:20]])
    found = lloyd(
        lambda: [(rows, torch.ones(len(rows)))],
        rows[:310],
        all_sum=lambda values: values,
        generator=torch.Generator().manual_seed(0),
        num_iterations=50,
        tolerance=1e-5,
    )
    assert found.num_iterations < 10


def test_what_the_k_means_of_a_sample_costs_has_a_bound():
    x, _ = planted(2000)
    z, one_pass = torch.from_numpy(x), 2.0 * 2000 * 100 * 32
    first = first_centers(z, 100, seed=0)
    assert torch.equal(sample_kmeans(z, 100, seed=0, most_flop=0.9 * one_pass), first)
    inertias = [float(nearest(z, sample_kmeans(z, 100, seed=0, most_flop=n * one_pass))[1].sum()) for n in (0, 1.5, 3)]
    assert inertias[0] > inertias[1] > inertias[2]


def test_three_thousand_leaves_of_eight_rows_each_have_a_tree():
    x = torch.randn(24_000, 4, generator=torch.Generator().manual_seed(0))
    centers = first_centers(x, 3000, seed=0)
    assert len(centers.unique(dim=0)) == 3000 and torch.isfinite(centers).all()


def test_above_the_bound_the_tree_is_made_by_cells_and_still_has_every_group(caplog):
    rng = np.random.default_rng(0)
    means = 4.0 * np.stack(np.meshgrid(np.arange(60), np.arange(60)), axis=-1).reshape(-1, 2)
    rows = np.repeat(means, 7, axis=0) + 0.1 * rng.normal(size=(7 * 3600, 2))
    assert len(rows) > MOST_EXACT
    with caplog.at_level("INFO"):
        found = cut_means(FineLeaves(torch.from_numpy(rows), torch.ones(len(rows), dtype=torch.float64)), 3600)
    assert "(minibatch)" in caplog.text
    ids, squared = nearest(torch.from_numpy(means).float(), found)
    assert len(ids.unique()) == 3600 and float(squared.max()) < 0.2
