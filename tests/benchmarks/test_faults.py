"""A run loses no row and doubles none, whatever dies: eight faults of docs/faults.md, on two Ray nodes."""

import pytest

from benchmarks import faults

TOLD = {
    "training worker SIGKILL/fit refine",
    "assign actor SIGKILL/assign",
    "node SIGKILL/assign",
    "driver SIGKILL/assign",
    "exception in a slice/assign",
    "second submission/assign",
    "driver stopped, taken over, woken/publish",
    "cell task SIGKILL/merge",
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = faults.Rig(tmp_path_factory.mktemp("faults"))
    yield rig
    rig.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in faults.CASES if c.name in TOLD])
def test_no_row_is_lost_or_doubled(rig, case):
    row = faults.inject(rig, case)
    assert faults.wrong(row) == []
    assert row["rejects"] == 48 and row["labels"] == row["rows_in"] - 48
    # Who lives through the fault needs no second command.
    died = {"driver SIGKILL", "exception in a slice", "second submission", "driver stopped, taken over, woken"}
    assert row["commands"] == (2 if case.fault in died else 1)
