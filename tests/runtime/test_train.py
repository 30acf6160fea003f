"""What a person reads of a training: its progress, and why it was given up."""

import pytest
import ray.train

from raydc.runtime.train import failed, progress_line


@pytest.mark.parametrize("name", ["fit", "sweep"])
def test_workers_without_memory_are_told_what_takes_less_whichever_command_trains(name):
    text = failed(name, ray.train.ControllerError(MemoryError("no more")), 4)
    assert text.startswith(
        f"{name}: Ray Train's controller failed with MemoryError: no more. The memory did not suffice:"
    )
    assert "fit.resident_bytes" in text and text.endswith("Checkpoints are kept; the same command continues.")


def test_workers_that_failed_again_and_again_are_counted():
    error = ray.train.WorkerGroupError("lost", {0: RuntimeError("gone")})
    assert "fit: the workers failed 4 times, at last with RuntimeError: gone." in failed("fit", error, 4)


def test_an_epoch_is_one_line():
    entry = {"phase": "refine", "epoch": 1, "num_epochs": 4, "seconds": 2.0, "rows_per_second": 1234.5}
    line = progress_line(entry | {"loss": 0.5, "changed": 0.25})
    assert line == "refine   epoch 2/4  loss 0.50000  changed 25.00 %  1,234 rows/s  at most 4 s left"
    assert progress_line(entry | {"num_leaves": 7}).startswith("K = 7: refine   epoch 2/4")
    kmeans = {"phase": "kmeans", "moves": 3, "iterations": 5, "inertia": 12.5, "alpha": 1.0, "scale": 2.0}
    line = progress_line(kmeans | {"top_q": 0.5, "target_top_q": 0.5})
    assert line == "k-means      3 moves, 5 iterations, inertia 12.5; kernel alpha 1, scale 2, mean top q 0.50"
    inside = {"phase": "pretrain", "epoch": 1, "num_epochs": 4, "step": 12_300}
    assert progress_line(inside) == "pretrain epoch 2/4  checkpoint after step 12,300"
    assert progress_line({"phase": "sweep", "k": 5, "seconds": 1.25}) == "K = 5: done in 1.2 s"
