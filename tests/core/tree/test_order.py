"""The tree's order, cuts, tables and purity, by hand, against scipy and on chains deeper than any stack."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, is_valid_linkage, leaves_list, linkage
from scipy.sparse import csr_array

from raydc.core.tree import order
from raydc.core.tree.levels import level_statistics, levels
from raydc.core.tree.purity import dendrogram_purity

# Two pairs and a single: ((0, 3), (1, 2)), 4.
BY_HAND = np.array([[0, 3, 1.0, 2], [1, 2, 2.0, 2], [5, 6, 3.0, 4], [4, 7, 9.0, 5]])
NO_MERGES = np.empty((0, 4))


def chain(num_leaves: int) -> np.ndarray:
    """Leaf t joins the merge of all leaves before it."""
    merges = np.arange(num_leaves - 1)
    left = np.where(merges == 0, 0, num_leaves + merges - 1)
    right = merges + 1
    return np.stack([np.minimum(left, right), np.maximum(left, right), merges + 1.0, merges + 2.0], axis=1)


def random_tree(num_leaves: int, seed: int = 0) -> np.ndarray:
    return linkage(np.random.default_rng(seed).normal(size=(num_leaves, 3)), "ward")


def leaves_under(Z: np.ndarray) -> list[list[int]]:
    under = [[leaf] for leaf in range(len(Z) + 1)]
    for row in Z:
        under.append(under[int(row[0])] + under[int(row[1])])
    return under


def test_leaf_order_by_hand():
    assert order.leaf_order(BY_HAND).tolist() == [4, 0, 3, 1, 2]
    assert order.leaf_order(NO_MERGES).tolist() == [0]


@pytest.mark.parametrize("num_leaves", [2, 3, 10, 257])
def test_leaf_order_is_scipys(num_leaves):
    Z = random_tree(num_leaves)
    assert order.leaf_order(Z).tolist() == leaves_list(Z).tolist()


def test_relabeled_leaves_follow_the_tree():
    Z = random_tree(100)
    relabeled = order.relabel(Z, order.leaf_order(Z))
    assert order.leaf_order(relabeled).tolist() == list(range(100))
    assert is_valid_linkage(relabeled)
    assert np.array_equal(relabeled[:, 2:], Z[:, 2:])
    assert np.array_equal(order.cut(relabeled, 7), order.cut(Z, 7)[order.leaf_order(Z)])


def test_cut_by_hand():
    assert order.cut(BY_HAND, 1).tolist() == [0, 0, 0, 0, 0]
    assert order.cut(BY_HAND, 2).tolist() == [1, 1, 1, 1, 0]
    assert order.cut(BY_HAND, 3).tolist() == [1, 2, 2, 1, 0]
    assert order.cut(BY_HAND, 5).tolist() == [1, 3, 4, 2, 0]
    assert order.cut(BY_HAND, 5).dtype == np.int32
    assert order.cut(NO_MERGES, 1).tolist() == [0]


@given(st.integers(2, 60), st.integers(0, 1000), st.data())
@settings(max_examples=50, deadline=None)
def test_cuts_are_scipys_groups_in_tree_order_and_nest(num_leaves, seed, data):
    Z = random_tree(num_leaves, seed)
    few = data.draw(st.integers(1, num_leaves))
    many = data.draw(st.integers(few, num_leaves))
    coarse, fine = order.cut(Z, few), order.cut(Z, many)
    assert len(set(coarse.tolist())) == few
    theirs = fcluster(Z, few, "maxclust")
    assert len(set(zip(coarse.tolist(), theirs.tolist(), strict=True))) == few
    assert (np.diff(coarse[order.leaf_order(Z)]) >= 0).all()
    assert len(set(zip(coarse.tolist(), fine.tolist(), strict=True))) == many


def test_a_cut_is_exact_where_heights_tie():
    Z = linkage(np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), -1).reshape(-1, 2), "ward")
    for num_groups in range(1, 26):
        assert len(set(order.cut(Z, num_groups).tolist())) == num_groups


def test_levels_are_plain_cuts_without_a_minimum():
    Z = random_tree(50)
    found = levels(Z, [20, 5], np.ones(50))
    assert list(found) == [5, 20]
    for size, label_K in found.items():
        assert np.array_equal(label_K, order.cut(Z, size))
        assert np.array_equal(label_K, levels(Z, [size], np.ones(50), 0.0)[size])


def test_small_groups_ride_with_the_heavier_side_by_hand():
    # Leaf 4 joins last and weighs 1 of 100: the split that counts is (0, 3) against (1, 2), and the second is heavier.
    weights_K = np.array([20.0, 30.0, 30.0, 19.0, 1.0])
    assert levels(BY_HAND, [2], weights_K, 0.05)[2].tolist() == [0, 1, 1, 0, 1]
    assert levels(BY_HAND, [4], weights_K, 0.05)[4].tolist() == [0, 2, 3, 1, 2]
    # No more than three sides hold 25 %.
    assert levels(BY_HAND, [5], weights_K, 0.25)[5].tolist() == [0, 1, 2, 0, 1]


@given(st.integers(2, 80), st.integers(0, 1000), st.floats(0, 0.3))
@settings(max_examples=50, deadline=None)
def test_levels_hold_the_minimum_and_nest(num_leaves, seed, share):
    Z = random_tree(num_leaves, seed)
    weights_K = np.random.default_rng(seed).lognormal(0, 1.5, num_leaves)
    sizes = sorted({1, min(3, num_leaves), min(10, num_leaves), num_leaves})
    found = levels(Z, sizes, weights_K, share)
    for label_K in found.values():
        mass_G = np.bincount(label_K, weights=weights_K)
        assert (mass_G >= share * weights_K.sum() * (1 - 1e-9)).all()
    for coarse, fine in itertools.pairwise(found.values()):
        assert len(set(zip(coarse.tolist(), fine.tolist(), strict=True))) == fine.max() + 1


def test_level_statistics_by_hand():
    center_KD = np.array([[0.0], [2.0], [10.0], [11.0]])
    found = level_statistics(np.array([0, 0, 1, 2]), np.array([1.0, 1.0, 3.0, 1.0]), center_KD, np.full(4, 0.5))
    assert (found.num_groups, found.smallest, found.num_over_4x_mean) == (3, 1.0, 0)
    assert found.size_max_over_mean == pytest.approx(1.5)
    assert found.size_cv == pytest.approx(np.std([2, 3, 1]) / 2)
    assert found.sse == pytest.approx(2 + 4 * 0.5)


def test_level_statistics_agree_with_the_node_table():
    center_KD = np.random.default_rng(0).normal(size=(60, 4)) + 1000
    weights_K = np.random.default_rng(1).uniform(1, 50, 60)
    Z = random_tree(60)
    table = order.node_table(Z, weights_K, None, center_KD)
    for size in (1, 7, 60):
        nodes = order.truncate(Z, size).nodes
        found = level_statistics(order.cut(Z, size), weights_K, center_KD)
        assert found.sse == pytest.approx(table["sse"][nodes].sum(), abs=1e-9)
        assert found.smallest == pytest.approx(table["rows"][nodes].min())


def test_node_table_by_hand():
    center_KD = np.array([[0.0], [10.0], [12.0], [1.0], [100.0]])
    weights_K = np.array([1.0, 2.0, 2.0, 3.0, 1.0])
    table = order.node_table(BY_HAND, weights_K, np.array([1.0, 0, 0, 0, 0]), center_KD)
    assert table["parent"].tolist() == [5, 6, 6, 5, 8, 7, 7, 8, -1]
    assert table["left"].tolist() == [-1, -1, -1, -1, -1, 0, 1, 5, 4]
    assert table["right"].tolist() == [-1, -1, -1, -1, -1, 3, 2, 6, 7]
    assert table["num_leaves"].tolist() == [1, 1, 1, 1, 1, 2, 2, 4, 5]
    assert table["rows"].tolist() == [1, 2, 2, 3, 1, 4, 4, 8, 9]
    assert table["height"].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 9]
    assert table["sse"][5:7].tolist() == [1 + 0.75, 4]
    assert table["sse"][7] == pytest.approx(1.75 + 4 + 2 * (11 - 0.75) ** 2)


def test_root_sse_is_the_total_for_any_tree():
    rng = np.random.default_rng(0)
    center_KD, weights_K, sse_K = rng.normal(size=(40, 5)), rng.uniform(1, 9, 40), rng.uniform(size=40)
    mean_D = np.average(center_KD, axis=0, weights=weights_K)
    total = sse_K.sum() + (weights_K[:, None] * (center_KD - mean_D) ** 2).sum()
    for Z in (random_tree(40), chain(40)):
        assert order.node_table(Z, weights_K, sse_K, center_KD)["sse"][-1] == pytest.approx(total, rel=1e-12)


def test_ward_heights_give_the_sse_without_centers():
    center_KD = np.random.default_rng(0).normal(size=(30, 4))
    Z = linkage(center_KD, "ward")
    without, given_centers = order.node_table(Z, np.ones(30)), order.node_table(Z, np.ones(30), None, center_KD)
    assert without["sse"] == pytest.approx(given_centers["sse"], rel=1e-12)


def purity_by_definition(Z: np.ndarray, leaf_N: np.ndarray, class_N: np.ndarray) -> float:
    """Mean over all pairs of one class, by looking at every pair of rows."""
    under = [set(leaves) for leaves in leaves_under(Z)]
    shares = []
    for i, j in itertools.combinations(range(len(leaf_N)), 2):
        if class_N[i] == class_N[j]:
            node = next(n for n, leaves in enumerate(under) if leaf_N[i] in leaves and leaf_N[j] in leaves)
            members = class_N[[leaf in under[node] for leaf in leaf_N]]
            shares.append((members == class_N[i]).mean())
    return float(np.mean(shares))


@pytest.mark.parametrize("seed", range(5))
def test_dendrogram_purity_is_the_mean_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    leaf_N, class_N = rng.integers(0, 12, 60), rng.integers(0, 4, 60)
    table_KC = np.zeros((13, 4), dtype=np.int32)
    np.add.at(table_KC, (leaf_N, class_N), 1)
    for Z in (random_tree(13, seed), chain(13)):
        assert dendrogram_purity(Z, table_KC) == pytest.approx(purity_by_definition(Z, leaf_N, class_N), rel=1e-12)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_dendrogram_purity_of_some_classes_at_a_time_is_that_of_all(width):
    table_KC = np.random.default_rng(0).poisson(0.5, (40, 7))
    for Z in (random_tree(40), chain(40)):
        at_once = dendrogram_purity(Z, table_KC)
        in_parts = dendrogram_purity(Z, csr_array(table_KC), block_cells=40 * width)
        assert in_parts == pytest.approx(at_once, rel=1e-12)


def test_dendrogram_purity_by_hand():
    assert dendrogram_purity(BY_HAND, np.diag([2, 3, 4, 5, 6])) == 1.0
    assert dendrogram_purity(NO_MERGES, [[1, 3]]) == pytest.approx(3 / 4)
    # One class in leaves 0 and 4 only, one row each: they meet at the root, where it has 2 rows of 5.
    assert dendrogram_purity(BY_HAND, [[1, 0], [0, 1], [0, 0], [0, 2], [1, 0]]) == pytest.approx(
        (2 / 5 + 1 + 2 * 3 / 3 * 1 * 3 / 4) / 4
    )


def test_dendrogram_purity_does_not_overflow():
    table_KC = np.array([[2_000_000_000, 0], [0, 2_000_000_000]], dtype=np.int32)
    assert dendrogram_purity(np.array([[0, 1, 1.0, 2]]), table_KC) == 1.0


def test_truncated_tree_by_hand():
    top = order.truncate(BY_HAND, 3)
    assert top.nodes.tolist() == [4, 5, 6]
    assert top.num_leaves.tolist() == [1, 2, 2]
    assert top.merges.tolist() == [[1, 2, 3, 2], [0, 3, 9, 3]]
    assert np.array_equal(order.truncate(BY_HAND, 30).merges[:, 2], BY_HAND[:, 2])
    assert order.truncate(BY_HAND, 1).merges.shape == (0, 4)


def test_truncated_groups_are_those_of_the_cut():
    Z = random_tree(200)
    top, label_K = order.truncate(Z, 30), order.cut(Z, 30)
    assert is_valid_linkage(top.merges)
    assert np.bincount(label_K).tolist() == top.num_leaves.tolist()
    under = leaves_under(Z)
    for group, node in enumerate(top.nodes):
        assert set(np.flatnonzero(label_K == group)) == set(under[node])


def test_a_chain_of_a_hundred_thousand_is_fine():
    Z = chain(100_000)
    order_K = order.leaf_order(Z)
    assert sorted(order_K[:2].tolist() + order_K[-2:].tolist())
    assert order.leaf_order(order.relabel(Z, order_K))[-1] == 99_999
    assert len(set(order.cut(Z, 1000).tolist())) == 1000
    assert levels(Z, [10], np.ones(100_000), 0.01)[10].max() < 10
    assert order.node_table(Z, np.ones(100_000), None, np.arange(100_000.0)[:, None])["rows"][-1] == 100_000
    assert dendrogram_purity(Z, np.ones((100_000, 1))) == pytest.approx(1.0)
    assert len(order.truncate(Z, 50).merges) == 49


def test_dendrogram_purity_needs_only_the_table():
    table_KC = np.random.default_rng(0).integers(0, 9, (4000, 50)).astype(np.float64)
    Z = random_tree(4000)
    tracemalloc.start()
    dendrogram_purity(Z, table_KC)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * table_KC.nbytes


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"shape \(K-1, 4\)"):
        order.leaf_order(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="earlier rows only"):
        order.cut(np.array([[0, 5, 1.0, 2], [1, 2, 2.0, 2]]), 1)
    with pytest.raises(ValueError, match="each node once"):
        order.leaf_order(np.array([[0, 1, 1.0, 2], [0, 2, 2.0, 2]]))
    with pytest.raises(ValueError, match="5 leaves into 6 groups"):
        order.cut(BY_HAND, 6)
    with pytest.raises(ValueError, match="into 0 groups"):
        order.cut(BY_HAND, 0)
    with pytest.raises(ValueError, match="permutation"):
        order.relabel(BY_HAND, np.array([0, 1, 2, 3, 3]))
    with pytest.raises(ValueError, match="share from 0 to 1"):
        levels(BY_HAND, [2], np.ones(5), 1.5)
    with pytest.raises(ValueError, match="share a class"):
        dendrogram_purity(BY_HAND, np.eye(5))
    with pytest.raises(ValueError, match="weights"):
        order.node_table(BY_HAND, np.ones(4))


def test_the_central_leaf_is_the_nearer_of_the_childrens_by_hand():
    # 0, 1 and 5 on a line, weights 1, 3, 1: the mean of the first two is .75, of all 1.6.
    Z = np.array([[0, 1, 1.0, 2], [2, 3, 5.0, 3]])
    weights, centers = np.array([1.0, 3, 1]), np.array([[0.0], [1.0], [5.0]])
    assert order.central_leaves(Z, weights, centers).tolist() == [0, 1, 2, 1, 1]
    assert order.central_leaves(Z, weights, centers, np.array([True, False, True])).tolist() == [0, -1, 2, 0, 0]
    assert order.central_leaves(Z, weights, centers, np.zeros(3, bool)).tolist() == [-1] * 5
    assert order.central_leaves(np.empty((0, 4)), np.ones(1), np.ones((1, 2))).tolist() == [0]
    with pytest.raises(ValueError, match="a tree of 3 leaves needs as many weights"):
        order.central_leaves(Z, weights[:2], centers)


def test_central_leaves_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(60, 3)), rng.uniform(1, 5, 60)
    Z = linkage(x, "average")
    found = order.central_leaves(Z, weights, x)
    members = [[k] for k in range(60)]
    for merge, (left, right) in enumerate(Z[:, :2].astype(int)):
        members.append(members[left] + members[right])
        mean = np.average(x[members[-1]], axis=0, weights=weights[members[-1]])
        a, b = found[left], found[right]
        nearer = a if ((x[a] - mean) ** 2).sum() <= ((x[b] - mean) ** 2).sum() else b
        assert found[60 + merge] == nearer
