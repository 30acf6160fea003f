"""The tree by cells: certified equals exact to the byte, the mini-batch tree is nearly as good, tasks do not matter."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import is_monotonic, is_valid_linkage
from threadpoolctl import threadpool_limits

from raydc.core.tree import cells as linkage_cells
from raydc.core.tree.cells import CellState, coarse_cells, merge_cell
from raydc.core.tree.linkage import agglomerate, choose_method, ward
from raydc.core.tree.order import cut
from raydc.core.tree.reciprocal import Trail
from raydc.core.tree.search import SearchOptions


def nested(num: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, width)) * 0.3
    for depth in range(8):
        x += rng.normal(size=(2 ** (depth + 1), width))[rng.integers(0, 2 ** (depth + 1), num)] * 0.75**depth
    return x


RNG = np.random.default_rng(5)
GRID = np.stack(np.meshgrid(np.arange(24.0), np.arange(24.0)), -1).reshape(-1, 2)
DATA = {
    "nested": (nested(1200, 16), None),
    "weighted": (nested(1000, 16, 1), RNG.lognormal(0, 1, 1000)),
    "no_structure": (RNG.normal(size=(700, 8)), None),
    "lattice": (GRID, None),
    "duplicates": (nested(300, 4)[RNG.integers(0, 300, 1000)], RNG.integers(1, 5, 1000).astype(float)),
    "line": (np.cumsum(1.01 ** np.arange(600))[:, None], None),
}


def sse_at(x: np.ndarray, label_K: np.ndarray) -> float:
    return sum(((x[label_K == g] - x[label_K == g].mean(axis=0)) ** 2).sum() for g in range(label_K.max() + 1))


@pytest.mark.parametrize("cell_size", [40, 120, 250])
@pytest.mark.parametrize("name", DATA)
def test_certified_equals_exact_merge_for_merge_whatever_the_cells(name, cell_size):
    x, weight_K = DATA[name]
    exact = ward(x, weight_K)
    for seed in (0, 1):
        found = agglomerate(x, weight_K, method="certified", cell_size=cell_size, top_size=50, seed=seed)
        assert found.method == "certified" and found.num_cells > 1
        assert found.num_inversions == 0
        assert found.merges.tobytes() == exact.merges.tobytes()


@given(st.integers(1, 80), st.integers(1, 3), st.integers(1, 30), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_certified_equals_exact_on_anything(num, width, cell_size, seed, whole_numbers):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 5, (num, width)).astype(float) if whole_numbers else rng.normal(size=(num, width))
    weight_K = np.ones(num) if whole_numbers else rng.lognormal(0, 0.5, num)
    found = agglomerate(x, weight_K, method="certified", cell_size=cell_size, top_size=5, seed=seed)
    assert found.merges.tobytes() == ward(x, weight_K).merges.tobytes()
    for eps in (0.3, 1e9):
        relaxed = agglomerate(x, weight_K, method="certified", eps=eps, cell_size=cell_size, top_size=5, seed=seed)
        assert relaxed.merges.shape == (num - 1, 4)
        assert num == 1 or (is_valid_linkage(relaxed.merges) and is_monotonic(relaxed.merges))
    minibatch = agglomerate(x, weight_K, method="minibatch", cell_size=cell_size, top_size=5, seed=seed)
    assert minibatch.weights[-1] == pytest.approx(weight_K.sum())
    assert minibatch.sse[-1] == pytest.approx(found.sse[-1], rel=1e-9, abs=1e-9)


def test_certified_average_linkage_equals_exact():
    x, weight_K = DATA["weighted"]
    sse_K = RNG.uniform(0, 1, len(x))
    exact = agglomerate(x, weight_K, sse_K, linkage="average", method="exact")
    found = agglomerate(x, weight_K, sse_K, linkage="average", method="certified", cell_size=100, top_size=50)
    assert found.num_cell_merges > 0
    assert found.merges.tobytes() == exact.merges.tobytes()


def test_cells_certify_most_merges_where_there_is_structure():
    x, _ = DATA["nested"]
    assert agglomerate(x, method="certified", cell_size=150, top_size=50).num_cell_merges > 0.8 * len(x)


@pytest.mark.parametrize("name", ["nested", "weighted", "no_structure"])
def test_the_mini_batch_tree_is_nearly_as_good(name):
    x, _ = DATA[name]
    exact, found = ward(x), agglomerate(x, method="minibatch", cell_size=150, top_size=150)
    assert is_valid_linkage(found.merges) and is_monotonic(found.merges)
    assert found.num_pairs < 0.5 * exact.num_pairs
    for num_groups in (3, 10, 50):
        ratio = sse_at(x, cut(found.merges, num_groups)) / sse_at(x, cut(exact.merges, num_groups))
        assert ratio < 1.05
    assert found.sse[-1] == pytest.approx(exact.sse[-1], rel=1e-12)


def test_relaxed_lies_between_and_says_so():
    x, _ = DATA["nested"]
    found = agglomerate(x, method="certified", eps=0.5, cell_size=150, top_size=50)
    assert found.method == "relaxed"
    assert is_valid_linkage(found.merges) and is_monotonic(found.merges)
    assert sse_at(x, cut(found.merges, 20)) < 1.05 * sse_at(x, cut(ward(x).merges, 20))


@pytest.mark.parametrize("method", ["certified", "minibatch"])
def test_order_and_number_of_tasks_and_tiles_do_not_change_a_byte(method):
    x, weight_K = DATA["weighted"]

    def backwards(step, state, cells):
        return [step(state, cell) for cell in reversed(cells)][::-1]

    def in_threads(step, state, cells):
        step, state = pickle.loads(pickle.dumps((step, state)))
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda cell: step(state, cell), cells))

    found = {
        agglomerate(
            x, weight_K, method=method, cell_size=100, top_size=100, run_cells=run, options=options
        ).merges.tobytes()
        for run in (linkage_cells.run_here, backwards, in_threads)
        for options in (SearchOptions(), SearchOptions(block_rows=16, block_cols=64, num_neighbors=4))
    }
    with threadpool_limits(1):
        found.add(agglomerate(x, weight_K, method=method, cell_size=100, top_size=100).merges.tobytes())
    assert len(found) == 1


def test_a_cell_that_runs_again_gives_the_same_merges():
    x = nested(200, 5)
    state = CellState(
        kind="ward",
        center_MD=x,
        weight_M=np.ones(200),
        spread_M=np.zeros(200),
        leaf_M=np.arange(200),
        first_C=np.array([0, 90, 200]),
    )
    copies = state.center_MD.copy(), state.weight_M.copy()
    one, two = (merge_cell(state, 1, eps=0.0) for _ in range(2))
    assert np.array_equal(one.left_P, two.left_P) and np.array_equal(one.delta_P, two.delta_P)
    assert one.left_P.min() >= 90
    assert np.array_equal(state.center_MD, copies[0]) and np.array_equal(state.weight_M, copies[1])


def test_the_outside_floor_lies_under_every_distance_to_the_outside():
    x, weight_K = DATA["weighted"]
    state = CellState(
        kind="ward",
        center_MD=x,
        weight_M=weight_K,
        spread_M=np.zeros(len(x)),
        leaf_M=np.arange(len(x)),
        first_C=np.array([0, 300, 1000]),
    )
    floor_N = linkage_cells.outside_floor(state, 0, SearchOptions(), Trail())
    square = ((x[:300, None] - x[None, 300:]) ** 2).sum(axis=2)
    delta = square / (1 / weight_K[:300, None] + 1 / weight_K[None, 300:])
    assert (floor_N <= delta.min(axis=1)).all()
    assert floor_N == pytest.approx(delta.min(axis=1), rel=1e-3)


def test_cells_are_near_the_size_asked_for():
    x = np.concatenate([nested(3000, 8), np.zeros((500, 8))])
    cell_M = coarse_cells(x, np.ones(len(x)), 100, seed=0)
    size_C = np.bincount(cell_M)
    assert (size_C > 0).all() and size_C.max() <= 200
    assert 20 <= len(size_C) <= 150


def test_auto_takes_the_best_method_within_the_budget_and_says_why():
    assert choose_method(1000, 64, budget_seconds=60)[0] == "exact"
    method, reason = choose_method(1_000_000, 64, budget_seconds=600)
    assert method == "minibatch" and "K=1000000" in reason and "over the budget of 600 s" in reason
    assert choose_method(1_000_000, 64, budget_seconds=3000, num_parallel=64)[0] == "certified"
    found = agglomerate(nested(100, 3))
    assert found.method == "exact" and "within the budget" in found.reason
    found = agglomerate(nested(500, 3), budget_seconds=0.0, cell_size=50, top_size=50)
    assert found.method == "minibatch" and found.num_cells > 1
