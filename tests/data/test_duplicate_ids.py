"""Repeated ids: each is found wherever its rows lie, by numbers that can be counted by hand."""

import logging

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydc.data import duplicate_ids
from raydc.errors import DataError
from raydc.runfolder.folder import RunDir
from raydc.stages import profile as profiling
from raydc.storage.lake import Lake
from tests import shards


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3)), max_size=60), st.integers(1, 7)
)
def test_any_cut_into_parts_counts_as_many_as_a_dictionary(values, num_parts):
    known = [v for v in values if v is not None]
    for ids in (
        pa.array(values, pa.int64()),
        pa.array([None if v is None else f"id {v}" for v in values], pa.string()),
    ):
        keys = duplicate_ids.id_keys(ids, 1000)
        assert sorted(keys["row"].tolist()) == [1000 + i for i, v in enumerate(values) if v is not None]
        parts = [duplicate_ids.count(part) for part in duplicate_ids.by_part(keys, num_parts)]
        found = duplicate_ids.total(parts)
        assert found.rows == len(known) - len(set(known))
        for first, second in found.examples:
            assert first < second
            assert values[first - 1000] == values[second - 1000]
        assert found == duplicate_ids.count(keys)


def test_ids_that_rise_are_spread_over_the_parts():
    keys = duplicate_ids.id_keys(pa.array(np.arange(8000)), 0)
    assert [len(part) for part in duplicate_ids.by_part(keys, 8)] == pytest.approx([1000] * 8, rel=0.2)


def test_no_ids_repeat_nothing():
    for kind in (pa.int64(), pa.string()):
        assert duplicate_ids.count(duplicate_ids.id_keys(pa.array([], kind), 0)) == duplicate_ids.Repeats(0, ())


def fill(folder) -> None:
    for number, ids in enumerate((["a", "b", "c"], ["d", "a", None], ["e", "b", "a"])):
        x = shards.vectors(3, seed=number)
        shards.write(folder / f"{number}.parquet", shards.rows(x, id=pa.array(ids)), row_group_size=2)


def run(folder, output, **changes) -> dict:
    sections = {"input": {"on_bad_rows": "quarantine", "slice_bytes": 1, **changes}, "cluster": {"num_leaves": 2}}
    return profiling.run(shards.settings(folder, **sections), RunDir(Lake(), str(output), "r"))


def test_repeated_ids_are_counted_and_told_with_both_places(tmp_path, caplog):
    fill(tmp_path / "in")
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "in", tmp_path / "runs")["repeated_ids"] == 3
    places = f"id 'a' in {tmp_path}/in/0.parquet row 0 and {tmp_path}/in/1.parquet row 1"
    assert f"3 rows repeat the id of another row: {places}" in caplog.text


def test_repeated_ids_are_refused_where_unique_ones_were_asked_for(tmp_path):
    fill(tmp_path / "in")
    text = r"3 rows repeat the id of another row: id 'a' in .*/0.parquet row 0 .*set input.unique_ids=false"
    with pytest.raises(DataError, match=text):
        run(tmp_path / "in", tmp_path / "runs", unique_ids=True)
    assert not (tmp_path / "runs" / "r" / "profile.json").exists()


def test_unique_ids_pass(tmp_path):
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(shards.vectors(9)))
    assert run(tmp_path / "in", tmp_path / "runs", unique_ids=True)["repeated_ids"] == 0


def test_tasks_of_a_cluster_count_the_same(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicate_ids, "ROWS_PER_PART", 3)
    fill(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "runs")["repeated_ids"] == 3
