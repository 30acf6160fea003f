"""publish: the manifest comes last, lists every file as it is, and is not written where rows are missing."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydc.data.schema import FORMAT_VERSION
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import LeaseLost, acquire
from raydc.stages import publish
from raydc.storage.lake import Lake
from tests import shards
from tests.stages.runs import fill, labeled_run


@pytest.mark.parametrize("num_bad", [0, 1, 37])
def test_the_manifest_lists_every_file_with_rows_bytes_and_checksum(tmp_path, num_bad):
    fill(tmp_path / "in", num_bad=num_bad)
    config, run = labeled_run(tmp_path)
    metrics = publish.run(config, run)
    manifest = artifacts.MANIFEST.read(run)
    assert manifest["rows"] == {"input": 100, "labels": 100 - num_bad, "rejects": num_bad}
    assert (manifest["run_id"], manifest["format_version"]) == ("r1", FORMAT_VERSION)
    assert metrics == {
        "files": len(manifest["files"]),
        "bytes": sum(f["bytes"] for f in manifest["files"]),
        "tables": [],
    }
    for entry in manifest["files"]:
        body = Path(run.uri(entry["path"])).read_bytes()
        assert entry["bytes"] == len(body)
        assert entry["sha256"] == hashlib.sha256(body).hexdigest()
        if entry["path"].endswith(".parquet"):
            assert entry["rows"] == pq.read_metadata(run.uri(entry["path"])).num_rows


def test_results_are_listed_and_working_files_are_not(tmp_path):
    fill(tmp_path / "in", num_bad=1)
    config, run = labeled_run(tmp_path)
    run.lake.write_bytes(run.uri("checkpoints", "a.pt"), b"")
    publish.run(config, run)
    paths = {f["path"] for f in artifacts.MANIFEST.read(run)["files"]}
    assert {f"labels/part-{i}.parquet" for i in range(3)} | {"rejects/part-0.parquet"} <= paths
    assert {"run.json", "profile.json", "model/config.json", "model/weights.safetensors", "tree/linkage.npy"} <= paths
    folders = {p.split("/")[0] for p in paths if "/" in p}
    assert folders == {"labels", "rejects", "model", "tree"}
    assert artifacts.MANIFEST.path not in paths


def test_a_second_publish_lists_the_same_files(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    publish.run(config, run)
    first = artifacts.MANIFEST.read(run)["files"]
    publish.run(config, run)
    assert artifacts.MANIFEST.read(run)["files"] == first


def test_a_missing_label_file_is_refused(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    run.remove("labels/part-1.parquet")
    with pytest.raises(StageError, match=r"publish: 1 label files are missing, such as labels/part-1.parquet. Run the"):
        publish.run(config, run)
    assert not run.lake.exists(run.uri(artifacts.MANIFEST.path))


def test_a_missing_label_file_of_no_rows_is_refused_too(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    run.remove("labels/part-2.parquet")
    with pytest.raises(StageError, match="such as labels/part-2.parquet"):
        publish.run(config, run)


@pytest.mark.parametrize("kind", ["labels", "rejects"])
def test_counts_that_do_not_add_up_are_refused(tmp_path, kind):
    fill(tmp_path / "in", num_bad=5)
    config, run = labeled_run(tmp_path)
    path = run.uri(kind, "part-0.parquet")
    pq.write_table(pq.read_table(path).slice(1), path)
    counts = {"labels": "94 labels and 5 rejects", "rejects": "95 labels and 4 rejects"}[kind]
    with pytest.raises(StageError, match=f"publish: 100 rows in, but {counts} on disk. Files were changed"):
        publish.run(config, run)
    assert not run.lake.exists(run.uri(artifacts.MANIFEST.path))


def test_a_label_file_too_many_is_refused(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    Lake().write_bytes(run.uri("labels", "copy.parquet"), Path(run.uri("labels", "part-0.parquet")).read_bytes())
    with pytest.raises(StageError, match="100 rows in, but 150 labels and 0 rejects on disk"):
        publish.run(config, run)


def test_what_a_killed_writer_left_behind_is_removed(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    leftover = Path(run.uri("labels", ".part-0.parquet.123.0a1b2c3d.tmp"))
    leftover.write_bytes(b"half")
    publish.run(config, run)
    assert not leftover.exists()
    assert not [f for f in artifacts.MANIFEST.read(run)["files"] if f["path"].endswith(".tmp")]


@pytest.mark.s3
def test_a_run_in_s3_is_published_there(bucket, tmp_path):
    fill(tmp_path / "in")
    config, local = labeled_run(tmp_path)
    lake = Lake()
    lake.upload_folder(Path(local.root), f"{bucket}/runs/r1")
    run = RunDir(lake, f"{bucket}/runs", "r1")
    publish.run(config, run)
    publish.run(config, local)
    remote, here = (r.lake.read_json(r.uri(artifacts.MANIFEST.path)) for r in (run, local))
    assert remote["files"] == here["files"]
    assert remote["rows"] == here["rows"]


def test_shards_of_equal_names_are_published_side_by_side(tmp_path):
    x, leaf = shards.near_corners(40)
    for number, folder in enumerate(("x", "y")):
        table = shards.rows(x[number::2], label=[str(k) for k in leaf[number::2]])
        shards.write(tmp_path / "in" / folder / "part-0.parquet", table)
    config, run = labeled_run(tmp_path)
    publish.run(config, run)
    paths = {f["path"] for f in artifacts.MANIFEST.read(run)["files"]}
    assert {"labels/x/part-0.parquet", "labels/y/part-0.parquet"} <= paths


def test_two_drivers_never_both_publish(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    first, second = (RunDir(run.lake, str(tmp_path / "runs"), "r1") for _ in range(2))
    first.fence = acquire(run.lake, run.root, heartbeat_seconds=0.1, stale_seconds=0.3).fence
    # The first one gives no sign of life.
    lease = acquire(run.lake, run.root, heartbeat_seconds=0.1, stale_seconds=0.3)
    with lease:
        second.fence = lease.fence
        with pytest.raises(LeaseLost, match="has taken this run over"):
            publish.run(config, first)
        assert not run.lake.exists(run.uri(artifacts.MANIFEST.path))
        publish.run(config, second)
    assert not [f for f in artifacts.MANIFEST.read(run)["files"] if f["path"].startswith("lease/")]


def test_a_manifest_that_is_there_stays_if_it_says_the_same_and_gives_way_if_not(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    publish.run(config, run)
    first = artifacts.MANIFEST.read(run)
    run.lake.write_json(run.uri(artifacts.MANIFEST.path), first | {"finished": "earlier"})
    publish.run(config, run)
    assert artifacts.MANIFEST.read(run)["finished"] == "earlier"
    run.lake.write_json(run.uri(artifacts.MANIFEST.path), first | {"files": []})
    publish.run(config, run)
    assert artifacts.MANIFEST.read(run)["files"] == first["files"]


class CountingLake(Lake):
    """A lake that remembers which files were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = []

    def file_system(self, uri):
        self.opened.append(uri)
        return super().file_system(uri)


def test_no_label_file_is_read_again(tmp_path):
    fill(tmp_path / "in", num_bad=3)
    config, run = labeled_run(tmp_path, publish={"delta": {}, "iceberg": {}})
    lake = CountingLake()
    counted = RunDir(lake, str(tmp_path / "runs"), "r1")
    publish.run(config, counted)
    opened = [uri for uri in lake.opened if "/labels/" in uri or "/rejects/" in uri]
    assert opened == []
    # Nothing noted, as by an earlier version: read, to the same end.
    first = artifacts.MANIFEST.read(run)
    run.remove(artifacts.LABEL_FILES.path)
    publish.run(config, counted)
    assert len([uri for uri in lake.opened if "/labels/" in uri]) >= 3
    again = artifacts.MANIFEST.read(run)
    assert [f for f in first["files"] if f["path"] != artifacts.LABEL_FILES.path] == again["files"]
    # The tables held these files already.
    assert first["tables"] == again["tables"]


def test_a_label_file_that_was_written_again_is_read(tmp_path, caplog):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    path = Path(run.uri("labels", "part-0.parquet"))
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False)
    publish.run(config, run)
    assert "publish: 1 label files are not as they were written; they are read again" in caplog.text
    entry = next(f for f in artifacts.MANIFEST.read(run)["files"] if f["path"] == "labels/part-0.parquet")
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


class NamingLake(Lake):
    """A lake whose listing names contents, by MD5 or otherwise."""

    def __init__(self, named) -> None:
        super().__init__()
        self.named, self.opened = named, []

    def find(self, uri):
        return [replace(f, etag=self.named(f.uri)) for f in super().find(uri)]

    def file_system(self, uri):
        self.opened.append(uri)
        return super().file_system(uri)


@pytest.mark.parametrize(
    ("named", "num_read"),
    [
        ("md5", 0),
        # Pieces of an upload, whose sum nobody can make again.
        ("md5-of-pieces", 0),
        # Names of encrypted contents: some files are looked at, and none is different.
        ("other", 3),
        ("one other", 1),
    ],
)
def test_a_file_of_the_same_size_is_told_by_its_name_in_the_store(tmp_path, named, num_read):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    changed = run.uri("labels", "part-0.parquet")

    def name(uri):
        md5 = hashlib.md5(Path(uri).read_bytes()).hexdigest()
        if named == "other" or (named == "one other" and uri == changed):
            return hashlib.md5(md5.encode()).hexdigest()
        return f"{md5}-2" if named == "md5-of-pieces" else md5

    lake = NamingLake(name)
    publish.run(config, RunDir(lake, str(tmp_path / "runs"), "r1"))
    read = {uri for uri in lake.opened if "/labels/part" in uri}
    assert len(read) == num_read


def test_a_byte_that_changed_in_place_is_seen_where_contents_are_named(tmp_path, caplog):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    path = Path(run.uri("labels", "part-0.parquet"))
    body = bytearray(path.read_bytes())
    body[40] ^= 1
    path.write_bytes(body)
    lake = NamingLake(lambda uri: hashlib.md5(Path(uri).read_bytes()).hexdigest())
    publish.run(config, RunDir(lake, str(tmp_path / "runs"), "r1"))
    assert "1 label files are not as they were written" in caplog.text
    entry = next(f for f in artifacts.MANIFEST.read(run)["files"] if f["path"] == "labels/part-0.parquet")
    assert entry["sha256"] == hashlib.sha256(body).hexdigest()
