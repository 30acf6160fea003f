"""The Kubernetes manifest: keys that exist, versions that agree, a job that can be placed and tried again."""

import argparse
import copy
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from raydc.cli import MOST_RETRIES, add_run_arguments
from raydc.config import load_config

ROOT = Path(__file__).resolve().parents[2]
JOB_CONFIG = ROOT / "jobs" / "cluster_imagenet.yaml"


def closed(required: list[str], **properties: dict) -> dict:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXT_MAP = {"type": "object", "additionalProperties": {"type": "string"}}

RESOURCE_LIST = {
    "type": "object",
    "properties": {
        "cpu": {"type": "string", "pattern": r"^\d+$"},
        "memory": {"type": "string", "pattern": r"^\d+Gi$"},
        "nvidia.com/gpu": {"type": "string", "pattern": r"^\d+$"},
    },
    "required": ["cpu", "memory"],
    "additionalProperties": False,
}
CONTAINER = closed(
    ["name", "image", "resources"],
    name=TEXT,
    image=TEXT,
    env={"type": "array", "items": closed(["name", "value"], name=TEXT, value=TEXT)},
    ports={"type": "array", "items": closed(["containerPort", "name"], containerPort=COUNT, name=TEXT)},
    resources=closed(["limits", "requests"], limits=RESOURCE_LIST, requests=RESOURCE_LIST),
)
POD = closed(
    ["spec"],
    spec=closed(
        ["containers", "restartPolicy", "serviceAccountName"],
        serviceAccountName=TEXT,
        restartPolicy={"const": "Never"},
        nodeSelector=TEXT_MAP,
        tolerations={"type": "array", "items": closed(["key", "operator"], key=TEXT, operator=TEXT, effect=TEXT)},
        containers={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
    ),
)
# The fields of ray.io/v1 RayJob that the manifest uses, as the operator's own schema has them. That one is 1.4 MB.
RAYJOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}),
    spec=closed(
        ["entrypoint", "rayClusterSpec", "backoffLimit", "shutdownAfterJobFinishes"],
        entrypoint=TEXT,
        backoffLimit=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        rayClusterSpec=closed(
            ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
            rayVersion=TEXT,
            authOptions=closed(["mode"], mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=closed(
                [],
                version={"enum": ["v1", "v2"]},
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
                idleTimeoutSeconds=COUNT,
            ),
            headGroupSpec=closed(["template"], rayStartParams=TEXT_MAP, template=POD),
            workerGroupSpecs={
                "type": "array",
                "minItems": 1,
                "items": closed(
                    ["groupName", "minReplicas", "maxReplicas", "template"],
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    labels=TEXT_MAP,
                    rayStartParams=TEXT_MAP,
                    template=POD,
                ),
            },
        ),
    ),
)


@pytest.fixture
def job() -> dict:
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


def groups(job: dict) -> dict[str, dict]:
    return {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def limits(group: dict) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def pinned_ray() -> str:
    found = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_the_manifest_uses_only_known_fields(job: dict) -> None:
    jsonschema.validate(job, RAYJOB)


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        (["spec"], "backofLimit", "backoffLimit"),
        (["spec", "rayClusterSpec", "autoscalerOptions"], "idleTimeoutMinutes", "idleTimeoutSeconds"),
        (["spec", "rayClusterSpec", "headGroupSpec"], "rayStartParam", "rayStartParams"),
    ],
)
def test_the_schema_catches_a_misspelt_field(job: dict, path: list[str], wrong: str, right: str) -> None:
    broken = copy.deepcopy(job)
    node = broken
    for key in path:
        node = node[key]
    node[wrong] = node.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        jsonschema.validate(broken, RAYJOB)


def test_every_file_names_the_ray_version_that_is_pinned(job: dict) -> None:
    version = pinned_ray()
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
    for name in ["cluster.yaml", "deploy/Dockerfile"]:
        assert set(re.findall(r"rayproject/ray:([\d.]+)-py311", (ROOT / name).read_text())) == {version}, name


def test_a_lost_head_is_submitted_again_with_the_same_run_id(job: dict) -> None:
    assert job["spec"]["backoffLimit"] >= 1
    assert re.search(r"--run-id \S+", job["spec"]["entrypoint"])


def test_what_may_pass_is_tried_again_inside_the_cluster(job: dict) -> None:
    # No exit code of the driver reaches KubeRay.
    command = job["spec"]["entrypoint"].split()
    assert 1 <= int(command[command.index("--retries") + 1]) <= MOST_RETRIES
    assert "podFailurePolicy" not in RAYJOB["properties"]["spec"]["properties"]


def test_the_command_of_the_manifest_is_one_that_raydc_takes(job: dict) -> None:
    words = job["spec"]["entrypoint"].split()[2:]
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    options = parser.parse_args(words)
    assert options.run_id == "imagenet-1" and options.retries >= 1


def test_the_entrypoint_names_files_of_the_repository(job: dict) -> None:
    named = re.findall(r"/home/ray/raydc/(\S+)", job["spec"]["entrypoint"])
    assert named == ["jobs/cluster_imagenet.py", "jobs/cluster_imagenet.yaml"]
    for name in named:
        if not (ROOT / name).exists():
            pytest.skip(f"{name} is not there yet")


def test_every_call_carries_the_token(job: dict) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_head_takes_no_tasks(job: dict) -> None:
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_groups_start_empty_and_may_grow(job: dict) -> None:
    assert set(groups(job)) == {"cpu", "gpu"}
    for name, group in groups(job).items():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert group["labels"] == {"raydc-pool": name}
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]


def test_gpu_images_go_where_the_gpus_are(job: dict) -> None:
    for name, group in groups(job).items():
        assert group["template"]["spec"]["containers"][0]["image"].endswith(f"-{name}")
        assert ("nvidia.com/gpu" in limits(group)) == (name == "gpu")


def test_the_training_group_fits_the_worker_groups(job: dict) -> None:
    if not JOB_CONFIG.exists():
        pytest.skip(f"{JOB_CONFIG.name} is not there yet")
    fit = load_config(JOB_CONFIG).fit
    places = sum(
        group["maxReplicas"] * places_in(limits(group), cpus=fit.cpus_per_worker, gpus=int(fit.use_gpu))
        for group in groups(job).values()
    )
    assert places >= fit.num_workers


def places_in(limits: dict[str, str], *, cpus: int, gpus: int) -> int:
    """Return how many bundles fit a pod, one CPU of which stays free for reading."""
    by_cpu = (int(limits["cpu"]) - 1) // cpus
    return min(by_cpu, int(limits.get("nvidia.com/gpu", 0)) // gpus) if gpus else by_cpu


@pytest.mark.parametrize("extra", ["cpu", "gpu", "gpu-cuvs"])
def test_a_node_gets_the_pinned_dependencies_and_one_faiss(extra: str) -> None:
    command = [sys.executable, str(ROOT / "deploy" / "install_dependencies.py"), extra, str(ROOT), "--print"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert words[words.index("-c") + 1] == str(ROOT / "constraints.txt")
    assert [word for word in words if word.startswith("faiss")] == [f"faiss-{extra}>=1.15"]
    assert any(word.startswith("torch") for word in words)
