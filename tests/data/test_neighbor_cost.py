"""The bound on the search for nearest neighbors: where it lies, and that a run is refused before it starts."""

import pytest

from raydc.config import Config
from raydc.data.inspection import inspect
from raydc.data.neighbor_cost import NeighborCost
from raydc.storage.lake import Lake
from tests import shards


def config(folder="data", objective="icon", **sections) -> Config:
    return shards.settings(folder, **({"fit": {"objective": objective}} | sections))


@pytest.mark.parametrize(("slices", "mib_a_task"), [(500, 0.37), (2000, 0.76), (8000, 2.4)])
def test_the_memory_of_the_driver_is_what_was_measured(slices, mib_a_task):
    cost = NeighborCost(slices, 10**6, 768)
    assert cost.driver_bytes / slices / 2**20 == pytest.approx(mib_a_task, rel=0.07)


def test_traffic_and_fetches_by_hand():
    cost = NeighborCost(1000, 10**9, 768)
    assert (cost.requests, cost.traffic_bytes) == (10**6, 1000 * 10**9 * (4 * 768 + 8))


def test_ten_million_rows_in_some_hundred_slices_are_allowed_and_a_billion_are_not():
    assert NeighborCost(500, 10**7, 768).problems(config()) == []
    (traffic,) = NeighborCost(1000, 10**9, 768).problems(config())
    assert "up to 3,080 TB" in traffic and "fit.max_rows=32467532 at most" in traffic
    # What it names is allowed, and one row more is not.
    assert NeighborCost(1000, 32_467_532, 768).problems(config()) == []
    assert NeighborCost(1000, 32_467_533, 768).problems(config())


def test_too_many_slices_are_told_with_what_to_do():
    (slices,) = NeighborCost(2001, 10**6, 8).problems(config())
    for part in ("2,001 slices", "neighbors.max_slices=2,000", "4,004,001 fetches", "input.slice_bytes", "dec"):
        assert part in slices
    assert NeighborCost(2000, 10**6, 8).problems(config()) == []
    raised = config(neighbors={"max_slices": 2001})
    assert NeighborCost(2001, 10**6, 8).problems(raised) == []


def test_a_run_is_refused_when_its_input_is_looked_at(tmp_path):
    for number in range(3):
        rows = shards.vectors(20, seed=number) + 1
        shards.write(tmp_path / f"part-{number}.parquet", shards.rows(rows, first_id=20 * number))
    shards.write(tmp_path / "part-3.parquet", shards.rows(shards.vectors(20)[:0]))
    two, three = ({"num": 4, "max_slices": n} for n in (2, 3))
    leaves = {"num_leaves": 4}
    refused = inspect(config(tmp_path, cluster=leaves, neighbors=two), Lake())[2]
    assert len(refused) == 1 and "3 slices" in refused[0]
    # A file without rows is no slice to search.
    assert inspect(config(tmp_path, cluster=leaves, neighbors=three), Lake())[2] == []
    assert inspect(config(tmp_path, "dec", cluster=leaves, neighbors=two), Lake())[2] == []


def test_the_bounds_change_no_result():
    assert config(neighbors={"max_slices": 9}).fingerprint("fit") == config().fingerprint("fit")
