"""A run on a cluster that starts from zero nodes: it grows for the work, loses a node, and gives all back."""

import os

import pytest

from benchmarks import scale


@pytest.mark.skipif("RAYDC_TEST_AUTOSCALER" not in os.environ, reason="six minutes; set RAYDC_TEST_AUTOSCALER=1")
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_grows_from_zero_nodes_to_all_loses_one_and_leaves_none(tmp_path):
    found = scale.grow_and_shrink(tmp_path)
    assert found["code"] == 0, found["events"]
    assert found["most_nodes"] == 3 and found["lost"], found["events"]
    assert found["labels"] + found["rejects"] == found["rows_in"] and found["rejects"] == 2 * scale.NUM_FILES
    assert found["gone"], found["events"]
    assert found["gpu"], found["events"]
    if not found["gone_again"]:
        pytest.xfail("the node with a GPU stays for more than two minutes after a fit that was stopped as it started")
