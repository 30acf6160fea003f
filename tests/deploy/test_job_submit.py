"""`ray start --head` and `ray job submit`, for real, in processes of their own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.small_job import SEED, SMALL, read_labels, settings

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_port():
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head_with_dashboard():
    """Start a head node with a dashboard; yield its address and environment; stop it by its pid."""
    from ray.job_submission import JobSubmissionClient

    # A short path of our own: Ray's sockets live below it, and a socket's path has 107 characters at most.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", PACE)}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{RAY.parent}:{os.environ['PATH']}"}
    port, dashboard = free_port(), free_port()
    command = [str(RAY), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--num-cpus=3", "--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += ["--include-dashboard=true", "--dashboard-agent-listen-port=0"]
    with open(f"{folder}/start.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                JobSubmissionClient(address).list_jobs()
                break
            except (ConnectionError, RuntimeError):
                assert process.poll() is None and time.monotonic() < deadline, Path(f"{folder}/start.log").read_text()
                time.sleep(0.5)
        yield address, environment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# Seconds between two reports that Train fetches; a worker waits for it before its next epoch.
PACE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"


def submit(head, output, *options, pace):
    """Submit the small job, writing to a folder, and return what was printed."""
    address, environment = head
    command = [str(RAY), "job", "submit", "--address", address, "--working-dir", str(ROOT), *options]
    command += ["--runtime-env-json", json.dumps({"env_vars": {PACE: str(pace)}}), "--"]
    command += ["python", "jobs/cluster_imagenet.py", "--config", "jobs/digits.yaml", "--run-id", "stopped"]
    overrides = {f"{section}.{name}": value for section, values in SMALL.items() for name, value in values.items()}
    overrides |= {"output": str(output), "seed": SEED, "lease.heartbeat_seconds": 0.5}
    # In jobs/digits.yaml it is another one.
    overrides["refine.learning_rate"] = settings("in", output).refine.learning_rate
    for name, value in overrides.items():
        command += ["--set", f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_job_that_was_stopped_gives_its_lease_back_and_the_same_job_finishes_it(
    head_with_dashboard, on_one_worker, tmp_path
):
    address, environment = head_with_dashboard
    # An epoch takes two seconds: the stop comes in the middle.
    submit(head_with_dashboard, tmp_path, "--no-wait", "--submission-id", "to-be-stopped", pace=2)
    beat = tmp_path / "stopped" / "lease" / "00000001.beat.json"
    deadline = time.monotonic() + 300
    while not (beat.exists() and "pretrain epoch" in json.loads(beat.read_text())["progress"].get("line", "")):
        assert time.monotonic() < deadline, beat.read_text() if beat.exists() else "no heartbeat"
        time.sleep(0.2)
    stop = [str(RAY), "job", "stop", "--address", address, "to-be-stopped"]
    done = subprocess.run(stop, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert "was stopped" in done.stdout + done.stderr
    last = json.loads(beat.read_text())
    assert last["released"] == "stopped by SIGTERM" and last["progress"]["stage"] == "fit"
    logs = [str(RAY), "job", "logs", "--address", address, "to-be-stopped"]
    text = subprocess.run(logs, env=environment, capture_output=True, text=True, timeout=100, check=True).stdout
    assert f"fit: stopped by SIGTERM; `raydc resume {tmp_path}/stopped` continues" in text
    run = tmp_path / "stopped"
    assert not (run / "_MANIFEST.json").exists()

    text = submit(head_with_dashboard, tmp_path, pace=0.2)
    assert "succeeded" in text and "run         stopped, published" in text
    assert "profile: done earlier, skipped" in text
    assert json.loads((run / "_MANIFEST.json").read_text())["rows"] == {"input": 1797, "labels": 1797, "rejects": 0}
    history = json.loads((run / "metrics.json").read_text())["fit"]["history"]
    assert [h["epoch"] for h in history if h["phase"] == "pretrain"] == list(range(20))
    # By the same settings as a run that was let alone, in another cluster.
    broken, whole = (read_labels(folder)["leaf"].to_numpy() for folder in (run, Path(on_one_worker.root)))
    print(f"labels equal: {(broken == whole).mean():.4f}")
    assert (broken == whole).mean() >= 0.99
