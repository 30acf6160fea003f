"""Checkpoints inside an epoch: a fit that was stopped there ends as an unbroken one."""

from dataclasses import replace

import numpy as np
import pytest

from raydc.core.models.preprocess import Preprocess
from raydc.core.training import checkpoint
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.rows import StreamedRows
from raydc.core.training.settings import FitSettings
from tests.core.ranks import SETTINGS, PlainContext, blobs, fit_blobs, make_rows, run_ranks, with_objective

# Of the 16 steps of an epoch, checkpoints after the 5th, 10th and 15th: four reports an epoch.
OFTEN = {"check_steps": 5, "checkpoint_seconds": 1e-9}


def numbers(result, name):
    return np.array([h[name] for h in result["history"] if name in h])


def assert_same_end(resumed, unbroken, rtol=1e-6):
    for name in ("loss", "effective_rank", "changed", "steps"):
        np.testing.assert_allclose(numbers(resumed, name), numbers(unbroken, name), rtol=rtol, err_msg=name)
    np.testing.assert_allclose(resumed["centers"], unbroken["centers"], rtol=10 * rtol, atol=10 * rtol)
    for name, weights in unbroken["encoder"].items():
        np.testing.assert_allclose(resumed["encoder"][name], weights, rtol=10 * rtol, atol=10 * rtol)


def stopped_and_resumed(settings, folder, stop_after, first_ranks=1, then_ranks=1):
    """Return the resumed fit, and how far the checkpoint was."""
    assert run_ranks(first_ranks, fit_blobs, settings, False, folder, stop_after)[0]["stopped"]
    _, values = checkpoint.load(folder / "latest")
    return run_ranks(then_ranks, fit_blobs, settings, False, folder)[0], values


@pytest.fixture(scope="module")
def unbroken():
    return run_ranks(1, fit_blobs, SETTINGS)[0]


def test_checkpoints_inside_an_epoch_change_nothing(unbroken, tmp_path):
    often = run_ranks(1, fit_blobs, replace(SETTINGS, **OFTEN), False, tmp_path)[0]
    np.testing.assert_array_equal(often["centers"], unbroken["centers"])
    assert [r.get("step") for r in often["reports"]][:4] == [5, 10, 15, None]
    assert len(often["history"]) == len(unbroken["history"])


# In the first and second epoch of pretraining, and in both of refinement: before and after the second refresh.
@pytest.mark.parametrize(("stop_after", "phase", "epoch", "steps"), [
    (2, "pretrain", 0, 10), (5, "pretrain", 1, 5), (14, "refine", 0, 5), (19, "refine", 1, 10)
])  # fmt: skip
def test_a_fit_stopped_inside_an_epoch_ends_as_an_unbroken_one(stop_after, phase, epoch, steps, unbroken, tmp_path):
    resumed, values = stopped_and_resumed(replace(SETTINGS, **OFTEN), tmp_path, stop_after)
    assert (values["phase"], values["epoch"], values["within"]["steps"]) == (phase, epoch, steps)
    assert_same_end(resumed, unbroken, rtol=1e-5)


@pytest.mark.parametrize(("first_ranks", "then_ranks"), [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("stop_after", [5, 19])
def test_a_fit_on_two_ranks_goes_on_inside_an_epoch(stop_after, first_ranks, then_ranks, unbroken, tmp_path):
    settings = replace(SETTINGS, **OFTEN)
    resumed, _ = stopped_and_resumed(settings, tmp_path, stop_after, first_ranks, then_ranks)
    np.testing.assert_allclose(numbers(resumed, "loss"), numbers(unbroken, "loss"), rtol=1e-4)


@pytest.mark.parametrize("objective", ["idec", "dcn", "vade", "distill", "ae"])
def test_every_objective_goes_on_inside_an_epoch(objective, tmp_path):
    settings = with_objective(objective)
    unbroken = run_ranks(1, fit_blobs, settings)[0]
    resumed, values = stopped_and_resumed(replace(settings, **OFTEN), tmp_path, 19)
    assert (values["phase"], values["epoch"], values["within"]["steps"]) == ("refine", 1, 10)
    assert_same_end(resumed, unbroken, rtol=1e-4)


def test_the_pretraining_of_layers_goes_on_inside_an_epoch(tmp_path):
    settings = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, layerwise=True))
    unbroken = run_ranks(1, fit_blobs, settings)[0]
    for number, stop_after in enumerate((2, 9, 22)):
        resumed, values = stopped_and_resumed(replace(settings, **OFTEN), tmp_path / str(number), stop_after)
        assert values["phase"] == "layers" and values["within"]
        assert_same_end(resumed, unbroken, rtol=1e-5)


def fit_with_a_notice(ranks, folder):
    """Fit with a launcher that wants a checkpoint in the second epoch; on rank 1 alone, if there is one."""
    settings = replace(SETTINGS, check_steps=5, look_seconds=0.0, checkpoint_seconds=None, checkpoint_epochs=100)
    context = PlainContext(ranks.rank, ranks.world_size, folder)
    if ranks.rank == ranks.world_size - 1:
        context.notice_after = 1
    fit(make_rows(ranks, blobs()[0]), Preprocess(), settings, context)
    return context.reports


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_notice_makes_one_checkpoint_at_the_next_look(world_size, tmp_path):
    for reports in run_ranks(world_size, fit_with_a_notice, tmp_path):
        inside = [(r["phase"], r["epoch"], r["step"]) for r in reports if "step" in r]
        assert inside == [("pretrain", 1, 5)]


def test_streamed_rows_have_no_checkpoint_inside_an_epoch(tmp_path):
    often = replace(SETTINGS, look_seconds=0.0, **OFTEN)
    result = run_ranks(1, fit_blobs, often, True, tmp_path)[0]
    assert not any("step" in r for r in result["reports"])


def test_rows_that_are_streamed_from_now_on_pass_over_the_steps_that_are_done():
    rows = make_rows(Ranks(), blobs()[0], streamed=True)
    assert isinstance(rows, StreamedRows)
    whole = [s.batch.keys_N.tolist() for s in rows.steps(64, 3)]
    assert [s.batch.keys_N.tolist() for s in rows.steps(64, 3, 5)] == whole[5:]


def test_a_long_epoch_is_kept_although_its_number_is_not_due(tmp_path):
    settings = replace(SETTINGS, checkpoint_epochs=100)
    few, many = (replace(settings, checkpoint_seconds=seconds) for seconds in (None, 1e-9))
    run_ranks(1, fit_blobs, few, False, tmp_path / "few", 2)
    run_ranks(1, fit_blobs, many, False, tmp_path / "many", 2)
    assert not (tmp_path / "few" / "latest").exists()
    assert checkpoint.load(tmp_path / "many" / "latest")[1]["epoch"] == 2


def test_the_default_looks_every_hundred_steps_and_keeps_every_ten_minutes():
    assert (FitSettings().check_steps, FitSettings().checkpoint_seconds) == (100, 600.0)
