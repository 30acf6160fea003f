"""The flat map of latent rows."""

import numpy as np
import pytest

from raydc.report.map import project, project_all


def blobs(num_rows, width=4):
    """Return rows of two groups far apart, and the groups."""
    group = np.arange(num_rows) % 2
    return np.random.default_rng(0).normal(size=(num_rows, width)) + 20 * group[:, None], group


def test_two_groups_stay_apart_and_a_second_call_gives_the_same_map():
    rows, group = blobs(120, width=70)
    found = project(rows, seed=3)
    assert np.abs(found).max() <= 1 + 1e-9
    centers = [found[group == g].mean(axis=0) for g in (0, 1)]
    spread = max(found[group == g].std() for g in (0, 1))
    assert np.hypot(*(centers[0] - centers[1])) > 2 * spread
    assert np.array_equal(found, project(rows, seed=3))


def test_maps_of_two_spaces_show_the_same_rows_in_the_same_places():
    rows, group = blobs(150)
    # The same space, mirrored and turned, with another noise and other units.
    turned = 7 * rows[:, ::-1] * [1, -1, 1, -1] + np.random.default_rng(1).normal(size=rows.shape)
    first, second = project_all([rows, turned], seed=3)
    for found in (first, second):
        assert np.abs(found).max() <= 1 + 1e-9
    places = [[found[group == g].mean(axis=0) for g in (0, 1)] for found in (first, second)]
    for g in (0, 1):
        assert np.hypot(*(places[0][g] - places[1][g])) < np.hypot(*(places[0][g] - places[1][1 - g])) / 2
    again = project_all([rows, turned], seed=3)
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])
    assert np.array_equal(project_all([rows], seed=3)[0], first)


@pytest.mark.parametrize("num_rows", [8, 9, 31])
def test_few_rows_are_mapped_with_a_perplexity_that_they_allow(num_rows):
    assert np.isfinite(project(blobs(num_rows)[0], seed=0)).all()


def test_rows_without_spread_or_with_one_column_are_mapped():
    assert not project(np.ones((10, 3)), seed=0).any()
    assert np.isfinite(project(blobs(20, width=1)[0], seed=0)).all()


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="a map needs 8 rows, got 7"):
        project(np.zeros((7, 2)), seed=0)
