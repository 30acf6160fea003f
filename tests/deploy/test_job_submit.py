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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_port():
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """Start a head node with a dashboard; yield its address and environment; stop it by its pid."""
    # A short path of our own: Ray's sockets live below it, and a socket's path has 107 characters at most.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    # With Train's own two seconds between reports: a job has to be stopped in the middle of its epochs.
    unwanted = ("RAY_ADDRESS", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
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
        while subprocess.run(
            [str(RAY), "job", "list", "--address", address], env=environment, capture_output=True, check=False
        ).returncode:
            assert process.poll() is None and time.monotonic() < deadline, Path(f"{folder}/start.log").read_text()
            time.sleep(1)
        yield address, environment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def submit(head, output, run_id, *options):
    """Submit a job that writes to a folder and return what was printed."""
    address, environment = head
    command = [str(RAY), "job", "submit", "--address", address, "--working-dir", str(ROOT), *options, "--"]
    command += ["python", "jobs/cluster_imagenet.py", "--config", "jobs/digits.yaml", "--run-id", run_id]
    # An epoch takes two seconds, in which Train fetches one report: a stop comes in the middle.
    overrides = [f"output={output}", "pretrain.num_epochs=20", "pretrain.batch_rows=16", "refine.num_epochs=2"]
    for override in (*overrides, "cluster.num_restarts=2", "lease.heartbeat_seconds=0.5"):
        command += ["--set", override]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def unbroken(head, tmp_path_factory):
    """The folder of a submitted run that was let alone, and what was printed."""
    output = tmp_path_factory.mktemp("runs")
    text = submit(head, output, "unbroken")
    return output / "unbroken", text


@pytest.mark.slow
def test_a_submitted_job_succeeds_and_publishes(unbroken):
    run, text = unbroken
    assert "succeeded" in text and "run         unbroken, published" in text
    manifest = json.loads((run / "_MANIFEST.json").read_text())
    assert manifest["rows"] == {"input": 1797, "labels": 1797, "rejects": 0}


def read_labels(run):
    """Return the leaf of every row of a run folder, by id."""
    files = sorted((run / "labels").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files]).sort_by("id")["leaf"].to_numpy()


@pytest.mark.slow
def test_a_job_that_was_stopped_gives_its_lease_back_and_the_same_job_finishes_it(head, unbroken, tmp_path):
    address, environment = head
    submit(head, tmp_path, "stopped", "--no-wait", "--submission-id", "to-be-stopped")
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
    assert not (tmp_path / "stopped" / "_MANIFEST.json").exists()

    text = submit(head, tmp_path, "stopped")
    assert "profile: done earlier, skipped" in text and "run         stopped, published" in text
    history = json.loads((tmp_path / "stopped" / "metrics.json").read_text())["fit"]["history"]
    assert [h["epoch"] for h in history if h["phase"] == "pretrain"] == list(range(20))
    broken, whole = read_labels(tmp_path / "stopped"), read_labels(unbroken[0])
    print(f"labels equal: {(broken == whole).mean():.4f}")
    assert (broken == whole).mean() >= 0.99
