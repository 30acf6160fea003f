"""Weighted Ward: by hand, beside scipy and fastcluster, and the same tree whatever the tiles and threads."""

import fastcluster
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.cluster.hierarchy import fcluster, is_monotonic, is_valid_linkage, linkage
from scipy.spatial.distance import pdist, squareform
from threadpoolctl import threadpool_limits

from raydc.core.tree.linkage import agglomerate, ward
from raydc.core.tree.search import Clusters, SearchOptions, lay_out, pair_delta, rounded, search


def blobs(num: int, width: int, seed: int = 0, num_blobs: int = 20) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_blobs, width)) * 4)[rng.integers(0, num_blobs, num)] + rng.normal(size=(num, width))


def nested(num: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, width)) * 0.2
    for depth in range(6):
        x += rng.normal(size=(2 ** (depth + 1), width))[rng.integers(0, 2 ** (depth + 1), num)] * 0.7**depth
    return x


RNG = np.random.default_rng(7)
SHAPES = {
    "gauss": RNG.normal(size=(700, 5)),
    "one_dimension": RNG.normal(size=(500, 1)),
    "wide": RNG.normal(size=(300, 200)),
    "blobs": blobs(800, 12),
    "nested": nested(800, 32),
    "sphere": (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(RNG.normal(size=(500, 16))),
    "far_from_the_origin": RNG.normal(size=(500, 8)) * 0.05 + 100,
    "chain": np.cumsum(1.03 ** np.arange(300))[:, None] * np.ones((1, 3)),
    "outliers": np.concatenate([RNG.normal(size=(400, 4)), RNG.normal(size=(5, 4)) * 1e4]),
    "duplicates": RNG.normal(size=(60, 4))[RNG.integers(0, 60, 400)],
    "ring": np.stack([np.cos(np.sort(RNG.uniform(0, 6.28, 400))), np.sin(np.sort(RNG.uniform(0, 6.28, 400)))], axis=1),
    "heavy_tails": RNG.standard_t(1.5, size=(500, 6)),
}


def test_three_points_by_hand():
    # 0 and 2 merge at 2; then delta = 2 * 1 / 3 * 9^2 = 54, and sqrt(2 * 54) is the height.
    found = ward(np.array([[0.0], [10.0], [2.0]]))
    assert found.merges.tolist() == [[0, 2, 2.0, 2], [1, 3, pytest.approx(np.sqrt(108)), 3]]
    assert found.weights.tolist() == [1, 1, 1, 2, 3]
    assert found.sse.tolist() == [0, 0, 0, 2, pytest.approx(56)]


def test_weights_by_hand():
    # delta(0, 1) = 9 * 9 / 18 * 1 = 4.5 although they lie nearer than 1 and 2: delta(1, 2) = 9 * .25 / 9.25 * 4 < 1.
    found = ward(np.array([[0.0], [1.0], [3.0]]), np.array([9.0, 9.0, 0.25]), np.array([1.0, 0.0, 5.0]))
    assert found.merges[0].tolist() == [1, 2, pytest.approx(np.sqrt(2 * 9 * 0.25 / 9.25 * 4)), 2]
    assert found.weights.tolist() == [9, 9, 0.25, 9.25, 18.25]
    assert found.sse[:3].tolist() == [1, 0, 5]


def test_one_and_two_leaves():
    one = ward(np.ones((1, 3)), np.array([4.0]), np.array([2.0]))
    assert one.merges.shape == (0, 4) and one.weights.tolist() == [4] and one.sse.tolist() == [2]
    two = ward(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert two.merges.tolist() == [[0, 1, 5.0, 2]]


@pytest.mark.parametrize("name", SHAPES)
def test_heights_equal_scipy_and_fastcluster(name):
    found = ward(SHAPES[name]).merges
    assert is_valid_linkage(found) and is_monotonic(found)
    for theirs in (linkage(SHAPES[name], "ward"), fastcluster.linkage_vector(SHAPES[name], "ward")):
        # Their zero heights of duplicates are rounded; ours are zero.
        np.testing.assert_allclose(found[:, 2], theirs[:, 2], rtol=1e-9, atol=1e-7 if name == "duplicates" else 0)


@pytest.mark.parametrize("name", ["gauss", "nested", "wide", "sphere"])
def test_merges_equal_scipys_one_by_one(name):
    ours, theirs = ward(SHAPES[name]).merges, linkage(SHAPES[name], "ward")
    assert np.array_equal(ours[:, [0, 1, 3]], theirs[:, [0, 1, 3]])


@pytest.mark.parametrize("seed", range(4))
def test_weighted_leaves_equal_the_top_of_the_tree_of_repeated_rows(seed):
    rng = np.random.default_rng(seed)
    center_KD, weight_K = nested(120, 6, seed), rng.integers(1, 12, 120)
    repeated = linkage(np.repeat(center_KD, weight_K, axis=0), "ward")
    found = ward(center_KD, weight_K)
    np.testing.assert_allclose(found.merges[:, 2], repeated[-119:, 2], rtol=1e-9)
    for num_groups in (3, 20):
        theirs = fcluster(repeated, num_groups, "maxclust")[np.cumsum(weight_K) - 1]
        ours = fcluster(found.merges, num_groups, "maxclust")
        assert len(set(zip(ours.tolist(), theirs.tolist(), strict=True))) == num_groups


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["gauss", "nested", "wide", "heavy_tails", "duplicates", "chain"])
def test_tiles_lists_and_threads_do_not_change_a_byte(name, weighted):
    weight_K = RNG.lognormal(0, 1.5, len(SHAPES[name])) if weighted else None
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            for block in (64, 4096):
                found.append(ward(SHAPES[name], weight_K, block_rows=block, block_cols=block))
                found.append(ward(SHAPES[name], weight_K, block_rows=block, block_cols=block, num_threads=threads))
    found.append(ward(SHAPES[name], weight_K, num_neighbors=3))
    assert len({(one.merges.tobytes(), one.weights.tobytes(), one.sse.tobytes()) for one in found}) == 1


def test_ties_have_one_tree_whatever_the_tiles():
    grid = np.stack(np.meshgrid(np.arange(30.0), np.arange(30.0)), -1).reshape(-1, 2)
    cube = np.stack(np.meshgrid(*[np.arange(3.0)] * 5), -1).reshape(-1, 5)
    hot = np.eye(80)
    for x in (grid, cube, hot):
        found = {
            ward(x, block_rows=rows, block_cols=cols, num_neighbors=num).merges.tobytes()
            for rows, cols, num in [(64, 64, 16), (4096, 4096, 16), (7, 128, 4), (256, 16384, 64)]
        }
        assert len(found) == 1
        total = ((x - x.mean(axis=0)) ** 2).sum()
        assert ward(x).sse[-1] == pytest.approx(total, rel=1e-12)


def test_duplicates_merge_first_at_height_zero():
    x = np.repeat(RNG.normal(size=(7, 3)), 300, axis=0)[RNG.permutation(2100)]
    found = ward(x)
    assert (found.merges[:2093, 2] == 0).all() and (found.merges[2093:, 2] > 0).all()
    assert is_valid_linkage(found.merges)
    assert found.num_rounds < 10
    same = ward(np.ones((500, 2)))
    assert (same.merges[:, 2] == 0).all() and is_valid_linkage(same.merges)


def test_leaves_without_weight_are_left_out_and_reported(caplog):
    x, weight_K = blobs(50, 3), np.ones(50)
    weight_K[[3, 17]] = 0
    with caplog.at_level("WARNING"):
        found = ward(x, weight_K, np.arange(50.0))
    assert found.left_out.tolist() == [3, 17]
    assert found.leaves.tolist() == [i for i in range(50) if i not in (3, 17)]
    assert found.sse[:48].tolist() == found.leaves.tolist()
    assert np.array_equal(found.merges, ward(x[found.leaves]).merges)
    assert "2 of 50 leaves" in caplog.text


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 40), st.integers(1, 4)),
        elements=st.floats(-1e3, 1e3, allow_nan=False, width=32),
    ),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_input_gives_a_valid_monotone_tree_that_conserves_the_sse(x, seed):
    weight_K = np.random.default_rng(seed).uniform(0.1, 10, len(x))
    found = ward(x, weight_K)
    assert found.merges.shape == (len(x) - 1, 4)
    if len(x) > 1:
        assert is_valid_linkage(found.merges) and is_monotonic(found.merges)
        assert found.merges[-1, 3] == len(x)
    mean_D = np.average(x, axis=0, weights=weight_K)
    total = (weight_K[:, None] * (x - mean_D) ** 2).sum()
    assert found.sse[-1] == pytest.approx(total, rel=1e-9, abs=1e-9)
    assert found.weights[-1] == pytest.approx(weight_K.sum())
    assert found.num_inversions == 0


@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_permuting_the_leaves_changes_nothing_but_names(num, width, seed):
    rng = np.random.default_rng(seed)
    x, weight_K = rng.normal(size=(num, width)), rng.lognormal(0, 1, num)
    order = rng.permutation(num)
    plain, permuted = ward(x, weight_K).merges, ward(x[order], weight_K[order]).merges
    np.testing.assert_allclose(permuted[:, 2], plain[:, 2], rtol=1e-9)
    name_V = np.concatenate([order, np.arange(num, 2 * num - 1)])
    assert np.array_equal(np.sort(name_V[permuted[:, :2].astype(int)], axis=1), plain[:, :2])


def test_extreme_weights_and_scales_give_a_valid_tree():
    x = nested(300, 4)
    for scale, spread in ((1e-30, 0.0), (1e30, 0.0), (1.0, 20.0)):
        weight_K = np.random.default_rng(0).lognormal(0, spread, 300)
        found = ward(x * scale, weight_K)
        assert is_valid_linkage(found.merges) and is_monotonic(found.merges)
        assert found.num_inversions == 0
        assert found.merges.tobytes() == ward(x * scale, weight_K, num_neighbors=2, block_cols=32).merges.tobytes()


def test_the_input_is_not_changed():
    x, weight_K = blobs(100, 4), np.ones(100)
    copies = x.copy(), weight_K.copy()
    ward(x, weight_K)
    assert np.array_equal(x, copies[0]) and np.array_equal(weight_K, copies[1])


def test_a_long_chain_of_close_gaps_finishes():
    x = np.cumsum(1 + np.arange(3000) * 1e-3)[:, None]
    found = ward(x)
    np.testing.assert_allclose(found.merges[:, 2], linkage(x, "ward")[:, 2], rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["ward", "average"])
def test_nothing_outside_the_candidates_lies_under_the_floor(kind, dtype):
    x, weight_M = blobs(500, 20), RNG.lognormal(0, 2, 500)
    spread_M = RNG.uniform(size=500) if kind == "average" else np.zeros(500)
    clusters = Clusters(
        kind=kind, center_MD=x - x.mean(axis=0), weight_M=weight_M, spread_M=spread_M, leaf_M=np.arange(500)
    )
    columns = lay_out(clusters, np.ones(500, dtype=bool), block_cols=128, dtype=dtype)
    slot_QL, floor_Q = search(columns, clusters, np.arange(500), options=SearchOptions(num_neighbors=8, block_rows=100))
    for query in range(500):
        others = np.setdiff1d(np.arange(500), [query])
        delta = pair_delta(clusters, np.full(499, query), others)
        outside = ~np.isin(others, slot_QL[query])
        assert query not in slot_QL[query]
        assert delta[outside].min() >= floor_Q[query]
        assert others[delta.argmin()] in slot_QL[query]


def test_a_distance_is_the_same_from_both_sides_and_in_any_batch():
    x = RNG.normal(size=(64, 37)) * 1e3
    clusters = Clusters(
        kind="ward", center_MD=x, weight_M=RNG.lognormal(size=64), spread_M=np.zeros(64), leaf_M=np.arange(64)
    )
    left, right = (side.reshape(-1) for side in np.meshgrid(np.arange(64), np.arange(64)))
    together = pair_delta(clusters, left, right)
    assert np.array_equal(together, pair_delta(clusters, right, left))
    assert np.array_equal(together, [pair_delta(clusters, left[[i]], right[[i]])[0] for i in range(len(left))])


def test_rounding_keeps_order_and_joins_what_differs_in_the_last_bits():
    assert rounded(np.array([0.0, 1.0, 1.0 + 1e-15, 1.0 - 1e-15, 4 / 3])).tolist() == [0, 1, 1, 1, pytest.approx(4 / 3)]
    values = np.sort(RNG.lognormal(0, 50, 1000))
    assert (np.diff(rounded(values)) >= 0).all()


def test_a_floor_that_proves_nothing_falls_back_to_differences():
    # Gaps of 1e-9 under norms of 1: no float32 product can tell these neighbors apart.
    x = np.concatenate([np.cumsum(RNG.uniform(1, 2, 100)) * 1e-9, [1.0, -1.0]])[:, None]
    found = ward(x)
    assert found.num_exact_searches > 0
    np.testing.assert_allclose(found.merges[:, 2], linkage(x, "ward")[:, 2], rtol=1e-5)


@pytest.mark.parametrize("name", ["gauss", "nested", "wide", "heavy_tails", "one_dimension"])
def test_average_linkage_equals_scipys_on_squared_distances(name):
    theirs = linkage(pdist(SHAPES[name], "sqeuclidean"), "average")
    found = agglomerate(SHAPES[name], linkage="average")
    np.testing.assert_allclose(found.merges[:, 2], theirs[:, 2], rtol=1e-9)
    assert np.array_equal(found.merges[:, [0, 1, 3]], theirs[:, [0, 1, 3]])


@pytest.mark.parametrize(("metric", "theirs"), [("cosine", "cosine"), ("pearson", "correlation")])
@pytest.mark.parametrize("name", ["linkage_average", "linkage_single", "linkage_complete"])
def test_cosine_and_pearson_equal_scipys(name, metric, theirs):
    x = nested(400, 12, 3) + 1
    kind = name.removeprefix("linkage_")
    expected = linkage(pdist(x, theirs), kind)
    found = agglomerate(x, linkage=kind, metric=metric)
    np.testing.assert_allclose(found.merges[:, 2], expected[:, 2], rtol=1e-9, atol=1e-14)
    assert is_valid_linkage(found.merges)


@pytest.mark.parametrize("kind", ["single", "complete"])
def test_single_and_complete_are_scipys(kind):
    found = agglomerate(SHAPES["blobs"], np.full(800, 2.0), linkage=kind)
    assert np.array_equal(found.merges, linkage(SHAPES["blobs"], kind))
    assert found.method == "pairwise" and found.weights[-1] == 1600
    x = SHAPES["blobs"]
    assert found.sse[-1] == pytest.approx(2 * ((x - x.mean(axis=0)) ** 2).sum())


def test_average_linkage_of_leaves_with_spread_equals_that_of_their_rows():
    # Leaves are groups of rows; scipy is given the rows, and the mean distance of every two groups.
    rng = np.random.default_rng(0)
    row_NM, leaf_N = rng.normal(size=(300, 3)), np.sort(rng.integers(0, 30, 300))
    weight_K = np.bincount(leaf_N).astype(float)
    center_KD = np.stack([row_NM[leaf_N == leaf].mean(axis=0) for leaf in range(30)])
    sse_K = np.array([((row_NM[leaf_N == leaf] - center_KD[leaf]) ** 2).sum() for leaf in range(30)])
    found = agglomerate(center_KD, weight_K, sse_K, linkage="average")
    square_NN = squareform(pdist(row_NM, "sqeuclidean"))
    groups = [np.flatnonzero(leaf_N == leaf) for leaf in range(30)]
    for left, right, height, _ in found.merges:
        left, right = groups[int(left)], groups[int(right)]
        assert height == pytest.approx(square_NN[np.ix_(left, right)].mean(), rel=1e-9)
        groups.append(np.concatenate([left, right]))
    assert found.sse[-1] == pytest.approx(((row_NM - row_NM.mean(axis=0)) ** 2).sum())


def test_weighted_average_linkage_equals_that_of_repeated_rows():
    center_KD, weight_K = nested(80, 5), RNG.integers(1, 6, 80)
    repeated = linkage(pdist(np.repeat(center_KD, weight_K, axis=0), "sqeuclidean"), "average")
    found = agglomerate(center_KD, weight_K, linkage="average")
    np.testing.assert_allclose(found.merges[:, 2], repeated[-79:, 2], rtol=1e-9)


@pytest.mark.parametrize("kind", ["ward", "average"])
def test_the_device_engine_gives_the_same_bytes(kind):
    for name in ("gauss", "nested", "duplicates", "chain", "heavy_tails"):
        weight_K = RNG.lognormal(0, 1, len(SHAPES[name]))
        plain, tiled = (
            agglomerate(SHAPES[name], weight_K, linkage=kind, options=SearchOptions(device="torch:cpu", **tiles))
            for tiles in ({}, {"block_rows": 32, "block_cols": 64})
        )
        expected = agglomerate(SHAPES[name], weight_K, linkage=kind)
        assert plain.merges.tobytes() == tiled.merges.tobytes() == expected.merges.tobytes()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bytes():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, weight_K = nested(5000, 32), RNG.lognormal(0, 1, 5000)
    assert ward(x, weight_K, device="cuda").merges.tobytes() == ward(x, weight_K).merges.tobytes()


def test_refusals_say_what_is_wrong():
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"centers must be \(K, D\)"):
        ward(np.ones(4))
    with pytest.raises(ValueError, match=r"centers must be \(K, D\)"):
        ward(np.ones((0, 3)))
    with pytest.raises(ValueError, match=r"weights must have shape \(4,\)"):
        ward(x, np.ones(3))
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        ward(x, np.array([1, 1, -1, 1]))
    with pytest.raises(ValueError, match="sse must be finite"):
        ward(x, None, np.array([0, 0, np.nan, 0]))
    with pytest.raises(ValueError, match="1 centers are not finite, the first is row 2"):
        ward(np.array([[0.0], [1.0], [np.inf]]))
    with pytest.raises(ValueError, match="too large for their squares"):
        ward(np.array([[1e200], [0.0]]))
    with pytest.raises(ValueError, match="positive weight"):
        ward(x, np.zeros(4))
    with pytest.raises(ValueError, match="linkage must be one of ward, average, single, complete, got 'centroid'"):
        agglomerate(x, linkage="centroid")
    with pytest.raises(ValueError, match="ward linkage is Euclidean, got metric cosine"):
        agglomerate(x, metric="cosine")
    with pytest.raises(ValueError, match="sse is Euclidean, metric is cosine"):
        agglomerate(x, None, np.ones(4), linkage="average", metric="cosine")
    with pytest.raises(ValueError, match="4 centers have no direction under metric pearson"):
        agglomerate(x, linkage="average", metric="pearson")
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        agglomerate(x, eps=-1)
    with pytest.raises(
        ValueError, match="single linkage holds all 20001 x 20001 / 2 distances, 2 GB; the limit is 20000"
    ):
        agglomerate(np.zeros((20001, 1)), linkage="single")
