"""Fitting an array in this process: every objective, weights, levels, other rows, refusals; and the example runs."""

import doctest
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import raydc.core.api
from raydc.core.api import fit_array, pretrain_array
from raydc.core.metrics import scores
from raydc.core.objectives.table import OBJECTIVES
from raydc.core.training.settings import (
    AutoencoderSettings,
    ClusterSettings,
    FitSettings,
    PretrainSettings,
    RefineSettings,
)
from tests.core.ranks import blobs

SMALL = FitSettings(
    precision="float32",
    autoencoder=AutoencoderSettings(hidden_dims=(32,), latent_dim=5),
    pretrain=PretrainSettings(num_epochs=2, batch_rows=64),
    cluster=ClusterSettings(num_restarts=3),
    refine=RefineSettings(num_epochs=2, batch_rows=64),
)


def nmi(labels, classes):
    return scores.external(scores.counted(labels, classes))["nmi"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_clusters_an_array_and_labels_other_rows_alike(objective):
    x, classes = blobs(600)
    result = fit_array(x, 6, objective=objective, settings=SMALL)
    assert result.labels.shape == result.confidence.shape == (600,)
    assert nmi(result.labels, classes) > 0.8
    assert result.linkage.shape == (result.num_leaves - 1, 4)
    assert (result.confidence > 0).all() and (result.confidence <= 1).all()
    np.testing.assert_array_equal(result.predict(x[100:200]), result.labels[100:200])
    assert result.transform(x[:7]).shape == (7, result.centers.shape[1])
    np.testing.assert_allclose(result.weights.sum(), 600)


def test_the_same_seed_gives_the_same_labels_from_numpy_and_torch_and_float64():
    x, _ = blobs(300)
    first = fit_array(x, 6, objective="idec", settings=SMALL, seed=3)
    for again in (x.astype(np.float64), torch.from_numpy(x)):
        other = fit_array(again, 6, objective="idec", settings=SMALL, seed=3)
        np.testing.assert_array_equal(other.labels, first.labels)
        np.testing.assert_array_equal(other.centers, first.centers)


def test_the_keys_alone_decide_the_random_choices():
    x, _ = blobs(300)
    histories = [
        fit_array(x, 6, settings=SMALL, keys=keys).history for keys in (None, np.arange(300), np.arange(300) * 7)
    ]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1] != losses[2]


def test_levels_nest_and_neighboring_leaf_ids_are_neighbors_in_the_tree():
    x, _ = blobs(500)
    result = fit_array(x, 6, objective="kmeans", settings=SMALL)
    groups = result.levels([2, 4])
    for size, labels in groups.items():
        assert len(np.unique(labels)) == size
    for group in range(4):
        assert len(np.unique(groups[2][groups[4] == group])) == 1
    # Ids follow the tree: along them a level never falls.
    for labels in groups.values():
        assert (np.diff(labels[np.argsort(result.labels, kind="stable")]) >= 0).all()


def test_a_row_of_weight_two_counts_as_two_rows():
    x, _ = blobs(300)
    weights = np.ones(300)
    weights[:50] = 2.0
    weighted = fit_array(x, 6, objective="kmeans", settings=SMALL, sample_weight=weights)
    repeated = fit_array(np.concatenate([x, x[:50]]), 6, objective="kmeans", settings=SMALL)
    np.testing.assert_allclose(weighted.weights, repeated.weights)
    np.testing.assert_allclose(weighted.centers, repeated.centers, rtol=1e-4, atol=1e-4)


def test_a_fit_from_a_pretrained_autoencoder_is_the_fit_that_pretrains_by_itself():
    x, _ = blobs(300)
    pretrained = pretrain_array(x, settings=SMALL, seed=2)
    seen = []
    shared = fit_array(x, 6, settings=SMALL, seed=2, pretrained=pretrained, on_report=seen.append)
    alone = fit_array(x, 6, settings=SMALL, seed=2)
    np.testing.assert_array_equal(shared.labels, alone.labels)
    np.testing.assert_array_equal(shared.centers, alone.centers)
    assert "pretrain" not in {entry["phase"] for entry in seen} and "refine" in {entry["phase"] for entry in seen}
    wider = replace(SMALL, autoencoder=AutoencoderSettings(hidden_dims=(32,), latent_dim=7))
    with pytest.raises(ValueError, match="pretrain with the settings of the fit"):
        fit_array(x, 6, settings=wider, pretrained=pretrained)


@pytest.mark.parametrize("preprocess", ["l2", "standardize", "scale"])
def test_rows_are_preprocessed_alike_in_the_fit_and_later(preprocess):
    x, _ = blobs(300)
    result = fit_array(x, 6, objective="kmeans", settings=SMALL, preprocess=preprocess)
    np.testing.assert_array_equal(result.predict(x), result.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones(5)}, r"x must be a matrix \(N, D\), got shape \(5,\)"),
        ({"x": np.ones((5, 2), int)}, "x must hold float16, float32 or float64, got torch.int64"),
        ({"x": np.array([[1.0, 2], [1e20, 0]])}, "rows that cannot be clustered, the first is row 1: too_large"),
        ({"x": np.array([[1.0, 2], [np.nan, 0], [np.inf, 0]])}, "2 rows that are not finite, the first is row 1"),
        ({"num_clusters": 40}, "40 leaves need at least as many rows, there are 30"),
        ({"sample_weight": np.ones(3)}, r"sample_weight must have shape \(30,\), got \(3,\)"),
        ({"sample_weight": -np.ones(30)}, "sample_weight must be finite and not negative"),
        ({"sample_weight": np.zeros(30)}, "one of them positive"),
        ({"keys": np.arange(30)[::-1]}, "keys must be 30 rising numbers from 0 on"),
        ({"keys": np.arange(29)}, "keys must be 30 rising numbers from 0 on"),
        ({"objective": "som"}, "unknown objective 'som'"),
        ({"objective": "icon", "num_neighbors": 30}, "num_neighbors must be from 1 to 29, the number of other rows"),
        ({"preprocess": "whiten"}, "unknown preprocess method 'whiten'"),
        ({"x": np.zeros((30, 4), np.float32), "preprocess": "l2"}, "30 rows of zeros, the first is row 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": blobs(30)[0], "num_clusters": 3, "objective": "kmeans", "settings": SMALL} | change
    with pytest.raises(ValueError, match=message):
        fit_array(**arguments)


def test_other_rows_must_have_the_width_of_the_fit():
    x, _ = blobs(60)
    result = fit_array(x, 3, objective="kmeans", settings=SMALL)
    assert result.predict(x[:0]).shape == (0,) and result.transform(x[:0]).shape == (0, 12)
    with pytest.raises(ValueError, match="x has rows of 5 numbers, the fit had 12"):
        result.predict(x[:, :5])


def test_nothing_is_left_to_pretrain_for_an_objective_without_a_network():
    with pytest.raises(ValueError, match="objective=icon trains no autoencoder"):
        pretrain_array(blobs(60)[0], settings=replace(SMALL, objective="icon"))


def test_the_example_in_the_documentation_runs():
    outcome = doctest.testmod(raydc.core.api)
    assert outcome.attempted >= 8 and outcome.failed == 0


def test_an_array_is_fitted_without_ray():
    script = (
        "import sys, numpy as np; from raydc.core.api import fit_array; "
        "fit_array(np.random.default_rng(0).normal(size=(40, 4)), 2, objective='kmeans'); "
        "assert not {'ray', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
