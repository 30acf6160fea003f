"""Storage: what a listing finds, writes that are whole or not there, and the same on a real S3 protocol."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydc.data.footers import read_footers
from raydc.data.slices import Column, InputSpec, plan_slices
from raydc.errors import ConfigError, DataError
from raydc.model import Model
from raydc.storage.lake import Lake, absolute, is_staged, join
from tests import shards


def names(lake: Lake, uris: str | list[str], root: object) -> list[str]:
    return [f.uri.removeprefix(f"{root}/") for f in lake.list_parquet(uris)]


def everything_in(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def make_tree(folder, *paths: str) -> None:
    for path in paths:
        shards.write(folder / path, shards.rows(shards.vectors(1)))


def test_a_folder_is_listed_with_all_below_it(tmp_path):
    make_tree(tmp_path, "b.parquet", "a.parquet", "deep/er/a.parquet")
    assert names(Lake(), str(tmp_path), tmp_path) == ["a.parquet", "b.parquet", "deep/er/a.parquet"]
    assert Lake().list_parquet(f"file://{tmp_path}/") == Lake().list_parquet(str(tmp_path))
    sizes = {f.uri: f.size for f in Lake().list_parquet(str(tmp_path))}
    assert sizes == {uri: os.path.getsize(uri) for uri in sizes}


def test_hidden_and_other_files_in_a_folder_are_passed_over(tmp_path):
    make_tree(tmp_path, "a.parquet", "_b.parquet", ".c.parquet", "_temporary/d.parquet", ".git/e.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").touch()
    assert names(Lake(), str(tmp_path), tmp_path) == ["a.parquet"]


def test_a_hidden_folder_may_be_named_itself(tmp_path):
    make_tree(tmp_path, "_stage/.inner/a.parquet")
    assert names(Lake(), str(tmp_path / "_stage" / ".inner"), tmp_path) == ["_stage/.inner/a.parquet"]


def test_globs_lists_and_files_are_listed_each_file_once(tmp_path):
    make_tree(tmp_path, "x/a.parquet", "x/b.parquet", "y/a.parquet")
    make_tree(tmp_path, "z/rows.pq")
    assert names(Lake(), f"{tmp_path}/x/*.parquet", tmp_path) == ["x/a.parquet", "x/b.parquet"]
    assert names(Lake(), f"{tmp_path}/**/a.parquet", tmp_path) == ["x/a.parquet", "y/a.parquet"]
    several = [f"{tmp_path}/z/rows.pq", f"{tmp_path}/x", f"{tmp_path}/x/a.parquet", f"{tmp_path}/*/a.parquet"]
    assert names(Lake(), several, tmp_path) == ["x/a.parquet", "x/b.parquet", "y/a.parquet", "z/rows.pq"]


def test_hidden_files_are_found_by_a_glob_that_names_them(tmp_path):
    make_tree(tmp_path, "a.parquet", "_b.parquet", ".c.parquet", "_d/e.parquet")
    assert names(Lake(), f"{tmp_path}/*.parquet", tmp_path) == ["a.parquet"]
    assert names(Lake(), f"{tmp_path}/_*.parquet", tmp_path) == ["_b.parquet"]
    assert names(Lake(), f"{tmp_path}/_d/*.parquet", tmp_path) == ["_d/e.parquet"]
    assert names(Lake(), f"{tmp_path}/_b.parquet", tmp_path) == ["_b.parquet"]


def test_links_to_files_count_as_files(tmp_path):
    make_tree(tmp_path, "blobs/0123.parquet")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.parquet").symlink_to("../blobs/0123.parquet")
    for uri in (tmp_path / "snapshot", tmp_path / "snapshot" / "*.parquet"):
        (found,) = Lake().list_parquet(str(uri))
        assert found.uri == f"{tmp_path}/snapshot/a.parquet"
        assert found.size == os.path.getsize(tmp_path / "blobs" / "0123.parquet")


def test_a_link_to_nothing_is_listed_so_that_it_is_not_lost_in_silence(tmp_path):
    make_tree(tmp_path, "a.parquet")
    (tmp_path / "b.parquet").symlink_to("none.parquet")
    assert names(Lake(), str(tmp_path), tmp_path) == ["a.parquet", "b.parquet"]
    (footer,) = [f for f in read_footers(Lake(), Lake().list_parquet(str(tmp_path))) if f.problem]
    assert "No such file" in footer.problem


@pytest.mark.parametrize("uri", ["none", "none/*.parquet", "empty"])
def test_an_entry_that_names_nothing_is_refused(tmp_path, uri):
    make_tree(tmp_path, "there/a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"input.path={tmp_path}/{uri.replace('*', '.')}: no Parquet file there"):
        Lake().list_parquet([f"{tmp_path}/there", f"{tmp_path}/{uri}"])


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ConfigError, match="storage nowhere://bucket/x has the scheme 'nowhere'. Use a path or one of"):
        Lake().list_parquet("nowhere://bucket/x")


def test_a_local_path_means_the_same_in_another_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute("runs/a") == f"{tmp_path}/runs/a"
    assert absolute("~/runs") == "/home/somebody/runs"
    assert absolute("file:///data/x") == "/data/x"
    assert absolute("s3://bucket/x") == "s3://bucket/x"
    assert join("s3://bucket/x/", "y", "z.json") == "s3://bucket/x/y/z.json"


def test_a_lake_survives_the_way_to_another_process(tmp_path):
    lake = pickle.loads(pickle.dumps(Lake(endpoint_url="http://127.0.0.1:1", region="eu-west-1", anonymous=True)))
    lake.write_json(str(tmp_path / "a.json"), [1])
    assert lake.read_json(str(tmp_path / "a.json")) == [1]


def test_a_staged_file_appears_whole_when_its_block_ends(tmp_path):
    target = tmp_path / "new" / "a.bin"
    with Lake().staged(str(target)) as path:
        path.write_bytes(b"first")
        assert not target.exists()
        assert is_staged(str(path))
    assert target.read_bytes() == b"first"
    with Lake().staged(str(target)) as path:
        path.write_bytes(b"second")
        assert target.read_bytes() == b"first"
    assert target.read_bytes() == b"second"
    assert everything_in(tmp_path) == ["new", "new/a.bin"]
    assert not is_staged(str(target))


def test_a_block_that_raises_leaves_nothing_behind_and_the_old_file_whole(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="on purpose"), Lake().staged(str(target)) as path:
        path.write_bytes(b"half")
        raise RuntimeError("on purpose")
    assert everything_in(tmp_path) == ["a.bin"]
    assert target.read_bytes() == b"old"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    target = str(tmp_path / "a.bin")
    with Lake().staged(target) as first, Lake().staged(target) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert Lake().read_bytes(target) == b"first"
    assert everything_in(tmp_path) == ["a.bin"]


def test_json_keeps_the_order_of_keys_and_refuses_what_json_has_not(tmp_path):
    uri = str(tmp_path / "a.json")
    Lake().write_json(uri, {"z": 1, "a": [1.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n "z": 1,\n "a": [\n  1.5,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        Lake().write_json(uri, {"loss": float("nan")})
    assert Lake().read_json(uri) == {"z": 1, "a": [1.5, None]}


def test_find_lists_every_file_and_nothing_where_no_folder_is(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("b", "d/a", ".hidden"):
        (tmp_path / name).write_bytes(b"123")
    found = Lake().find(str(tmp_path))
    assert [(f.uri.removeprefix(f"{tmp_path}/"), f.size) for f in found] == [(".hidden", 3), ("b", 3), ("d/a", 3)]
    assert Lake().find(str(tmp_path / "none")) == []
    assert Lake().size(str(tmp_path / "b")) == 3


def test_remove_takes_files_and_folders_and_forgives_their_absence(tmp_path):
    make_tree(tmp_path, "d/e/a.parquet", "b.parquet")
    for name in ("d", "b.parquet", "none"):
        Lake().remove(str(tmp_path / name))
    assert everything_in(tmp_path) == []


def test_a_folder_comes_back_as_it_was_sent(tmp_path):
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "a").write_bytes(b"a")
    (tmp_path / "here" / "deep" / "b").write_bytes(b"b" * 1000)
    Lake().upload_folder(tmp_path / "here", str(tmp_path / "there"))
    Lake().download_folder(str(tmp_path / "there"), tmp_path / "back")
    assert everything_in(tmp_path / "back") == everything_in(tmp_path / "here")
    assert (tmp_path / "back" / "deep" / "b").read_bytes() == b"b" * 1000


def test_what_pyarrow_writes_is_there_once_it_is_closed(tmp_path):
    filesystem, path = Lake().arrow_file_system(str(tmp_path / "a"))
    for body in (b"first", b"second" * 100_000):
        before = Path(path).read_bytes() if Path(path).exists() else None
        with filesystem.open_output_stream(path) as out:
            out.write(body[:3])
            out.write(body[3:])
            assert (Path(path).read_bytes() if Path(path).exists() else None) == before
            assert out.tell() == len(body)
        assert Path(path).read_bytes() == body
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_pyarrow_reads_through_the_same_door(tmp_path):
    uri = shards.write(tmp_path / "a.parquet", shards.rows(shards.vectors(3)))
    filesystem, path = Lake().arrow_file_system(uri)
    assert pq.read_table(path, filesystem=filesystem).num_rows == 3
    with Lake().open_parquet(uri) as handle:
        assert pq.ParquetFile(handle).metadata.num_rows == 3


@pytest.mark.s3
def test_s3_files_are_listed_and_read(bucket):
    lake = Lake()
    table = shards.rows(shards.vectors(50))
    for name in ("in/b.parquet", "in/a.parquet", "in/x/a.parquet", "in/_tmp/c.parquet", "in/.d.parquet"):
        with lake.staged(f"{bucket}/{name}") as path:
            pq.write_table(table, path)
    assert names(lake, f"{bucket}/in", bucket) == ["in/a.parquet", "in/b.parquet", "in/x/a.parquet"]
    assert names(lake, f"{bucket}/in/", bucket) == names(lake, f"{bucket}/in", bucket)
    assert names(lake, f"{bucket}/in/*.parquet", bucket) == ["in/a.parquet", "in/b.parquet"]
    with lake.open_parquet(f"{bucket}/in/a.parquet") as handle:
        assert pq.read_table(handle).equals(table)
    filesystem, path = lake.arrow_file_system(f"{bucket}/in/a.parquet")
    assert pq.read_table(path, filesystem=filesystem).equals(table)
    with pytest.raises(DataError, match=f"input.path={bucket}/none: no Parquet file there"):
        lake.list_parquet(f"{bucket}/none")


@pytest.mark.s3
def test_s3_listings_see_what_another_process_wrote_meanwhile(bucket, s3_client):
    lake = Lake()
    lake.write_bytes(f"{bucket}/in/a.parquet", b"1")
    assert names(lake, f"{bucket}/in", bucket) == ["in/a.parquet"]
    assert not lake.exists(f"{bucket}/in/b.parquet")
    s3_client.put_object(Bucket=bucket.removeprefix("s3://"), Key="in/b.parquet", Body=b"12")
    assert lake.exists(f"{bucket}/in/b.parquet")
    assert names(lake, f"{bucket}/in", bucket) == ["in/a.parquet", "in/b.parquet"]
    assert [f.size for f in lake.find(f"{bucket}/in")] == [1, 2]


@pytest.mark.s3
def test_s3_writes_are_whole_or_not_there(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lake = Lake()
    lake.write_json(f"{bucket}/run/a.json", {"b": 1})
    assert lake.read_json(f"{bucket}/run/a.json") == {"b": 1}
    with pytest.raises(RuntimeError, match="on purpose"), lake.staged(f"{bucket}/run/b.bin") as path:
        path.write_bytes(b"half")
        raise RuntimeError("on purpose")
    assert [f.uri for f in lake.find(bucket)] == [f"{bucket}/run/a.json"]
    assert everything_in(tmp_path) == []


@pytest.mark.s3
def test_s3_folders_are_sent_fetched_and_removed(bucket, tmp_path):
    lake = Lake()
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "a").write_bytes(b"a")
    (tmp_path / "here" / "deep" / "b").write_bytes(b"b" * 1000)
    lake.upload_folder(tmp_path / "here", f"{bucket}/folder")
    assert [f.uri for f in lake.find(f"{bucket}/folder")] == [f"{bucket}/folder/a", f"{bucket}/folder/deep/b"]
    lake.download_folder(f"{bucket}/folder/", tmp_path / "back")
    assert everything_in(tmp_path / "back") == ["a", "deep", "deep/b"]
    lake.remove(f"{bucket}/folder/a")
    assert [f.uri for f in lake.find(f"{bucket}/folder")] == [f"{bucket}/folder/deep/b"]
    lake.remove(f"{bucket}/folder")
    lake.remove(f"{bucket}/folder")
    assert lake.find(f"{bucket}/folder") == []


@pytest.mark.s3
def test_slices_are_labeled_from_s3_to_s3(bucket, tmp_path):
    lake = Lake()
    x, leaf = shards.near_corners(300)
    uris = []
    for number, part in enumerate(np.array_split(np.arange(300), 3)):
        uri = f"{bucket}/in/part-{number}.parquet"
        table = shards.rows(x[part], first_id=int(part[0]), label=pa.array(leaf[part]))
        with lake.staged(uri) as path:
            pq.write_table(table, path, row_group_size=40)
        uris.append(uri)
    slices = plan_slices(read_footers(lake, lake.list_parquet(f"{bucket}/in")), slice_bytes=500)
    assert len(slices) > 3
    shards.corner_model().save(lake, f"{bucket}/run/model")
    spec = InputSpec(
        columns=(Column(name="embedding", dim=2, dtype="float32"),),
        id_column="id",
        id_type="int64",
        label_column="label",
    )
    model = Model.load(f"{bucket}/run", lake)
    job = shards.corner_labeling(lake, f"{bucket}/run", spec, model=model, block_rows=16)
    total = shards.label_all(job, slices)
    assert (total.rows, total.labels, total.rejects) == (300, 300, 0)
    found = []
    for part in slices:
        with lake.open_parquet(f"{bucket}/run/labels/{part.name}") as handle:
            found.append(pq.read_table(handle))
    assert pa.concat_tables(found)["id"].to_pylist() == list(range(300))
    assert pa.concat_tables(found)["leaf"].to_pylist() == leaf.tolist()


def test_a_file_is_created_once_and_whole(tmp_path):
    uri = str(tmp_path / "new" / "a.json")
    assert Lake().create(uri, b"first")
    assert not Lake().create(uri, b"second")
    assert Lake().read_bytes(uri) == b"first"
    assert everything_in(tmp_path) == ["new", "new/a.json"]


def test_where_links_are_not_there_a_file_is_created_once_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "a.json")
    assert Lake().create(uri, b"first")
    assert not Lake().create(uri, b"second")
    assert Lake().read_bytes(uri) == b"first"


@pytest.mark.s3
def test_a_creation_whose_answer_was_lost_still_knows_its_winner(bucket):
    lake = Lake()
    assert lake.create(f"{bucket}/a.json", b"mine")
    # What a client's own retry does after a time-out.
    assert lake.create(f"{bucket}/a.json", b"mine")
    assert not lake.create(f"{bucket}/a.json", b"theirs")


def test_files_of_another_store_keep_the_name_of_their_folder(tmp_path):
    lake = Lake()
    for name in ("in/a.parquet", "in/x/b.parquet", "in/_c.parquet"):
        with lake.staged(f"memory://bucket/{name}") as path:
            pq.write_table(shards.rows(shards.vectors(3)), path)
    try:
        assert names(lake, "memory://bucket/in", "memory://bucket") == ["in/a.parquet", "in/x/b.parquet"]
        assert names(lake, "memory://bucket/in/*.parquet", "memory://bucket") == ["in/a.parquet"]
        assert names(lake, "memory://bucket/in/x/b.parquet", "memory://bucket") == ["in/x/b.parquet"]
        assert [f.uri for f in lake.find("memory://bucket/in/x")] == ["memory://bucket/in/x/b.parquet"]
        assert [f.num_rows for f in read_footers(lake, lake.list_parquet("memory://bucket/in"))] == [3, 3]
        lake.download_folder("memory://bucket/in/", tmp_path / "back")
        assert everything_in(tmp_path / "back") == ["_c.parquet", "a.parquet", "x", "x/b.parquet"]
        assert lake.create("memory://bucket/new", b"1") and not lake.create("memory://bucket/new", b"2")
        lake.remove("memory://bucket/in")
        assert lake.find("memory://bucket/in") == []
    finally:
        lake.remove("memory://bucket")


@pytest.mark.parametrize(
    ("given", "expected"), [("s3a://b/x", "s3://b/x"), ("s3n://b/x", "s3://b/x"), ("gcs://b/x", "gs://b/x")]
)
def test_schemes_of_one_store_have_one_name(given, expected):
    assert absolute(given) == expected


@pytest.mark.s3
def test_s3a_is_the_same_store_everywhere(bucket, tmp_path):
    lake, other = Lake(), bucket.replace("s3://", "s3a://")
    with lake.staged(f"{other}/in/a.parquet") as path:
        pq.write_table(shards.rows(shards.vectors(3)), path)
    assert [f.uri for f in lake.list_parquet([f"{other}/in", f"{bucket}/in", f"{other}/in/*.parquet"])] == [
        f"{bucket}/in/a.parquet"
    ]
    assert lake.exists(f"{other}/in/a.parquet")
    lake.download_folder(f"{other}/in", tmp_path / "back")
    assert everything_in(tmp_path / "back") == ["a.parquet"]


@pytest.mark.s3
def test_no_name_of_an_object_leads_out_of_the_folder_it_is_copied_to(bucket, s3_client, tmp_path):
    s3_client.put_object(Bucket=bucket.removeprefix("s3://"), Key="run/../../escaped", Body=b"1")
    with pytest.raises(DataError, match=r"run/../../escaped: its name leads out of the folder"):
        Lake().download_folder(f"{bucket}/run", tmp_path / "a" / "b")
    assert not (tmp_path / "escaped").exists()
