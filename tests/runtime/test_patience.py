"""How long workers wait for one another, and what is said when that was too short."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from raydc.config import Config
from raydc.runtime.patience import RAY_DEFAULT_SECONDS, collective_timeout, waited_flop
from raydc.runtime.remedies import remedy
from tests import shards
from tests.core.ranks import run_ranks


def config(**sections) -> Config:
    return shards.settings("data", **({"fit": {"objective": "dec"}} | sections))


def test_a_small_fit_waits_as_long_as_ray_does():
    small = config(cluster={"num_leaves": 10}, fit={"objective": "kmeans"})
    assert collective_timeout(small, 1000, 8) == RAY_DEFAULT_SECONDS == 1800


def test_the_start_that_was_aborted_again_and_again_has_its_time():
    # 10,000 leaves by five restarts on a million rows of 768: 49 minutes on 4 CPUs at 165 GFLOP/s each.
    large = config(
        cluster={"num_leaves": 10_000, "start": "restarts", "init_rows": 1_000_000},
        fit={"objective": "kmeans", "cpus_per_worker": 4},
    )
    assert waited_flop(large, 10**9, 768) >= 5 * 25 * 2 * 1e6 * 1e4 * 768
    assert collective_timeout(large, 10**9, 768) > 2 * 49 * 60
    # Twice the CPUs need half the time.
    twice = config(cluster=large.cluster.__dict__, fit={"objective": "kmeans", "cpus_per_worker": 8})
    assert collective_timeout(twice, 10**9, 768) == pytest.approx(collective_timeout(large, 10**9, 768) / 2, abs=1)


def test_the_baseline_counts_where_it_is_the_longer_work():
    wide = config(
        cluster={"num_leaves": 10_000, "start": "restarts", "init_rows": 1}, evaluate={"baseline_rows": 10**7}
    )
    narrow = config(cluster={"num_leaves": 10_000, "start": "restarts", "init_rows": 1}, evaluate={"baseline_rows": 1})
    assert waited_flop(wide, 10**8, 768) > 50 * waited_flop(narrow, 10**8, 768)


def test_a_tree_costs_less_than_restarts_and_grows_with_the_leaves():
    def flop(start: str, leaves: int) -> float:
        of = config(cluster={"num_leaves": leaves, "start": start}, fit={"objective": "kmeans"})
        return waited_flop(of, 10**9, 768)

    assert flop("tree", 1000) < flop("tree", 10_000) < flop("restarts", 10_000)
    assert flop("tree", 10_000) < flop("restarts", 10_000) / 10


def test_the_largest_number_of_leaves_of_a_sweep_counts():
    small = config(cluster={"num_leaves": 10}, fit={"objective": "kmeans"})
    assert waited_flop(small, 10**9, 768, 10_000) > waited_flop(small, 10**9, 768)


def waits_in_vain(ranks):
    """Return what rank 0 is told when rank 1 comes too late."""
    group = dist.new_group(timeout=timedelta(seconds=0.5), backend="gloo")
    if ranks.rank == 1:
        time.sleep(2)
        return None
    with pytest.raises(RuntimeError) as late:
        dist.all_reduce(torch.zeros(1), group=group)
    return str(late.value)


def test_a_wait_that_was_too_long_says_what_shortens_it():
    said = run_ranks(2, waits_in_vain)[0]
    assert "fit.cpus_per_worker" in remedy("fit", RuntimeError(said)), said
    nccl = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=BROADCAST) ran for 1800000 ms"
    assert "cluster.init_rows" in remedy("fit", nccl)
    assert remedy("assign", nccl) == ""
