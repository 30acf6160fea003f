"""A whole fit from the tree's start, with moves: over ranks, streamed, resumed, as a baseline."""

from dataclasses import replace

import numpy as np
import pytest

from raydc.core.models.preprocess import Preprocess
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.kmeans_on_codes import start_rows
from raydc.core.training.settings import ClusterSettings
from tests.core.ranks import (
    SETTINGS,
    PlainContext,
    blobs,
    fit_blobs,
    make_rows,
    run_ranks,
    with_objective,
)

TREE = replace(SETTINGS.cluster, num_leaves=60, start="auto", num_restarts=1)
KMEANS = with_objective("kmeans", cluster=TREE)


def sixty():
    return blobs(3000, num_blobs=60)[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_kmeans_from_the_tree_is_the_same_on_any_number_of_ranks(world_size):
    alone = run_ranks(1, fit_blobs, KMEANS, False, None, None, sixty())[0]
    assert alone["history"][0]["reseeded"] == 0
    for found in run_ranks(world_size, fit_blobs, KMEANS, False, None, None, sixty()):
        np.testing.assert_allclose(found["centers"], alone["centers"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found["weights"], alone["weights"])
        assert found["history"][0]["moves"] == alone["history"][0]["moves"]


def test_kmeans_from_the_tree_finds_sixty_blobs_exactly():
    x, labels = blobs(3000, num_blobs=60)
    found = fit(make_rows(Ranks(), x), Preprocess(), KMEANS, PlainContext())
    np.testing.assert_array_equal(np.sort(found.leaves.weights_K.numpy()), np.sort(np.bincount(labels)))


def test_streamed_rows_give_the_same_as_resident_ones():
    resident = run_ranks(1, fit_blobs, KMEANS, False, None, None, sixty())[0]
    streamed = run_ranks(1, fit_blobs, KMEANS, True, None, None, sixty())[0]
    np.testing.assert_allclose(streamed["centers"], resident["centers"], rtol=1e-5, atol=1e-5)


def test_a_fit_stopped_before_kmeans_ends_as_an_unbroken_one(tmp_path):
    settings = replace(SETTINGS, cluster=TREE)
    unbroken = fit_blobs(Ranks(), settings, x=sixty())
    assert unbroken["history"][3]["phase"] == "kmeans"
    # The last checkpoint is of pretraining: k-means is made again as a whole.
    assert fit_blobs(Ranks(), settings, folder=tmp_path, stop_after=3, x=sixty())["stopped"]
    resumed = fit_blobs(Ranks(), settings, folder=tmp_path, x=sixty())
    np.testing.assert_array_equal(resumed["centers"], unbroken["centers"])
    np.testing.assert_array_equal(resumed["baselines"]["raw_kmeans"], unbroken["baselines"]["raw_kmeans"])


def test_moves_mend_what_restarts_leave_and_are_counted():
    x, labels = blobs(3000, num_blobs=60)
    stuck = replace(KMEANS, cluster=replace(TREE, start="restarts"))
    moved = replace(KMEANS, cluster=replace(TREE, start="restarts", moves="all"))
    before, after = (fit_blobs(Ranks(), settings, x=x) for settings in (stuck, moved))
    assert before["history"][0]["moves"] == before["history"][0]["move_rounds"] == 0
    assert after["history"][0]["moves"] > 0
    assert after["history"][0]["inertia"] < 0.9 * before["history"][0]["inertia"]
    np.testing.assert_array_equal(np.sort(after["weights"]), np.sort(np.bincount(labels)))


def test_a_few_leaves_start_as_before_whatever_is_new():
    explicit = replace(SETTINGS, cluster=replace(SETTINGS.cluster, start="restarts", moves="none"))
    found, before = fit_blobs(Ranks()), fit_blobs(Ranks(), explicit)
    np.testing.assert_array_equal(found["centers"], before["centers"])
    np.testing.assert_array_equal(found["baselines"]["raw_kmeans"], before["baselines"]["raw_kmeans"])


def test_a_baseline_of_more_leaves_than_baseline_rows_takes_more_rows():
    few = replace(SETTINGS, cluster=TREE, baseline_rows=50)
    found = fit_blobs(Ranks(), few, x=sixty())
    assert found["baselines"]["raw_kmeans"].shape == (60, 12)


def test_a_start_samples_twenty_rows_for_each_leaf_at_least():
    assert start_rows(ClusterSettings(num_leaves=1000)) == 1_000_000
    assert start_rows(ClusterSettings(num_leaves=100_000)) == 2_000_000
