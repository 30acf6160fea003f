"""What helps against a failure of the workers: Ray's own errors, as they come."""

import pytest
import torch
from ray.exceptions import OutOfDiskError, OutOfMemoryError

from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.vade import UnitRange
from raydc.core.training import checkpoint
from raydc.core.training.collectives import Ranks
from raydc.core.training.epochs import Trainer
from raydc.core.training.fit import fit
from raydc.core.training.kmeans_on_codes import Sample, start_centers
from raydc.runtime.remedies import advice, remedy
from tests.core.ranks import SETTINGS, PlainContext, blobs, make_rows

# The beginning of what Ray says of a worker that it killed, and of one that is gone for reasons unknown.
LOW = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: d1c4e2) was "
    "6.99GB used / 23.54GB limit (0.297001)\nOOM kill reason: Memory usage exceeded threshold"
)
GONE = "Worker unexpectedly exits. Some common causes include: (1) the process was killed by the OOM killer; (2) ..."


@pytest.mark.parametrize(
    "error", [OutOfMemoryError(LOW), MemoryError(), RuntimeError("CUDA out of memory. Tried 2 GiB")]
)
def test_a_worker_killed_for_memory_names_the_settings_that_take_less(error):
    assert "fit.resident_bytes" in remedy("fit", error)
    assert "assign.block_rows" in remedy("assign", error)
    assert "merge.cpus_per_cell" in remedy("merge", error)
    assert "If it was" not in remedy("fit", error)


def test_a_worker_that_is_gone_for_reasons_unknown_is_no_proof():
    for error in (GONE, "the worker died from SIGKILL"):
        assert remedy("assign", error).startswith(" If it was killed for want of memory: lower assign.block_rows")


def test_a_full_disk_names_the_two_places():
    for error in (OutOfDiskError(), OSError(28, "No space left on device")):
        assert "free space where the run is written and under Ray's temporary folder" in remedy("assign", error)


def test_other_failures_give_no_advice():
    assert remedy("fit", ValueError("shapes differ")) == ""


def refusal(settings, context=None, x=None):
    """Return what core says of a fit that cannot be made."""
    with pytest.raises((ValueError, FloatingPointError)) as refused:
        fit(make_rows(Ranks(), blobs()[0] if x is None else x), Preprocess(), settings, context or PlainContext())
    return str(refused.value)


def test_a_loss_that_is_not_finite_names_the_setting_that_scales_the_rows():
    text = refusal(SETTINGS, x=blobs()[0] * 1e30)
    assert "preprocess.method" not in text and "pretrain.learning_rate" in text
    assert advice(text).endswith("preprocess.method=scale or standardize gives them such a scale.")


def test_too_small_a_sample_of_the_baseline_names_its_setting():
    trainer = Trainer(
        rows=make_rows(Ranks(), blobs()[0]),
        preprocess=Preprocess(),
        settings=SETTINGS,
        ranks=Ranks(),
        arithmetic="float32",
    )
    # A fit takes twenty rows for each leaf at least, so the sample is given here.
    with pytest.raises(ValueError) as refused:
        start_centers(trainer, Sample(torch.zeros(3, 12), torch.ones(3)), seed=0, sampled_by="baseline_rows")
    text = str(refused.value)
    assert text.endswith("a sample of 3 rows for 6 leaves. Raise baseline_rows.")
    assert advice(text).endswith("Raise baseline_rows. It is the setting evaluate.baseline_rows.")


@pytest.mark.parametrize("how", ["damaged", "format", "settings"])
def test_a_checkpoint_that_is_no_use_names_what_to_delete_or_the_option(how, tmp_path):
    folder = tmp_path / "latest"
    values = {"fingerprint": "another"} | ({"format": 1} if how == "format" else {})
    checkpoint.save(folder, {"a": torch.zeros(1)}, values)
    if how == "damaged":
        (folder / "state.json").write_text("{")
    text = refusal(SETTINGS, PlainContext(folder=tmp_path))
    assert "--" not in text and "stages/" not in text
    remedies = {"damaged": "delete it and stages/fit.json", "format": "delete checkpoints/", "settings": "--run-id"}
    assert remedies[how] in advice(text)


def test_rows_outside_the_unit_range_name_the_settings_that_bring_them_there():
    with pytest.raises(ValueError) as refused:
        UnitRange().end(torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert advice(str(refused.value)).endswith("preprocess.method=scale with a preprocess.factor does that.")


def test_neighbors_of_other_rows_name_the_option():
    said = "3 neighbors are no rows of the fit, such as key 7: they were searched among other rows"
    assert advice(said) == said + ". Use a new --run-id."


def test_other_messages_of_core_stay_as_they_are():
    assert advice("5 leaves need at least as many rows, there are 3") == (
        "5 leaves need at least as many rows, there are 3"
    )
