"""The flat map of latent rows."""

import numpy as np
import pytest

from raydc.report.projection import project


def blobs(num_rows, width=4):
    """Return rows of two groups far apart, and the groups."""
    group = np.arange(num_rows) % 2
    return np.random.default_rng(0).normal(size=(num_rows, width)) + 20 * group[:, None], group


def test_two_groups_stay_apart_and_a_second_call_gives_the_same_map():
    rows, group = blobs(120, width=70)
    found = project(rows, seed=3)
    assert np.abs(found).max() <= 1 + 1e-9
    centres = [found[group == g].mean(axis=0) for g in (0, 1)]
    spread = max(found[group == g].std() for g in (0, 1))
    assert np.hypot(*(centres[0] - centres[1])) > 2 * spread
    assert np.array_equal(found, project(rows, seed=3))


@pytest.mark.parametrize("num_rows", [8, 9, 31])
def test_few_rows_are_mapped_with_a_perplexity_that_they_allow(num_rows):
    assert np.isfinite(project(blobs(num_rows)[0], seed=0)).all()


def test_rows_without_spread_or_with_one_column_are_mapped():
    assert not project(np.ones((10, 3)), seed=0).any()
    assert np.isfinite(project(blobs(20, width=1)[0], seed=0)).all()


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="a map needs 8 rows, got 7"):
        project(np.zeros((7, 2)), seed=0)
