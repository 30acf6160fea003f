"""The statistics of labeled rows: by hand, additive in any order, and whole after their way through arrays."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raydc.core.metrics.contingency import Contingency
from raydc.core.metrics.partition_stats import Tally

LEAF = np.array([0, 2, 2, 0])
OWN = np.array([1.0, 2.0, 0.0, 3.0], np.float32)
OTHER = np.array([2.0, 4.0, 0.0, 1.0], np.float32)
CLASSES = np.array(["b", "a", "", "b"])


def random_rows(num: int, seed: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    own = generator.random(num)
    return generator.integers(0, 5, num), own, own + generator.random(num), generator.choice(["x", "y", ""], num)


def assert_same(first: Tally, second: Tally) -> None:
    assert np.array_equal(first.rows_K, second.rows_K)
    for name in ("distance_K", "squared_K", "silhouette_K"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-12)
    assert first.classes.table()[1] == second.classes.table()[1]
    assert np.array_equal(first.classes.table()[0].toarray(), second.classes.table()[0].toarray())


def test_rows_are_counted_by_hand():
    tally = Tally(num_groups=3)
    tally.add(LEAF, OWN, OTHER, CLASSES)
    assert tally.num_rows == 4
    assert tally.rows_K.tolist() == [2, 0, 2]
    assert tally.distance_K.tolist() == [4, 0, 2]
    assert tally.squared_K.tolist() == [10, 0, 4]
    # (2-1)/2 + (1-3)/3 and (4-2)/4 + 0: a row on two centers at once has silhouette 0.
    np.testing.assert_allclose(tally.silhouette_K, [1 / 2 - 2 / 3, 0, 1 / 2])
    table, names = tally.classes.table()
    assert names == ["a", "b"]
    assert table.toarray().tolist() == [[0, 2], [0, 0], [1, 0]]


def test_without_classes_the_table_has_no_columns():
    tally = Tally(num_groups=3)
    tally.add(LEAF, OWN, OTHER, None)
    assert tally.classes.table()[0].shape == (3, 0)
    tally.add(LEAF, OWN, OTHER, np.array(["", "", "", ""]))
    assert tally.classes.table()[1] == []
    assert tally.num_rows == 8


def test_no_rows_change_nothing():
    tally = Tally(num_groups=3)
    tally.add(LEAF[:0], OWN[:0], OTHER[:0], CLASSES[:0])
    assert tally.num_rows == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.permutations(range(6)))
def test_tallies_of_blocks_merge_to_that_of_the_whole_in_any_order(sizes, order):
    columns = random_rows(sum(sizes), seed=len(sizes))
    whole = Tally(num_groups=5)
    whole.add(*columns)
    edges = np.cumsum([0, *sizes])
    blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
    merged = Tally(num_groups=5)
    for block in [blocks[i] for i in order if i < len(blocks)]:
        part = Tally(num_groups=5)
        part.add(*(c[block] for c in columns))
        merged.merge(part)
    assert_same(merged, whole)


def test_a_tally_is_whole_after_its_way_through_arrays():
    tally = Tally(num_groups=5)
    tally.add(*random_rows(50, seed=1))
    back = Tally.from_arrays("leaf", tally.to_arrays("leaf"))
    assert_same(back, tally)
    back.merge(tally)
    assert back.num_rows == 100
    assert Tally.from_arrays("x", Tally(num_groups=2).to_arrays("x")).classes.table()[0].shape == (2, 0)


def test_counts_go_beyond_int32():
    tally = Tally(num_groups=2, rows_K=np.array([2**31, 1]))
    tally.classes = Contingency(2, ["a"], np.array([0]), np.array([2**31]))
    tally.add(np.array([0]), OWN[:1], OTHER[:1], CLASSES[:1])
    other = Tally(num_groups=2, rows_K=np.array([2**40, 0]))
    other.classes = Contingency(2, ["a"], np.array([0]), np.array([2**40]))
    tally.merge(other)
    assert tally.rows_K.tolist() == [2**40 + 2**31 + 1, 1]
    assert tally.classes.table()[0].toarray().tolist() == [[2**40 + 2**31, 1], [0, 0]]


def test_classes_cost_what_their_pairs_cost_however_many_they_are():
    generator = np.random.default_rng(0)
    num, groups = 20_000, 10_000
    group, of_class = generator.integers(0, groups, num), generator.integers(0, 50_000, num).astype(str)
    tally = Tally(num_groups=groups)
    for rows in np.array_split(np.arange(num), 4):
        part = Tally(num_groups=groups)
        part.add(group[rows], *np.ones((2, len(rows)), np.float32), of_class[rows])
        tally.merge(part)
    table, names = tally.classes.table()
    # As an array it would be four gigabytes.
    assert table.shape == (groups, len(names)) and len(names) == len(np.unique(of_class))
    assert sum(a.nbytes for a in tally.to_arrays("leaf").values()) < 2**20
    counted = np.unique(np.char.add(np.char.add(group.astype(str), "/"), of_class), return_counts=True)
    place, name = table.nonzero()
    assert {f"{g}/{names[c]}": int(n) for g, c, n in zip(place, name, table.data, strict=True)} == dict(
        zip(counted[0].tolist(), counted[1].tolist(), strict=True)
    )
