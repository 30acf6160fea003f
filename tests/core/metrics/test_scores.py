"""Metrics from statistics alone: by hand, against scikit-learn and numpy, at K = 1000 and beyond int32."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
)

from raydc.core.metrics.partition_stats import Tally
from raydc.core.metrics.scores import davies_bouldin, external, internal


def rows_of(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the group and the class of every row that a table counts."""
    group, of_class = np.indices(table.shape)
    return np.repeat(group.ravel(), table.ravel()), np.repeat(of_class.ravel(), table.ravel())


def random_table(num_groups: int, num_classes: int, num_rows: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    share = generator.dirichlet(np.full(num_groups * num_classes, 0.2))
    return generator.multinomial(num_rows, share).reshape(num_groups, num_classes)


def assert_scikit_learns(table: np.ndarray) -> None:
    groups, classes = rows_of(table)
    found = external(table)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(classes, groups), abs=1e-10)
    assert found["ami"] == pytest.approx(adjusted_mutual_info_score(classes, groups), abs=1e-8)
    assert found["ari"] == pytest.approx(adjusted_rand_score(classes, groups), abs=1e-12)


def tally_of(x: np.ndarray, group: np.ndarray, centers: np.ndarray) -> Tally:
    distances = np.linalg.norm(x[:, None] - centers[None], axis=2)
    own = distances[np.arange(len(x)), group]
    distances[np.arange(len(x)), group] = np.inf
    tally = Tally(num_groups=len(centers))
    tally.add(group, own, distances.min(axis=1), None)
    return tally


def test_external_metrics_by_hand():
    # Group 0 is class 1 but for one row, group 1 is class 0.
    found = external(np.array([[1, 4], [5, 0]]))
    assert found["acc"] == 0.9
    assert found["purity"] == 0.9
    assert external(np.array([[3, 0], [0, 2]])) == pytest.approx(dict.fromkeys(found, 1.0))


def test_acc_matches_groups_and_classes_one_to_one():
    # Two groups of one class: purity counts both, acc only the larger.
    more_groups = external(np.array([[6, 0], [4, 0], [0, 5]]))
    assert more_groups["purity"] == 1.0
    assert more_groups["acc"] == pytest.approx(11 / 15)
    more_classes = external(np.array([[6, 4, 0], [0, 0, 5]]))
    assert more_classes["acc"] == more_classes["purity"] == pytest.approx(11 / 15)


@pytest.mark.parametrize(("num_groups", "num_classes"), [(2, 5), (5, 2), (4, 4), (1, 3), (3, 1)])
def test_acc_is_the_best_of_all_matchings(num_groups, num_classes):
    table = random_table(num_groups, num_classes, 100)
    square = np.zeros((5, 5), np.int64)
    square[:num_groups, :num_classes] = table
    best = max(sum(square[g, c] for g, c in enumerate(order)) for order in itertools.permutations(range(5)))
    assert external(table)["acc"] == pytest.approx(best / 100)


@pytest.mark.parametrize(("num_groups", "num_classes"), [(60, 60), (200, 30), (30, 200)])
@pytest.mark.parametrize("num_rows", [50, 5_000, 500_000])
def test_acc_is_that_of_a_table_of_all_pairs(num_groups, num_classes, num_rows):
    table = random_table(num_groups, num_classes, num_rows)
    best = table[linear_sum_assignment(table, maximize=True)].sum()
    assert external(table)["acc"] == best / num_rows
    assert external(csr_array(table)) == external(table)


def test_many_groups_and_classes_cost_what_their_pairs_cost():
    # As a table of all pairs these take 1.6 GB.
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(10_000), 30)
    of_class = np.where(generator.random(len(group)) < 0.7, 2 * group, generator.integers(0, 20_000, len(group)))
    ones = np.ones(len(group), np.int64)
    found = external(csr_array((ones, (group, of_class)), shape=(10_000, 20_000)))
    assert found["acc"] == pytest.approx((of_class == 2 * group).mean(), abs=1e-3)
    assert found["purity"] >= found["acc"]
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(of_class, group), abs=1e-10)
    assert found["ari"] == pytest.approx(adjusted_rand_score(of_class, group), abs=1e-12)


@pytest.mark.parametrize(
    ("num_groups", "num_classes", "num_rows"),
    [(3, 3, 10), (10, 7, 500), (30, 20, 5000), (2, 2, 100_000), (4, 3, 30_000), (5, 5, 5), (200, 150, 1000)],
)
def test_external_metrics_are_scikit_learns(num_groups, num_classes, num_rows):
    for seed in range(3):
        assert_scikit_learns(random_table(num_groups, num_classes, num_rows, seed))


@pytest.mark.parametrize(
    "table",
    [
        [[5]],
        [[1]],
        [[5, 5]],
        [[5], [5]],
        [[1, 0], [0, 1]],
        [[1, 1], [1, 1]],
        [[2, 0, 0], [0, 0, 3]],
        np.eye(6, dtype=int).tolist(),
        [[10_000, 1], [1, 1]],
    ],
)
def test_external_metrics_are_scikit_learns_where_a_formula_divides_by_nothing(table):
    assert_scikit_learns(np.array(table))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=5), st.randoms())
def test_external_metrics_do_not_depend_on_names_or_empty_groups(counts, random):
    table = np.array(counts)
    assume(table.sum() > 0)
    found = external(table)
    order = random.sample(range(len(table)), len(table))
    padded = np.vstack([table[order], np.zeros((2, 3), int)])[:, ::-1]
    assert external(padded) == pytest.approx(found, abs=1e-12)
    assert all(value <= 1 + 1e-12 for value in found.values())
    assert 0 < found["acc"] <= found["purity"]
    assert_scikit_learns(table)


def test_a_thousand_leaves_and_classes_take_seconds():
    generator = np.random.default_rng(0)
    truth = generator.permutation(1000)
    table = generator.multinomial(100_000, np.full(10**6, 1e-6)).reshape(1000, 1000)
    table[np.arange(1000), truth] += 1180
    # Of the processor: on a busy machine the clock on the wall says little.
    started = time.process_time()
    found = external(table)
    assert time.process_time() - started < 10
    assert found["acc"] == pytest.approx(table[np.arange(1000), truth].sum() / table.sum())
    groups, classes = rows_of(table)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(classes, groups), abs=1e-10)
    assert found["ari"] == pytest.approx(adjusted_rand_score(classes, groups), abs=1e-12)
    # The chance term of independent labels; scikit-learn needs minutes for it here.
    independent = external(generator.multinomial(1_280_000, np.full(10**6, 1e-6)).reshape(1000, 1000))
    assert independent["ami"] == pytest.approx(0, abs=2e-4)
    assert independent["nmi"] > 0.05


def test_the_chance_term_joins_smoothly_where_its_two_formulas_meet():
    # 299 expected rows in a cell are summed one by one, 301 are expanded; scikit-learn's is exact for both.
    for scale in (299, 301):
        generator = np.random.default_rng(scale)
        assert_scikit_learns(generator.multinomial(scale * 25, np.full(25, 1 / 25)).reshape(5, 5))


def test_counts_beyond_int32_keep_every_metric():
    small = random_table(6, 5, 10_000)
    found, times = external(small), external(small * 10**6)
    assert (small * 10**6).sum() > 2**33
    for name in ("acc", "purity", "nmi"):
        assert times[name] == pytest.approx(found[name], abs=1e-12)
    # Without the chance of small numbers, ami is nmi and ari its limit.
    assert times["ami"] == pytest.approx(found["nmi"], abs=1e-8)
    share = small / small.sum()
    both, groups, classes = (share**2).sum(), (share.sum(axis=1) ** 2).sum(), (share.sum(axis=0) ** 2).sum()
    limit = (both - groups * classes) / ((groups + classes) / 2 - groups * classes)
    assert times["ari"] == pytest.approx(limit, abs=1e-8)


def test_margins_whose_product_leaves_int64_are_counted_right():
    found = external(np.array([[4 * 10**9, 5], [7, 4 * 10**9]]))
    assert found["acc"] == pytest.approx(1)
    assert found["nmi"] == pytest.approx(1, abs=1e-6)
    assert found["ami"] == pytest.approx(1, abs=1e-6)
    assert found["ari"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (2, 2)])
def test_a_table_without_rows_is_refused(shape):
    with pytest.raises(ValueError, match="the table counts no row of a known class"):
        external(np.zeros(shape, np.int64))


def test_internal_metrics_by_hand():
    x = np.array([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0]])
    centers = np.array([[0.0, 1.0], [10.0, 0.0], [99.0, 99.0]])
    found = internal(tally_of(x, np.array([0, 0, 1]), centers), centers)
    assert found["num_empty"] == 1
    assert found["size_max_over_mean"] == 2.0
    assert found["size_cv"] == pytest.approx(np.std([2, 1, 0]) / 1)
    # Scatters 1 and 0, sqrt(101) apart.
    assert found["davies_bouldin"] == pytest.approx(1 / 101**0.5)
    expected = [(10 - 1) / 10, (104**0.5 - 1) / 104**0.5, 1.0]
    assert found["silhouette"] == pytest.approx(np.mean(expected))


def test_davies_bouldin_is_scikit_learns_and_the_silhouette_is_numpys():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 6)) + 1000.0
    group = generator.integers(0, 12, 500)
    x[np.arange(500), group % 6] += group
    centers = np.stack([x[group == k].mean(axis=0) for k in range(12)])
    found = internal(tally_of(x, group, centers), centers)
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_score(x, group), rel=1e-9)
    distances = np.linalg.norm(x[:, None] - centers, axis=2)
    a = distances[np.arange(500), group]
    b = np.where(np.arange(12) == group[:, None], np.inf, distances).min(axis=1)
    assert found["silhouette"] == pytest.approx(((b - a) / np.maximum(a, b)).mean(), rel=1e-12)
    assert found["size_cv"] == pytest.approx(np.bincount(group).std() / np.bincount(group).mean())


def test_davies_bouldin_of_many_groups_is_that_of_one_block():
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(2500, 3))
    tally = Tally(num_groups=2500, rows_K=np.full(2500, 2), distance_K=generator.random(2500))
    apart = np.linalg.norm(centers[:, None] - centers, axis=2)
    np.fill_diagonal(apart, np.inf)
    scatter = tally.distance_K / 2
    assert davies_bouldin(tally, centers) == pytest.approx(
        ((scatter[:, None] + scatter) / apart).max(axis=1).mean(), rel=1e-9
    )


def test_metrics_that_are_not_defined_are_none_or_zero():
    one = Tally(num_groups=2, rows_K=np.array([3, 0]), distance_K=np.array([1.0, 0.0]))
    assert internal(one, np.eye(2))["davies_bouldin"] is None
    equal = Tally(num_groups=2, rows_K=np.array([3, 3]), distance_K=np.ones(2))
    assert internal(equal, np.ones((2, 2)))["davies_bouldin"] is None
    nothing = internal(Tally(num_groups=2))
    assert nothing == {
        "silhouette": 0.0,
        "davies_bouldin": None,
        "size_cv": 0.0,
        "size_max_over_mean": 0.0,
        "num_empty": 2,
    }
