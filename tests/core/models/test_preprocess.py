"""Moments that merge, and the four maps of raw rows, by hand and against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler, normalize

from raydc.core.models.preprocess import Moments, Preprocess

WHOLE = [(0, 4, 1.0)]


def rows(num: int, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num, 4)) * [1, 2, 3, 4] + offset).astype(np.float32)


def test_moments_by_hand():
    m = Moments.from_rows(np.array([[1.0, 0.0], [3.0, 0.0]]))
    assert m.num_rows == 2
    assert m.mean_D.tolist() == [2, 0]
    assert m.variance_D.tolist() == [1, 0]
    assert m.mean_square == 2.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_moments_of_blocks_merge_to_those_of_the_whole(sizes, offset):
    x = rows(sum(sizes), offset)
    merged = Moments(0, np.zeros(4), np.zeros(4))
    for block in np.split(x, np.cumsum(sizes)[:-1]):
        merged = merged.merge(Moments.from_rows(block))
    assert merged.num_rows == len(x)
    if len(x):
        exact = x.astype(np.float64)
        np.testing.assert_allclose(merged.mean_D, exact.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(merged.variance_D, exact.var(axis=0), rtol=1e-9, atol=1e-9)


def test_moments_of_float16_rows_do_not_overflow():
    m = Moments.from_rows(np.full((100_000, 1), 60_000, np.float16))
    assert m.mean_D[0] == np.float16(60_000)
    assert m.variance_D[0] == 0


def test_none_leaves_float32_rows_alone():
    x = torch.from_numpy(rows(5))
    assert torch.equal(Preprocess("none", WHOLE)(x), x)
    assert Preprocess("none", WHOLE)(x.half()).dtype == torch.float32


def test_l2_gives_each_column_unit_norm():
    x = rows(6)
    two = Preprocess("l2", [(0, 1, 1.0), (1, 4, 1.0)])(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(two[:, :1], normalize(x[:, :1]), rtol=1e-6)
    np.testing.assert_allclose(two[:, 1:], normalize(x[:, 1:]), rtol=1e-6)


def test_weights_scale_each_column_after_the_rest():
    x = torch.from_numpy(rows(6))
    y = Preprocess("l2", [(0, 2, 2.0), (2, 4, 0.5)])(x)
    np.testing.assert_allclose(y[:, :2].norm(dim=1), 2.0, rtol=1e-6)
    np.testing.assert_allclose(y[:, 2:].norm(dim=1), 0.5, rtol=1e-6)


def test_standardize_is_scikit_learns():
    x = rows(200, offset=5)
    x[:, 3] = 7
    ours = Preprocess.fit("standardize", WHOLE, Moments.from_rows(x))(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, StandardScaler().fit_transform(x), atol=2e-6)
    assert np.abs(ours[:, 3]).max() == 0


def test_scale_makes_the_mean_square_one():
    x = rows(200, offset=5)
    y = Preprocess.fit("scale", WHOLE, Moments.from_rows(x))(torch.from_numpy(x))
    assert float((y**2).mean()) == pytest.approx(1, rel=1e-5)
    fixed = Preprocess.fit("scale", WHOLE, Moments.from_rows(x), factor=0.5)
    assert torch.equal(fixed(torch.from_numpy(x)), torch.from_numpy(x) * 0.5)


def test_scale_of_zeros_is_refused_unless_the_factor_is_given():
    zeros = Moments.from_rows(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="method=scale: every row of the sample is zero, so there is no scale"):
        Preprocess.fit("scale", WHOLE, zeros)
    assert Preprocess.fit("scale", WHOLE, zeros, factor=2.0).scale_D is not None


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown preprocess method 'whiten'"):
        Preprocess.fit("whiten", WHOLE, Moments.from_rows(rows(3)))


@pytest.mark.parametrize("method", ["none", "l2", "standardize", "scale"])
def test_a_row_is_mapped_alike_alone_and_in_company(method):
    x = rows(50, offset=2)
    map_ = Preprocess.fit(method, [(0, 3, 1.5), (3, 4, 1.0)], Moments.from_rows(x))
    together = map_(torch.from_numpy(x))
    alone = torch.cat([map_(row[None]) for row in torch.from_numpy(x)])
    assert torch.equal(together, alone)
    assert map_(torch.empty(0, 4)).shape == (0, 4)
