"""Agreement of partitions with the nearest neighbors, by hand and on shapes that k-means gets wrong."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import make_moons
from sklearn.neighbors import NearestNeighbors

from raydc.core.metrics.neighbor_agreement import agreement, gain, nearest_neighbors

# Two pairs and a lone row on a line.
LINE = np.array([[0.0], [1.0], [10.0], [11.0], [14.0]], np.float32)


def test_the_neighbors_are_scikit_learns_without_the_row_itself():
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    found = nearest_neighbors(x, num=4, max_queries=50)
    expected = NearestNeighbors(n_neighbors=5).fit(x).kneighbors(x[found.queries_Q], return_distance=False)[:, 1:]
    np.testing.assert_array_equal(found.ids_QM, expected)
    assert len(found.queries_Q) == 50 and found.queries_Q[0] == 0 and found.queries_Q[-1] == 299


def test_of_equal_rows_only_the_row_itself_is_left_out():
    found = nearest_neighbors(np.zeros((6, 2), np.float32), num=3, max_queries=6)
    assert found.ids_QM.shape == (6, 3)
    assert all(query not in ids for query, ids in zip(found.queries_Q, found.ids_QM))


def test_agreement_by_hand():
    near = nearest_neighbors(LINE, num=1, max_queries=5)
    np.testing.assert_array_equal(near.ids_QM[:, 0], [1, 0, 3, 2, 3])
    found = agreement(np.array([0, 0, 1, 1, 2]), near)
    # Four of five neighbors share the group; two random rows do with (4 + 4 + 1) / 25.
    assert found.share == pytest.approx(0.8)
    assert found.chance == pytest.approx(0.36)
    assert found.score == pytest.approx((0.8 - 0.36) / 0.64)
    assert found.num_effective == pytest.approx(np.exp(-2 * 0.4 * np.log(0.4) - 0.2 * np.log(0.2)))


def test_one_group_of_all_rows_and_random_groups_score_nothing():
    x = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    near = nearest_neighbors(x, num=5, max_queries=2000)
    whole = agreement(np.zeros(2000, np.int64), near)
    assert (whole.share, whole.score, whole.num_effective) == (1.0, 0.0, 1.0)
    assert abs(agreement(np.random.default_rng(1).integers(0, 7, 2000), near).score) < 0.02


def test_the_gain_is_paired_and_has_a_standard_error():
    near = nearest_neighbors(LINE, num=1, max_queries=5)
    good, bad = agreement(np.array([0, 0, 1, 1, 1]), near), agreement(np.array([0, 1, 1, 0, 1]), near)
    difference = good.score_Q - bad.score_Q
    assert gain(good, bad) == pytest.approx((difference.mean(), difference.std(ddof=1) / np.sqrt(5)))
    assert gain(good, good) == (0.0, 0.0)


def test_a_partition_by_shape_beats_k_means_and_one_that_tears_shapes_apart_loses():
    x, shape = make_moons(1500, noise=0.05, random_state=0)
    near = nearest_neighbors(x.astype(np.float32), num=5, max_queries=1500)
    plain = agreement(KMeans(2, n_init=3, random_state=0).fit_predict(x), near)
    by_shape, torn = agreement(shape, near), agreement((np.floor(x[:, 0] * 8) % 2).astype(np.int64), near)
    better, error = gain(by_shape, plain)
    assert better > 3 * error
    worse, error = gain(torn, plain)
    assert worse < -5 * error


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="5 neighbors asked of 5 rows"):
        nearest_neighbors(LINE, num=5, max_queries=5)
