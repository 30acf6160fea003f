"""A sweep on plain arrays: the criteria of each K, the same on one and two ranks, and its resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.metrics.choose_k import recommend
from raydc.core.models.preprocess import Preprocess
from raydc.core.training.sweep import Sample, SweepSettings, sweep, target_top_q
from tests.core.ranks import SETTINGS, PlainContext, blobs, make_rows, run_ranks

# Stability is the mean of a few pairs of clusterings, of which one may meet a poor start; with this seed none does.
CHOSEN = replace(SETTINGS, seed=4)

PLAN = SweepSettings(
    num_leaves=(3, 5, 6, 8, 10),
    stability_rows=1000,
    num_repeats=3,
    neighbor_rows=500,
    num_neighbors=5,
    neighbor_queries=500,
)


def swept(ranks, folder=None, stop_after=None, numbers=PLAN.num_leaves):
    """Sweep the six blobs; every tenth row is held out."""
    x, classes = blobs()
    apart = np.arange(len(x)) % 10 == 0
    rows, held_out = make_rows(ranks, x[~apart]), make_rows(ranks, x[apart])
    first = ranks.rank == 0
    sample = Sample(torch.from_numpy(x[~apart]) if first else torch.empty((0, 12)), classes[~apart] if first else None)
    context = PlainContext(ranks.rank, ranks.world_size, folder, stop_after)
    try:
        entries = sweep(rows, held_out, sample, Preprocess(), CHOSEN, replace(PLAN, num_leaves=numbers), context)
    except KeyboardInterrupt:
        return context.reports
    return entries


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(1, swept)[0]


def test_the_number_of_blobs_is_recommended(on_one_rank):
    assert [e["k"] for e in on_one_rank] == list(PLAN.num_leaves)
    found = recommend(on_one_rank)
    assert found.num_leaves == 6, found
    by_k = {e["k"]: e for e in on_one_rank}
    assert by_k[6]["nmi"] > 0.95 and by_k[6]["stability"] > 0.95
    assert by_k[6]["held_out_loss"] > 0 and by_k[6]["g_error"] > 0
    assert by_k[3]["inertia"] > 0


def test_two_ranks_find_the_same_criteria(on_one_rank):
    on_two = run_ranks(2, swept, None, None, (3, 6, 8))[0]
    for ours in on_two:
        (theirs,) = [e for e in on_one_rank if e["k"] == ours["k"]]
        for name in ("silhouette", "davies_bouldin", "calinski_harabasz", "train_loss", "held_out_loss", "nmi"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.02), (ours["k"], name)


def test_an_interrupted_sweep_goes_on_with_the_k_that_were_not_done(on_one_rank, tmp_path):
    # Three epochs of pretraining, then k-means and two epochs of refinement for K = 3, and its criteria.
    reports = run_ranks(1, swept, tmp_path, 3 + 4 + 2)[0]
    assert [r["k"] for r in reports if r["phase"] == "sweep"] == [3]
    resumed = run_ranks(1, swept, tmp_path)[0]
    for ours, theirs in zip(resumed, on_one_rank, strict=True):
        for name in ("k", "inertia", "silhouette", "g", "stability", "nmi"):
            assert ours[name] == theirs[name]


def test_the_target_of_the_kernel_keeps_the_ratio_of_the_largest_share_to_the_others():
    settings = replace(
        SETTINGS,
        cluster=replace(SETTINGS.cluster, num_leaves=10),
        refine=replace(SETTINGS.refine, target_top_q=0.28),
    )
    assert target_top_q(settings, 10) == pytest.approx(0.28)
    for k in (2, 3, 100):
        t = target_top_q(settings, k)
        assert 1 / k < t < 1 and t / ((1 - t) / (k - 1)) == pytest.approx(3.5)


def test_fewer_training_rows_than_leaves_are_refused():
    with pytest.raises(ValueError, match="901 leaves need at least as many rows, 900 are trained on"):
        run_ranks(1, swept, None, None, (3, 901))
