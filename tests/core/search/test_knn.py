"""Nearest neighbors against float64 brute force: shards, ties, duplicates, self, cells."""

import numpy as np
import pytest

from raydc.core.search.knn import Neighbors, Shard, cell_centers, nearest_cells, num_hits, prepare, search


def brute_force(x, keys, num, metric):
    """Float64, by the definition: the best `num` other rows, ties by the lower key."""
    x = x.astype(np.float64)
    scores = np.empty((len(x), len(x)))
    for i in range(len(x)):
        scores[i] = (x[i] * x).sum(axis=1) if metric == "cosine" else -((x[i] - x) ** 2).sum(axis=1)
        scores[i, i] = -np.inf
    order = np.stack([np.lexsort((keys, -row)) for row in scores])[:, :num]
    return keys[order], np.take_along_axis(scores, order, axis=1)


def over_shards(x, keys, num, metric, num_shards):
    """Search every row among all rows, shard by shard."""
    found = Neighbors.none(len(x), num)
    for part in np.array_split(np.arange(len(x)), num_shards):
        found = search(keys, x, Shard.from_rows(keys[part], x[part]), found, metric=metric)
    return found


def some_rows(metric, *, offset=0.0):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(300, 16)) + offset
    return prepare(x, metric), generator.permutation(900)[:300].astype(np.int64)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_neighbors_are_those_of_brute_force_in_any_shards(metric, num_shards):
    x, keys = some_rows(metric)
    expected, scores = brute_force(x, keys, 5, metric)
    found = over_shards(x, keys, 5, metric, num_shards)
    np.testing.assert_array_equal(found.keys_QM, expected)
    np.testing.assert_allclose(found.scores_QM, scores, rtol=1e-12, atol=1e-12)
    assert not (found.keys_QM == keys[:, None]).any()


def test_a_row_is_left_out_by_its_key_and_not_by_its_place():
    x, keys = some_rows("cosine")
    # The queries lie elsewhere in the shard than in the query block, and one of them is not in the shard at all.
    queries, own = x[[250, 7, 120, 9]], np.concatenate([keys[[250, 7, 120]], [10_000]])
    found = search(own, queries, Shard.from_rows(keys, x), Neighbors.none(4, 3), metric="cosine")
    expected, _ = brute_force(x, keys, 3, "cosine")
    np.testing.assert_array_equal(found.keys_QM[:3], expected[[250, 7, 120]])
    assert found.keys_QM[3, 0] == keys[9] and found.scores_QM[3, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_among_many_equal_rows_the_lowest_keys_are_chosen(metric, num_shards):
    x, keys = some_rows(metric)
    x[40:100] = x[0]  # far more copies than the search proposes
    found = over_shards(x, keys, 4, metric, num_shards)
    expected, scores = brute_force(x, keys, 4, metric)
    np.testing.assert_array_equal(found.keys_QM, expected)
    copies = np.sort(np.concatenate([keys[:1], keys[40:100]]))
    assert set(found.keys_QM[0].tolist()) <= set(copies[:5].tolist())
    np.testing.assert_allclose(found.scores_QM, scores, rtol=1e-12, atol=1e-12)


def test_a_common_offset_costs_no_digits():
    x, keys = some_rows("l2", offset=1000.0)
    expected, _ = brute_force(x, keys, 5, "l2")
    np.testing.assert_array_equal(over_shards(x, keys, 5, "l2", 3).keys_QM, expected)


def test_two_rows_have_one_neighbor_and_a_gap():
    x = prepare(np.eye(2), "cosine")
    found = search(np.arange(2), x, Shard.from_rows(np.arange(2), x), Neighbors.none(2, 2), metric="cosine")
    np.testing.assert_array_equal(found.keys_QM, [[1, -1], [0, -1]])
    assert found.missing_Q.all()


def test_all_cells_together_are_the_exact_search():
    x, keys = some_rows("cosine")
    centers = cell_centers(x, 9, seed=0)
    shard = Shard.from_rows(keys, x).in_cells(centers, "cosine")
    assert sorted(shard.keys_N.tolist()) == sorted(keys.tolist()) and shard.bounds[-1] == len(keys)
    probes = nearest_cells(x, centers, 9, "cosine")
    found = search(keys, x, shard, Neighbors.none(300, 5), metric="cosine", probes_QP=probes)
    np.testing.assert_array_equal(found.keys_QM, brute_force(x, keys, 5, "cosine")[0])


def test_fewer_cells_miss_neighbors_and_the_recall_says_how_many():
    x, keys = some_rows("cosine")
    centers = cell_centers(x, 9, seed=0)
    shard = Shard.from_rows(keys, x).in_cells(centers, "cosine")
    exact = over_shards(x, keys, 5, "cosine", 1)
    hits = []
    for num_probes in (1, 3, 9):
        probes = nearest_cells(x, centers, num_probes, "cosine")
        found = search(keys, x, shard, Neighbors.none(300, 5), metric="cosine", probes_QP=probes)
        hits.append(num_hits(found, exact))
        by_hand = sum(len(set(a) & set(b)) for a, b in zip(found.keys_QM.tolist(), exact.keys_QM.tolist(), strict=True))
        assert hits[-1] == by_hand
    assert hits[0] < hits[1] < hits[2] == exact.keys_QM.size


def test_rows_of_another_width_are_refused():
    x, keys = some_rows("cosine")
    with pytest.raises(ValueError, match="queries have 8 dimensions, rows 16"):
        search(keys, x[:, :8], Shard.from_rows(keys, x), Neighbors.none(300, 5), metric="cosine")
