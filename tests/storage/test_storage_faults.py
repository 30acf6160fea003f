"""Writes that are whole or not there: killed writers, full disks, folders that may not be written."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydc.data.footers import read_footers
from raydc.data.slices import Column, InputSpec, plan_slices
from raydc.errors import DataError, StageError
from raydc.labeling.label_slice import Labeling, label_slice
from raydc.storage.lake import Lake, is_staged
from tests import shards

ROOT = Path(__file__).resolve().parents[2]


def visible(folder) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and not is_staged(str(p)))


@pytest.mark.parametrize("moment", ["before the end", "while it writes"])
def test_a_killed_writer_leaves_nothing_that_a_reader_would_trust(tmp_path, moment):
    script = f"""
import os, signal, sys, time
import pyarrow as pa, pyarrow.parquet as pq
from raydc.storage.lake import Lake
from tests import shards
lake = Lake()
lake.write_bytes({str(tmp_path / "old")!r}, b"old")
with lake.staged({str(tmp_path / "labels.parquet")!r}) as path, lake.staged({str(tmp_path / "old")!r}) as other:
    other.write_bytes(b"new, but never whole")
    table = shards.rows(shards.vectors(1000, dim=64))
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(20):
            writer.write_table(table)
        if {moment!r} == "while it writes":
            print("now", flush=True)
            time.sleep(60)
    print("now", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"now\n"
        writer.send_signal(signal.SIGKILL)
    assert visible(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"
    with pytest.raises(DataError, match="no Parquet file there"):
        Lake().list_parquet(str(tmp_path))
    # What is left is named so that publish removes it.
    assert len([p for p in tmp_path.iterdir() if is_staged(str(p))]) == 2


@pytest.mark.s3
def test_a_writer_killed_in_an_upload_leaves_no_object(bucket, tmp_path, s3_endpoint):
    script = f"""
import sys
from raydc.storage.lake import Lake
lake = Lake(endpoint_url={s3_endpoint!r}, region="us-east-1")
fs, path = lake.file_system("{bucket}/large")
open({str(tmp_path / "large")!r}, "wb").write(bytes(400 * 2**20))
print("now", flush=True)
fs.put_file({str(tmp_path / "large")!r}, path, chunksize=5 * 2**20, max_concurrency=1)
print("done", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"now\n"
        time.sleep(0.5)
        writer.send_signal(signal.SIGKILL)
        assert writer.stdout.read() == b""
    assert Lake().find(bucket) == []
    assert not Lake().exists(f"{bucket}/large")


@pytest.fixture
def tiny(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def labeling(folder, output) -> tuple[Labeling, list]:
    x, _ = shards.near_corners(60_000)
    shards.write(folder / "a.parquet", shards.rows(x))
    spec = InputSpec(columns=(Column(name="embedding", dim=2, dtype="float32"),), id_column="id", id_type="int64")
    slices = plan_slices(read_footers(Lake(), Lake().list_parquet(str(folder))), 2**30)
    return shards.corner_labeling(Lake(), str(output), spec), slices


def test_a_full_disk_names_its_folder_and_the_run_goes_on_when_there_is_room(tmp_path, tiny):
    job, (part,) = labeling(tmp_path / "in", tiny)
    (tiny / "ballast").write_bytes(bytes(900 * 1024))
    with pytest.raises(StageError, match=rf"storage {tiny}/labels: no space left to write .*Free space there, or use"):
        label_slice(job, part)
    assert visible(tiny) == ["ballast"]
    assert [p for p in tiny.rglob("*") if is_staged(str(p))] == []
    (tiny / "ballast").unlink()
    # 60,000 rows of labels need more than one MiB: give it a disk of its own size, in the same place.
    subprocess.run(["mount", "-o", "remount,size=16m", str(tiny)], check=True)
    assert label_slice(job, part).labels == 60_000
    assert pq.read_metadata(tiny / "labels" / "a.parquet").num_rows == 60_000


def test_a_full_disk_is_told_for_every_kind_of_write(tiny):
    lake = Lake()
    body = np.random.default_rng(0).bytes(2 * 2**20)
    for call in (lake.write_bytes, lake.create):
        with pytest.raises(StageError, match=rf"storage {tiny}: no space left to write"):
            call(str(tiny / "a"), body)
    assert list(tiny.iterdir()) == []


def test_a_full_disk_keeps_what_pyarrow_was_to_replace(tiny):
    # Ray Train writes its list of checkpoints like this, and goes on from it.
    filesystem, path = Lake().arrow_file_system(str(tiny / "list.json"))
    body = np.random.default_rng(0).bytes(2 * 2**20)
    with filesystem.open_output_stream(path) as out:
        out.write(b"whole")
    with pytest.raises(OSError, match="No space left on device"), filesystem.open_output_stream(path) as out:
        out.write(body[:1000])
        out.write(body)
    assert [(p.name, p.read_bytes()) for p in tiny.iterdir()] == [("list.json", b"whole")]


def test_a_file_beyond_the_limit_of_its_size_is_told_like_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StageError, match=rf"storage {tmp_path}: no space left to write .*File too large"):
            Lake().write_bytes(str(tmp_path / "a"), bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_a_full_folder_for_temporary_files_is_told_with_the_variable_that_moves_it(bucket, tiny, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tiny))
    body = np.random.default_rng(0).bytes(2 * 2**20)
    with (
        pytest.raises(StageError, match=rf"storage {tiny}: no space left to write .*let TMPDIR name a larger folder"),
        Lake().staged(f"{bucket}/a") as path,
    ):
        path.write_bytes(body)
    assert Lake().find(bucket) == []
    assert list(tiny.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StageError, match=rf"storage {tmp_path}/d: may not be written .*Give this user the right"):
        Lake().write_bytes(str(tmp_path / "d" / "a"), b"1")


def test_an_input_that_may_not_be_read_is_not_taken_for_an_output(tmp_path):
    with pytest.raises(PermissionError), Lake().staged(str(tmp_path / "out" / "a")):
        raise PermissionError(13, "Permission denied", "/in/part.parquet")


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(ray_cluster, digits, tiny):
    from raydc import pipeline
    from raydc.config import parse_config

    # A checkpoint takes about half of the disk, and the one before is kept until the next is whole.
    config = parse_config(
        {
            "input": {"path": str(digits), "label_column": "label"},
            "output": str(tiny),
            "preprocess": {"method": "scale"},
            "autoencoder": {"hidden_dims": [128, 128], "latent_dim": 5},
            "pretrain": {"num_epochs": 4, "batch_rows": 128},
            "cluster": {"num_leaves": 10, "num_restarts": 2},
            "fit": {"objective": "autoencoder", "precision": "float32", "max_failures": 0},
            "merge": {"levels": [3]},
            "assign": {"num_actors": 1},
            "evaluate": {"map_rows": 100},
        }
    )
    # Of a worker, which writes its checkpoint, and Ray Train's controller, which notes the one before, either may be
    # the first to find the disk full.
    who = r"fit: (the workers failed 1 times, at last|Ray Train's controller failed) with OSError: "
    with pytest.raises(StageError, match=who + ".*No space left on device.* A disk is full: free space where the run"):
        pipeline.run(config, "r")
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny)], check=True)
    run = pipeline.run(config, "r")
    epochs = [h["epoch"] for h in run.lake.read_json(run.uri("metrics.json"))["fit"]["history"] if "loss" in h]
    assert epochs[:4] == [0, 1, 2, 3]
    assert run.lake.read_json(run.uri("_MANIFEST.json"))["rows"]["labels"] == 1797
