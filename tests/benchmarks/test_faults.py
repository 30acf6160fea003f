"""A run loses no row and doubles none, whatever dies: eight faults of docs/faults.md, on two Ray nodes.

Faults that one run outlives one after the other are injected into the same run: most of the time of a case is the start
of processes.
"""

import pytest

from benchmarks import faults
from benchmarks.fault_rig import Driver, Run, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

# So many leaves that the merge has dozens of cells, and the network of every run: one unbroken run is enough.
KINDS = {"disk": {"cluster": {"num_leaves": 64}, "merge": {"levels": [10]}, "pretrain": {"num_epochs": 4}}}


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        # Train fetches a report at this pace, and a worker waits for it before its next epoch.
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        rig = faults.Rig(tmp_path_factory.mktemp("faults"), KINDS)
        yield rig
        rig.close()


def dies_and_the_next_meets_a_bad_slice(rig: faults.Rig, run: Run, driver: Driver, stage: str) -> None:
    """Kill the driver while it labels, and break the last files once the next one is about to go on."""
    faults.driver_dies(rig, run, driver, stage)
    following = run.start()
    until(lambda: "merge: done earlier" in following.text(), following, "what is left")
    faults.bad_slice(rig, run, following, stage)


def outlived(rig: faults.Rig, fault: str, stage: str, inject: faults.Inject) -> int:
    """Inject faults, from a stage on, into a run; check what it left, and return how many commands it took."""
    row = faults.inject(rig, faults.Case(fault, stage, inject))
    assert faults.wrong(row) == []
    assert row["rejects"] == 48 and row["labels"] == row["rows_in"] - 48
    return row["commands"]


def test_no_row_is_lost_or_doubled_when_a_training_worker_is_killed(rig):
    assert outlived(rig, "training worker SIGKILL", "fit refine", faults.training_worker(1)) == 1


def test_one_command_outlives_a_lost_cell_a_second_command_a_lost_actor_and_a_lost_node(rig):
    inject = faults.in_turn(
        faults.at("merge", faults.cell_task),
        faults.at("assign", faults.turned_away),
        faults.at("assign", faults.assign_actor(1)),
        faults.at("assign", faults.node),
    )
    # The second command is the one that is turned away.
    assert outlived(rig, "cell, second submission, actor, node", "merge", inject) == 2


def test_the_same_command_goes_on_after_a_killed_driver_and_after_a_bad_slice(rig):
    assert outlived(rig, "driver SIGKILL, exception in a slice", "assign", dies_and_the_next_meets_a_bad_slice) == 3


def test_a_driver_that_was_stopped_and_taken_over_writes_nothing_when_it_wakes(rig):
    assert outlived(rig, "driver stopped, taken over, woken", "publish", faults.stopped_driver) == 2
