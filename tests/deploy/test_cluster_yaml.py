"""cluster.yaml: what Ray's validator checks, and what it lets pass.

AWS is moto's, in this process: Ray's own code makes the launch configuration from the file, with neither network nor
credentials.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from raydc.config import load_config

ROOT = Path(__file__).resolve().parents[2]
JOB_CONFIG = ROOT / "jobs" / "cluster_imagenet.yaml"
COMMAND_LISTS = ["setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"]
# Seconds from the request of a GPU node to a Ray node, by the comment in the file.
BOOT_SECONDS = 8 * 60


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {n: t for n, t in cluster["available_node_types"].items() if n != cluster["head_node_type"]}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty AWS account, and a home folder for the key pair that Ray makes."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = [aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die]
    with mock_aws():
        yield boto3.client("ec2", region_name="us-west-2")
    for function in cached:
        function.cache_clear()


@pytest.fixture
def in_account(cluster: dict[str, Any], aws: Any) -> dict[str, Any]:
    """cluster.yaml with the ids of a network in the account."""
    vpc = aws.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = aws.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24", AvailabilityZone="us-west-2a")
    group = aws.create_security_group(GroupName="raydc", Description="raydc nodes", VpcId=vpc)
    for node_type in cluster["available_node_types"].values():
        node_type["node_config"]["SubnetIds"] = [subnet["Subnet"]["SubnetId"]]
        node_type["node_config"]["SecurityGroupIds"] = [group["GroupId"]]
    return cluster


def launched(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return what `ray up` would launch: defaults, resources of the instance types, ids."""
    prepared = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(copy.deepcopy(cluster)))
    return aws_config.bootstrap_aws(prepared)


def opened_to_the_world(aws: Any) -> list[str]:
    """Return the names of the security groups with an inbound rule for any address."""
    return [
        group["GroupName"]
        for group in aws.describe_security_groups()["SecurityGroups"]
        for rule in group["IpPermissions"]
        if any(r["CidrIp"] == "0.0.0.0/0" for r in rule["IpRanges"])
    ]


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_refuses_an_unknown_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(cluster))


def test_pools_start_empty_and_their_sum_is_the_ceiling(cluster: dict[str, Any]) -> None:
    pools = workers(cluster)
    for name, pool in pools.items():
        assert 0 == pool["min_workers"] <= pool["max_workers"], name
    assert cluster["max_workers"] == sum(pool["max_workers"] for pool in pools.values())


def test_the_head_takes_no_tasks(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_the_cpu_pool_is_spot_and_the_pools_are_labeled(cluster: dict[str, Any]) -> None:
    pools = workers(cluster)
    assert pools["cpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert {name: pool["labels"] for name, pool in pools.items()} == {
        "cpu_spot": {"raydc-pool": "cpu"},
        "gpu": {"raydc-pool": "gpu"},
    }


def test_nodes_outlive_the_boot_of_the_last_one(cluster: dict[str, Any]) -> None:
    assert cluster["idle_timeout_minutes"] * 60 >= BOOT_SECONDS
    for name, pool in workers(cluster).items():
        assert pool["idle_timeout_s"] >= BOOT_SECONDS, name


def test_no_command_list_is_left_to_rays_defaults(cluster: dict[str, Any]) -> None:
    for name in COMMAND_LISTS:
        assert name in cluster, name
    commands = [c for name in COMMAND_LISTS for c in prepare_config(cluster)[name]]
    assert cluster["setup_commands"]
    assert not [c for c in commands if "ray-wheels" in c or "nightly" in c]


def test_each_pool_installs_one_faiss(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    assert "install_dependencies.py cpu" in " ".join(prepared["worker_setup_commands"])
    gpu = " ".join(prepared["available_node_types"]["gpu"]["worker_setup_commands"])
    assert "install_dependencies.py gpu" in gpu
    assert "install_dependencies.py cpu" not in gpu


def test_shipped_files_exist(cluster: dict[str, Any]) -> None:
    for local in cluster["file_mounts"].values():
        assert local.startswith("~/.ray/") or (ROOT / local).is_file(), local


def test_every_call_carries_the_token_and_every_node_has_it(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = [o.split("=")[1] for o in options if "RAY_AUTH_TOKEN_PATH" in o]
    assert cluster["file_mounts"][path] == "~/.ray/auth_token"


def test_the_dashboard_listens_on_the_head_alone(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])


def test_no_node_is_reachable_from_outside(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    assert "security_group" not in cluster["provider"], "rules there are added to the open one that Ray makes"
    for name, node_type in cluster["available_node_types"].items():
        assert node_type["node_config"]["SecurityGroupIds"], name
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()


def test_nodes_are_ended_not_stopped(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_launching_opens_no_port_and_makes_no_role(in_account: dict[str, Any], aws: Any) -> None:
    nodes = launched(in_account)["available_node_types"]
    assert opened_to_the_world(aws) == []
    assert boto3.client("iam").list_roles()["Roles"] == []
    profiles = {name: node["node_config"]["IamInstanceProfile"]["Arn"].split("/")[-1] for name, node in nodes.items()}
    assert profiles == {"head": "raydc-head", "cpu_spot": "raydc-worker", "gpu": "raydc-worker"}


def test_without_a_security_group_ray_opens_ssh_to_the_world(in_account: dict[str, Any], aws: Any) -> None:
    # The reason for SecurityGroupIds in the file. Should Ray change this, provider.security_group would do.
    for node_type in in_account["available_node_types"].values():
        del node_type["node_config"]["SecurityGroupIds"]
    launched(in_account)
    assert opened_to_the_world(aws) == ["ray-autoscaler-raydc"]


def test_the_job_fits_the_pools(in_account: dict[str, Any]) -> None:
    if not JOB_CONFIG.exists():
        pytest.skip(f"{JOB_CONFIG.name} is not there yet")
    config = load_config(JOB_CONFIG)
    pools = workers(launched(in_account))
    training = places(pools, cpus=config.fit.cpus_per_worker, gpus=int(config.fit.use_gpu))
    assert sum(training.values()) >= config.fit.num_workers
    assert any(places(pools, cpus=config.assign.cpus_per_actor, gpus=int(config.assign.use_gpu)).values())


def places(pools: dict[str, dict[str, Any]], *, cpus: int, gpus: int) -> dict[str, int]:
    """Return how many bundles fit each pool, one CPU of each node left free for the tasks that read."""
    return {name: pool["max_workers"] * per_node(pool["resources"], cpus, gpus) for name, pool in pools.items()}


def per_node(resources: dict[str, int], cpus: int, gpus: int) -> int:
    by_cpu = (resources["CPU"] - 1) // cpus
    return min(by_cpu, resources.get("GPU", 0) // gpus) if gpus else by_cpu


def test_a_bundle_larger_than_a_node_has_no_place(in_account: dict[str, Any]) -> None:
    pools = workers(launched(in_account))
    assert places(pools, cpus=8, gpus=1) == {"cpu_spot": 0, "gpu": 8}
    assert places(pools, cpus=16, gpus=1) == {"cpu_spot": 0, "gpu": 0}
    assert places(pools, cpus=31, gpus=0) == {"cpu_spot": 16, "gpu": 0}
