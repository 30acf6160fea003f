"""Listings: a path that exists is that path, every Parquet file is found, and what is left out is counted."""

import os

import pytest

from raydc.errors import DataError
from raydc.storage.lake import Lake
from raydc.storage.listing import passed_over_text
from tests import shards


def make(folder, *paths: str) -> None:
    for path in paths:
        shards.write(folder / path, shards.rows(shards.vectors(1)))


def found(path, root) -> tuple[list[str], dict[str, int]]:
    listing = Lake().find_parquet(str(path))
    return [f.uri.removeprefix(f"{root}/") for f in listing.files], {k: p.count for k, p in listing.passed_over.items()}


def test_a_path_with_brackets_that_exists_is_that_path(tmp_path):
    make(
        tmp_path, "run[1]/a.parquet", "run1/a.parquet", "clip [ViT-B]/x*.parquet", "what?/b.parquet", "whats/b.parquet"
    )
    assert found(tmp_path / "run[1]/a.parquet", tmp_path) == (["run[1]/a.parquet"], {})
    assert found(tmp_path / "run[1]", tmp_path) == (["run[1]/a.parquet"], {})
    assert found(tmp_path / "run[1]/*.parquet", tmp_path) == (["run[1]/a.parquet"], {})
    assert found(tmp_path / "clip [ViT-B]", tmp_path) == (["clip [ViT-B]/x*.parquet"], {})
    assert found(tmp_path / "clip [ViT-B]/x*.parquet", tmp_path) == (["clip [ViT-B]/x*.parquet"], {})
    assert found(tmp_path / "what?", tmp_path) == (["what?/b.parquet"], {})


def test_only_what_does_not_exist_is_a_pattern(tmp_path):
    make(tmp_path, "run1/a.parquet", "run2/a.parquet", "run3/a.parquet")
    assert found(tmp_path / "run[12]/a.parquet", tmp_path) == (["run1/a.parquet", "run2/a.parquet"], {})
    make(tmp_path, "run[12]/a.parquet")
    assert found(tmp_path / "run[12]/a.parquet", tmp_path) == (["run[12]/a.parquet"], {})


def test_a_pattern_over_folders_reads_them_as_folders(tmp_path):
    make(tmp_path, "2016-01.parquet", "2016-02.parquet/part-0.snappy.parquet", "2016-03.parquet/part-0.snappy.parquet")
    (tmp_path / "2016-02.parquet/_SUCCESS").touch()
    (tmp_path / "2016-02.parquet/.part-0.snappy.parquet.crc").touch()
    assert found(tmp_path / "*.parquet", tmp_path) == (
        ["2016-01.parquet", "2016-02.parquet/part-0.snappy.parquet", "2016-03.parquet/part-0.snappy.parquet"],
        {},
    )
    assert len(found(tmp_path / "**", tmp_path)[0]) == 3


def test_linked_folders_are_read_once_and_never_in_a_circle(tmp_path):
    make(tmp_path, "in/a.parquet", "in/2024/b.parquet", "elsewhere/c.parquet")
    (tmp_path / "in/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/latest").symlink_to(tmp_path / "in/2024")
    (tmp_path / "in/up").symlink_to(tmp_path)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    names, passed = found(tmp_path / "in", tmp_path)
    assert names == ["in/2024/b.parquet", "in/a.parquet", "in/more/c.parquet"]
    assert passed == {"linked folders that lead back": 3}
    assert found(tmp_path / "in/more", tmp_path)[0] == [
        "in/more/back/2024/b.parquet", "in/more/back/a.parquet", "in/more/c.parquet",
    ]  # fmt: skip


def test_other_endings_of_parquet_are_taken_and_the_first_bytes_decide_about_unknown_ones(tmp_path):
    make(tmp_path, "a.parquet", "b.parq", "c.PARQUET", "d.pq", "20260701_144951_00037_v74wa", "e.c000")
    (tmp_path / "000001_0").write_bytes(b"Obj\x01")
    (tmp_path / "notes.txt").write_bytes(b"PAR1")
    (tmp_path / "rows.csv").touch()
    (tmp_path / "LICENSE").touch()
    names, passed = found(tmp_path, tmp_path)
    assert names == ["20260701_144951_00037_v74wa", "a.parquet", "b.parq", "c.PARQUET", "d.pq", "e.c000"]
    assert passed == {"not Parquet by their first bytes": 2, "*.txt": 1, "*.csv": 1}


def test_hidden_files_are_counted_and_partitions_are_not_hidden(tmp_path):
    make(tmp_path, "_lang=en/a.parquet", "kind=x/b.parquet", "_old/c.parquet", ".tmp/d.parquet", "_e.parquet")
    names, passed = found(tmp_path, tmp_path)
    assert names == ["_lang=en/a.parquet", "kind=x/b.parquet"]
    assert passed == {"hidden (a name begins with _ or .)": 3}
    assert found(tmp_path / "*", tmp_path) == (names, passed)
    text = passed_over_text(Lake().find_parquet(str(tmp_path)).passed_over)
    assert text.startswith("passed over 3 entries: 3 hidden (a name begins with _ or .) (such as ")


def test_a_folder_without_parquet_says_what_is_there(tmp_path):
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(
        DataError, match=r"no Parquet file there \(passed over 2 entries: 2 \*\.csv \(such as .*\.csv\)\)"
    ):
        Lake().list_parquet(str(tmp_path))


def test_a_delta_table_says_that_its_removed_files_are_read(tmp_path):
    make(tmp_path, "a.parquet")
    (tmp_path / "_delta_log").mkdir()
    (tmp_path / "_delta_log/00000000000000000000.json").touch()
    listing = Lake().find_parquet(str(tmp_path))
    assert listing.passed_over == {}
    (note,) = listing.notes
    assert "is a Delta table" in note
    assert "file_uris()" in note


def test_what_is_neither_file_nor_folder_is_counted(tmp_path):
    make(tmp_path, "a.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    assert found(tmp_path, tmp_path) == (["a.parquet"], {"neither file nor folder": 1})


def test_brackets_mean_the_same_in_a_bucket(bucket):
    lake = Lake()
    for name in ("run[1]/a.parquet", "run1/a.parquet", "run[1]/_SUCCESS"):
        with lake.staged(f"{bucket}/{name}") as path:
            shards.write(path, shards.rows(shards.vectors(1)))
    for path in ("run[1]/a.parquet", "run[1]", "run[1]/*"):
        assert [f.uri for f in lake.list_parquet(f"{bucket}/{path}")] == [f"{bucket}/run[1]/a.parquet"]
    lake.remove(f"{bucket}/run[1]")
    assert [f.uri for f in lake.find(bucket)] == [f"{bucket}/run1/a.parquet"]


def test_a_link_that_leads_nowhere_is_counted_and_not_opened(tmp_path):
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(shards.vectors(3)))
    (tmp_path / "in" / "more").symlink_to(tmp_path / "gone")
    found = Lake().find_parquet(str(tmp_path / "in"))
    assert [f.uri for f in found.files] == [str(tmp_path / "in" / "a.parquet")]
    assert {kind: one.count for kind, one in found.passed_over.items()} == {"links that lead nowhere": 1}
