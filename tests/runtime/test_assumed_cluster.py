"""A plan for a cluster that is only described: room, gradients, time and cost, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from raydc.cli import main
from raydc.errors import ConfigError
from raydc.runtime.assumed_cluster import AssumedCluster, read_cluster
from raydc.runtime.plan import make_plan
from tests import shards
from tests.runtime.test_plan import config, profile

GPU = {"name": "gpu", "count": 2, "cpus": 8, "gpus": 1, "memory_gib": 64, "gpu_tflops": 20, "price_per_hour": 3.0}
CPU = {"name": "cpu", "count": 4, "cpus": 16, "memory_gib": 32, "gbit_per_second": 5, "price_per_hour": 0.5}


def cluster(*nodes) -> AssumedCluster:
    return AssumedCluster.model_validate({"nodes": list(nodes)})


def lines(of, nodes) -> list[str]:
    return cluster(*nodes).lines(of, make_plan(of, profile()))


def test_the_nodes_are_added_up():
    told = lines(config(), (GPU, CPU))
    assert told[0] == "cluster     2 gpu, 4 cpu: 80 CPUs, 2 GPUs, 256 GiB; 8 an hour"
    assert told[-1].startswith("cost        at least ")


def test_workers_without_room_are_told_with_how_many_there_are():
    three = config(fit={"num_workers": 3, "use_gpu": True})
    assert "TOO SMALL: 3 training worker(s) of 1 CPU, a GPU" in lines(three, (GPU, CPU))[1]
    assert "room for 2" in lines(three, (GPU, CPU))[1]
    assert not any("TOO SMALL" in line for line in lines(three, (GPU | {"count": 3},)))
    # Memory counts as well: a worker of 300 GiB has no room on a node of 64.
    plan = replace(make_plan(config(), profile()), worker_bytes=300 * 2**30)
    assert "TOO SMALL" in cluster(GPU, CPU).lines(config(), plan)[1]


def test_time_and_cost_by_hand():
    of = config(fit={"objective": "kmeans", "use_gpu": True})
    plan = replace(
        make_plan(of, profile()), fit_flops=20e12 * 3600, assign_flops=24e9 * 3600, input_bytes=0, cpu_rate=1e9
    )
    # An hour on the one GPU, and 24e9 FLOP/s of the 24 CPUs for another.
    (told,) = [line for line in cluster(GPU, CPU | {"count": 1, "cpus": 8}).lines(of, plan) if "cost" in line]
    assert told.startswith("cost        at least 13.00: fit 60 min, reading 1 s, assign and neighbors 60 min")


def test_the_rate_of_a_gpu_is_not_guessed():
    of = config(fit={"use_gpu": True})
    unknown = {name: value for name, value in GPU.items() if name != "gpu_tflops"}
    assert lines(of, (unknown,))[-1] == "cost        unknown: give gpu_tflops of the nodes with GPUs"


def test_gradients_go_over_the_network_of_the_file():
    of = config(fit={"objective": "dec", "num_workers": 2, "use_gpu": True})
    told = [line for line in lines(of, (GPU | {"gbit_per_second": 40},)) if line.startswith("gradients")]
    assert len(told) == 2 and all("at 40 Gbit/s" in line for line in told)


@pytest.mark.parametrize("text", ["nodes: []", "nodes: [{name: a}]", "[", "other: 1", "nodes: [{name: a, cpus: x}]"])
def test_a_file_that_describes_no_cluster_is_refused(text, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="--assume-cluster"):
        read_cluster(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_cluster(tmp_path / "none.yaml")


def test_the_command_prints_it_and_only_with_a_dry_run(tmp_path, capsys):
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(shards.vectors(50)))
    path = Path(tmp_path / "cluster.yaml")
    path.write_text("nodes: [{name: big, cpus: 64, memory_gib: 256, price_per_hour: 2}]")
    settings = [f"input.path={tmp_path / 'in'}", f"output={tmp_path / 'runs'}", "cluster.num_leaves=4"]
    given = ["run", *(part for s in settings for part in ("--set", s)), "--assume-cluster", str(path)]
    main([*given, "--dry-run"])
    assert "cluster     1 big: 64 CPUs, 0 GPUs, 256 GiB; 2 an hour" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(given)
    assert "Add --dry-run" in capsys.readouterr().err
