"""What holds for every objective: the same fit on any number of ranks, streamed, resumed, and with row weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.build import build
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.rows import ResidentRows
from tests.core.ranks import SETTINGS, PlainContext, blobs, fit_blobs, make_rows, run_ranks


def variant(objective, *, layerwise=False, **refine):
    return replace(
        SETTINGS,
        objective=objective,
        pretrain=replace(SETTINGS.pretrain, layerwise=layerwise, layer_epochs=1, num_epochs=1),
        refine=replace(SETTINGS.refine, num_epochs=3, **refine),
    )


VARIANTS = {
    "layerwise": variant("autoencoder", layerwise=True),
    "ae": variant("ae", code_weight=1.0),
    "dcn": variant("dcn", recluster_epochs=2),
    "dcn counted": variant("dcn", centroid_update="counts", recluster_epochs=2),
    "dec with sizes": variant("dec", size_prior="kmeans", frequency_exponent=0.7, target_exponent=2.5),
    "idec with given sizes": variant("idec", size_prior=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]),
}


def losses(result):
    return np.array([h["loss"] for h in result["history"] if "loss" in h])


@pytest.fixture(scope="module")
def alone():
    """Return the fit of a variant on one rank."""
    done = {}

    def of(name):
        if name not in done:
            done[name] = run_ranks(1, fit_blobs, VARIANTS[name])[0]
        return done[name]

    return of


# Layer by layer there are many more epochs than in the others.
@pytest.mark.parametrize("name", [pytest.param(v, marks=pytest.mark.slow) if v == "layerwise" else v for v in VARIANTS])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_loss_curve_is_the_same_on_any_number_of_ranks(world_size, name, alone):
    results = run_ranks(world_size, fit_blobs, VARIANTS[name])
    for result in results:
        np.testing.assert_allclose(losses(result), losses(alone(name)), rtol=1e-4)
        np.testing.assert_array_equal(result["centers"], results[0]["centers"])
        # A k-means from the start may end with the same leaves in another order: rounding decides between its restarts.
        np.testing.assert_allclose(np.sort(result["weights"]), np.sort(alone(name)["weights"]), atol=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_streamed_rows_are_trained_on_alike_by_all_ranks(name):
    results = run_ranks(2, fit_blobs, VARIANTS[name], True)
    assert np.isfinite(losses(results[0])).all()
    for result in results:
        assert result["weights"].sum() == 1000
        np.testing.assert_array_equal(result["centers"], results[0]["centers"])


# Reports come after each epoch of pretraining, after k-means and after each epoch on the objective.
@pytest.mark.parametrize("stop_after", [2, 3, 4])
@pytest.mark.parametrize("name", ["ae", "dcn", "dcn counted", "idec with given sizes"])
def test_a_resumed_fit_ends_as_an_unbroken_one(name, stop_after, alone, tmp_path):
    run_ranks(1, fit_blobs, VARIANTS[name], False, tmp_path, stop_after)
    resumed = run_ranks(1, fit_blobs, VARIANTS[name], False, tmp_path)[0]
    assert len(resumed["reports"]) == len(alone(name)["reports"]) - stop_after
    np.testing.assert_array_equal(resumed["centers"], alone(name)["centers"])
    np.testing.assert_array_equal(resumed["weights"], alone(name)["weights"])


@pytest.mark.parametrize("name", ["dec with sizes", "idec with given sizes", "ae", "dcn", "dcn counted", "layerwise"])
def test_a_row_of_weight_two_counts_as_two_rows_in_every_loss(name):
    # One step an epoch, so that a row and its copy are in the same one whatever their keys.
    whole = VARIANTS[name]
    settings = replace(
        whole,
        pretrain=replace(whole.pretrain, batch_rows=10_000, corruption=0.0, layer_corruption=0.0),
        refine=replace(whole.refine, batch_rows=10_000),
    )
    x, _ = blobs(300)
    weights = torch.ones(300)
    weights[:50] = 2.0
    weighted = ResidentRows(torch.from_numpy(x), torch.arange(300), weights, Ranks())
    repeated = make_rows(Ranks(), np.concatenate([x, x[:50]]))
    first, second = (fit(rows, Preprocess(), settings, PlainContext()) for rows in (weighted, repeated))
    for a, b in zip(first.history, second.history, strict=True):
        for number in {"loss", "inertia", "largest_share", "top_q"} & a.keys():
            assert a[number] == pytest.approx(b[number], rel=0.05), (a["phase"], a["epoch"], number)
    assert float(first.leaves.weights_K.sum()) == float(second.leaves.weights_K.sum()) == 350


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="unknown objective 'som'"):
        build("som", None)
