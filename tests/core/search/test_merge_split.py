"""Merge-and-split moves: by hand, against numpy, over ranks, weighted, streamed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydc.core.search.kmeans import lloyd
from raydc.core.search.merge_split import (
    SEPARATED,
    Halves,
    choose_moves,
    merge_and_split,
    merge_costs,
    moved_centers,
    partition_of,
    split_leaves,
)
from raydc.core.training.collectives import Ranks
from tests.core.ranks import blobs, run_ranks, shard


def blocks_of(z, weights=None, size=100):
    weights = torch.ones(len(z)) if weights is None else weights
    return lambda: zip(z.split(size), weights.split(size), strict=True)


def alone(values):
    return values


def sse(x, centers, weights=None):
    apart = ((x[:, None].astype(np.float64) - np.asarray(centers, np.float64)) ** 2).sum(axis=2).min(axis=1)
    return float(apart.sum() if weights is None else apart @ weights)


def wrong_start(x, labels, num_blobs):
    """Two centers in the first cluster, one between the last two, one in each of the others."""
    means = np.stack([x[labels == blob].mean(axis=0) for blob in range(num_blobs)])
    first = x[labels == 0]
    return np.stack([first[0], first[1], *means[1:-2], means[-2:].mean(axis=0)]).astype(np.float32)


def test_one_move_mends_three_clusters_on_a_line():
    # Clusters around 0, 10 and 11: two centers share the first, one holds the other two. Lloyd's stays there.
    z = torch.tensor([[-0.2], [-0.1], [0.1], [0.2], [9.9], [10.1], [10.9], [11.1]])
    start = torch.tensor([[-0.15], [0.15], [10.5]])
    stuck = lloyd(blocks_of(z), start, all_sum=alone, generator=torch.Generator(), num_iterations=20, tolerance=0.0)
    np.testing.assert_allclose(stuck.centers_KD[:, 0], [-0.15, 0.15, 10.5], atol=1e-6)
    rounds = []
    moved = merge_and_split(blocks_of(z), start, all_sum=alone, on_round=lambda n, done: rounds.append((n, done)))
    np.testing.assert_allclose(np.sort(moved.centers_KD[:, 0]), [0.0, 10.0, 11.0], atol=1e-6)
    # Four rows at .05 from their center, and four at .6, .4, .4 and .6 from theirs.
    (number, done), *_ = rounds
    assert (number, done.num_moves, done.kept) == (1, 1, True)
    assert done.before == pytest.approx(4 * 0.05**2 + 2 * 0.6**2 + 2 * 0.4**2, rel=1e-5)
    assert done.after == pytest.approx(2 * 0.1**2 + 2 * 0.2**2 + 4 * 0.1**2, rel=1e-5)
    assert moved.sse == pytest.approx(done.after)


def test_cost_and_gain_of_numbers_by_hand():
    # Weights 1, 2 and 6 at 0, 3 and 5: merging costs 1*2/3*9 = 6, 2*6/8*4 = 6 and 1*6/7*25 = 21.4.
    cost, into = merge_costs(torch.tensor([1.0, 2.0, 6.0]).double(), torch.tensor([[0.0], [3.0], [5.0]]).double())
    np.testing.assert_allclose(cost, [6.0, 6.0, 6.0])
    assert into.tolist()[0] == 1 and into.tolist()[2] == 1
    # Parts of weight 1 and 3 at distance 2: 1*3/4*4 = 3. A part without rows gains nothing.
    means = torch.tensor([[[0.0], [2.0]], [[1.0], [1.0]]]).double()
    halves = Halves(torch.tensor([[1.0, 3.0], [4.0, 0.0]]).double(), means, torch.zeros(2))
    np.testing.assert_allclose(halves.gain_K, [3.0, 0.0])


def test_an_empty_leaf_costs_nothing_and_takes_nobody_in():
    cost, into = merge_costs(torch.tensor([4.0, 0.0, 4.0]).double(), torch.tensor([[0.0], [1.0], [9.0]]).double())
    np.testing.assert_allclose(cost, [162.0, 0.0, 162.0])
    assert into.tolist() == [2, 1, 0]
    moves = choose_moves(cost, into, torch.tensor([50.0, 0.0, 40.0]).double(), most=4)
    assert [moves.merged_P.tolist(), moves.into_P.tolist(), moves.split_P.tolist()] == [[1], [1], [0]]


def test_moves_are_disjoint_the_cheapest_with_the_best_and_stop_where_they_do_not_pay():
    cost = torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 50.0, 50.0]).double()
    into = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    gain = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 30.0, 5.05]).double()
    # 30 against 1 pays; 5.05 against 5 does not reach 2 % more.
    moves = choose_moves(cost, into, gain, most=8)
    assert [moves.merged_P.tolist(), moves.into_P.tolist(), moves.split_P.tolist()] == [[0], [1], [6]]
    gain[7] = 6.0
    moves = choose_moves(cost, into, gain, most=8)
    assert [moves.merged_P.tolist(), moves.into_P.tolist(), moves.split_P.tolist()] == [[0, 2], [1, 3], [6, 7]]
    assert len(choose_moves(cost, into, gain, most=1)) == 1
    # The best to split is the target of the cheapest merge: that merge waits.
    moves = choose_moves(cost, into, torch.tensor([0.0, 30.0] + [0.0] * 6).double(), most=8)
    assert [moves.merged_P.tolist(), moves.split_P.tolist()] == [[2], [1]]


def test_centers_after_a_move_by_hand():
    parts = torch.tensor([[[0.0], [0.0]], [[0.0], [0.0]], [[8.0], [12.0]]]).double()
    halves = Halves(torch.ones(3, 2).double(), parts, torch.zeros(3))
    moves = choose_moves(
        torch.tensor([1.0, 1.0, 99.0]).double(), torch.tensor([1, 0, 0]), torch.tensor([0.0, 0, 9]).double(), most=1
    )
    means = torch.tensor([[0.0], [4.0], [10.0]]).double()
    moved = moved_centers(torch.tensor([1.0, 3.0, 2.0]).double(), means, halves, moves)
    # 0 and 4 with weights 1 and 3 meet at 3.
    assert moved[:, 0].tolist() == [8.0, 3.0, 12.0]


def test_merge_costs_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    means, weights = rng.normal(size=(60, 7)), rng.integers(0, 9, 60).astype(float)
    pairs = weights[:, None] * weights / np.maximum(weights[:, None] + weights, 1e-9)
    pairs = pairs * ((means[:, None] - means) ** 2).sum(axis=2)
    pairs[:, weights == 0] = np.inf
    np.fill_diagonal(pairs, np.inf)
    cost, into = merge_costs(torch.from_numpy(weights), torch.from_numpy(means))
    full = weights > 0
    np.testing.assert_allclose(cost.numpy()[full], pairs[full].min(axis=1), rtol=1e-10)
    np.testing.assert_array_equal(into.numpy()[full], pairs[full].argmin(axis=1))
    assert not cost.numpy()[~full].any()


def test_a_split_finds_two_clusters_in_many_dimensions_and_its_gain_is_exact():
    rng = np.random.default_rng(1)
    apart = rng.normal(size=40)
    side = rng.integers(0, 2, 400)
    x = (side[:, None] * apart * 0.8 + 0.5 * rng.normal(size=(400, 40))).astype(np.float32)
    lone = np.full((30, 40), 60.0, np.float32) + 0.01 * rng.normal(size=(30, 40)).astype(np.float32)
    z = torch.from_numpy(np.concatenate([x, lone]))
    start = torch.from_numpy(np.stack([x.mean(axis=0), lone[0], lone[1]]))
    moved = merge_and_split(blocks_of(z), start, all_sum=alone)
    best = np.stack([x[side == 0].mean(axis=0), x[side == 1].mean(axis=0), lone.mean(axis=0)])
    assert moved.sse == pytest.approx(sse(z.numpy(), best), rel=1e-3)
    assert moved.rounds[0].kept and moved.rounds[0].num_moves == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), num_leaves=st.integers(2, 12), weighted=st.booleans())
def test_the_sse_never_rises_and_is_that_of_the_centers(seed, num_leaves, weighted):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(80, 3)).astype(np.float32) + rng.integers(0, 4, (80, 1)).astype(np.float32)
    weights = rng.integers(0, 4, 80).astype(np.float32) if weighted else np.ones(80, np.float32)
    start = x[:num_leaves]
    source = blocks_of(torch.from_numpy(x), torch.from_numpy(weights), 17)
    moved = merge_and_split(source, torch.from_numpy(start), all_sum=alone)
    assert moved.sse <= sse(x, start, weights) * (1 + 1e-6) + 1e-6
    kept = [done.before for done in moved.rounds if done.kept] + [moved.sse]
    assert all(b <= a for a, b in itertools.pairwise(kept))
    # The rows' nearest centers can only be nearer than the leaves they were counted in.
    assert sse(x, moved.centers_KD.numpy(), weights) <= moved.sse * (1 + 1e-5) + 1e-5


def test_weights_are_repeated_rows():
    x, labels = blobs(600)
    weights = np.random.default_rng(0).integers(1, 4, 600)
    start = torch.from_numpy(wrong_start(x, labels, 6))
    weighted = merge_and_split(blocks_of(torch.from_numpy(x), torch.from_numpy(weights).float()), start, all_sum=alone)
    repeated = merge_and_split(blocks_of(torch.from_numpy(np.repeat(x, weights, axis=0))), start, all_sum=alone)
    assert [done.num_moves for done in weighted.rounds] == [done.num_moves for done in repeated.rounds]
    np.testing.assert_allclose(weighted.centers_KD, repeated.centers_KD, rtol=1e-5, atol=1e-5)
    assert weighted.sse == pytest.approx(repeated.sse, rel=1e-6)


def move_on(ranks, x, start, shuffled=False):
    """Return what the moves give on this rank's share; with `shuffled`, rows in another order in each pass."""
    mine = torch.from_numpy(x[shard(ranks, len(x))])
    calls = []

    def blocks():
        calls.append(None)
        order = torch.randperm(len(mine), generator=torch.Generator().manual_seed(len(calls)))
        z = mine[order] if shuffled else mine
        return zip(z.split(90), torch.ones(len(z)).split(90), strict=True)

    moved = merge_and_split(
        blocks, torch.from_numpy(start), all_sum=ranks.sum, share=ranks.broadcast, keep_ids=not shuffled
    )
    return moved.centers_KD.numpy(), moved.sse, [(done.num_moves, done.kept) for done in moved.rounds]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_moves_are_the_same_on_any_number_of_ranks(world_size):
    x, labels = blobs(1200, num_blobs=12)
    start = wrong_start(x, labels, 12)
    centers, value, rounds = move_on(Ranks(), x, start)
    assert rounds[0] == (1, True)
    for other, other_value, other_rounds in run_ranks(world_size, move_on, x, start):
        assert other_rounds == rounds
        np.testing.assert_allclose(other, centers, rtol=1e-5, atol=1e-5)
        assert other_value == pytest.approx(value, rel=1e-9)


def test_streamed_rows_that_come_in_another_order_each_time_give_the_same():
    x, labels = blobs(1200, num_blobs=12)
    start = wrong_start(x, labels, 12)
    centers, value, rounds = move_on(Ranks(), x, start)
    streamed, streamed_value, streamed_rounds = move_on(Ranks(), x, start, shuffled=True)
    assert streamed_rounds == rounds
    np.testing.assert_allclose(streamed, centers, rtol=1e-5, atol=1e-5)
    assert streamed_value == pytest.approx(value, rel=1e-9)


def test_a_large_cluster_is_not_split_and_small_ones_joined_unless_asked():
    # One cluster of 4000 rows and six of 12: half of the large one weighs more than two of the small ones joined.
    rng = np.random.default_rng(0)
    means = np.concatenate([np.zeros((1, 2)), 14.0 + 3.0 * np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]])])
    labels = np.repeat(np.arange(7), [4000] + [12] * 6)
    x = (means[labels] + rng.normal(size=(len(labels), 2)) * np.where(labels == 0, 1.0, 0.2)[:, None]).astype(
        np.float32
    )
    source, start = blocks_of(torch.from_numpy(x)), torch.from_numpy(means.astype(np.float32))
    asked = merge_and_split(source, start, all_sum=alone)
    assert asked.rounds[0].kept and asked.sse < 0.9 * sse(x, means)
    apart = merge_and_split(source, start, all_sum=alone, least_share=SEPARATED)
    assert not apart.rounds
    np.testing.assert_allclose(apart.centers_KD, means, atol=0.3)


@pytest.mark.parametrize(("kind", "share"), [("normal", 2 / np.pi), ("even", 0.75), ("two", 1.0)])
def test_the_share_between_the_parts_tells_one_cluster_from_two(kind, share):
    rng = np.random.default_rng(0)
    along = {"normal": rng.normal(size=4000), "even": rng.uniform(-2, 2, 4000), "two": rng.choice([-9.0, 9.0], 4000)}
    x = np.stack([along[kind], 0.05 * rng.normal(size=4000)], axis=1).astype(np.float32)
    z = torch.from_numpy(x)
    halves = split_leaves(blocks_of(z), partition_of(blocks_of(z), torch.zeros(1, 2), all_sum=alone), all_sum=alone)
    assert float(halves.share_K[0]) == pytest.approx(share, abs=0.02)
    side = x[:, 0] > float(halves.means_K2D[0, :, 0].mean())
    parts = [x[side].astype(np.float64), x[~side].astype(np.float64)]
    by_hand = ((x - x.mean(axis=0)) ** 2).sum() - sum(((p - p.mean(axis=0)) ** 2).sum() for p in parts)
    assert float(halves.gain_K[0]) == pytest.approx(by_hand, rel=1e-2)


def test_moves_that_do_not_help_are_undone_and_end():
    # One cloud without structure: what a split gains, the merges nearly cost.
    x = np.random.default_rng(3).normal(size=(500, 2)).astype(np.float32)
    source = blocks_of(torch.from_numpy(x))
    generator = torch.Generator().manual_seed(0)
    first = lloyd(
        source, torch.from_numpy(x[:40]), all_sum=alone, generator=generator, num_iterations=50, tolerance=0.0
    )
    moved = merge_and_split(source, first.centers_KD, all_sum=alone, num_rounds=30)
    undone = [done for done in moved.rounds if not done.kept]
    assert len(moved.rounds) < 30 and len(undone) <= 3
    assert moved.sse <= first.inertia * (1 + 1e-6)


def test_no_rounds_are_two_of_lloyds_iterations():
    x, _ = blobs(600)
    source, start = blocks_of(torch.from_numpy(x)), torch.from_numpy(x[:6])
    moved = merge_and_split(source, start, all_sum=alone, num_rounds=0)
    two = lloyd(source, start, all_sum=alone, generator=torch.Generator(), num_iterations=2, tolerance=0.0)
    np.testing.assert_allclose(moved.centers_KD, two.centers_KD, rtol=1e-5, atol=1e-6)
    assert not moved.rounds


def test_identical_rows_have_no_moves():
    moved = merge_and_split(blocks_of(torch.ones(200, 3)), torch.ones(20, 3), all_sum=alone)
    assert moved.sse == 0.0 and not moved.rounds
    assert torch.isfinite(moved.centers_KD).all()
