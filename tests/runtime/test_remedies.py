"""What helps against a failure of the workers: Ray's own errors, as they come."""

import pytest
from ray.exceptions import OutOfDiskError, OutOfMemoryError

from raydc.runtime.remedies import remedy

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
