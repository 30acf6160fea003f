"""The actors of a labeling: how the slices are shared among them, and that nothing lives on when one fails."""

import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from raydc.data.sample import profile_input
from raydc.data.slices import Slice
from raydc.errors import DataError
from raydc.labeling.label_slice import Labeling, num_groups
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runtime import session
from raydc.runtime.attempts import Bound
from raydc.runtime.board import watched
from raydc.stages import assign, publish
from raydc.stages.assign import label_all
from raydc.storage.lake import Lake
from tests import shards
from tests.stages.runs import fill, labeled_run


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("iter_threaded", "StreamingExecutor"))]


def test_no_reader_outlives_a_labeling_that_fails(ray_cluster, tmp_path):
    for number in range(24):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number:02}.parquet", shards.rows(x, 50 * number))
    config = shards.settings(tmp_path / "in", assign={"num_actors": 1})
    profile = profile_input(config, Lake())
    (tmp_path / "in" / "part-01.parquet").write_bytes(b"no parquet")

    class SlowLake(Lake):
        def exists(self, uri):
            time.sleep(1)
            return super().exists(uri)

    # Slices enough for twenty seconds are left when the error comes.
    def load() -> Labeling:
        return shards.corner_labeling(SlowLake(), str(tmp_path / "out"), profile.spec)

    with (
        watched("assign") as board,
        pytest.raises(DataError, match=r"part-01\.parquet") as caught,
    ):
        bound = Bound(board=board, most=5)
        label_all(config, load, profile.slices, 3, bound, Place(Lake(), str(tmp_path / "out")))
    # The traceback is alive, as it is while a command leaves its cluster.
    assert caught.tb is not None
    session.await_readers()
    assert readers() == []


def test_no_slice_waits_at_a_busy_actor_while_the_pool_can_grow(ray_cluster, tmp_path):
    for number in range(2):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number:02}.parquet", shards.rows(x, 50 * number))
    config = shards.settings(tmp_path / "in", assign={"num_actors": 2})
    profile = profile_input(config, Lake())
    seen = tmp_path / "actors"
    seen.mkdir()

    def load() -> Labeling:
        # Whoever has a slice keeps it until another actor has one too, or for so long that none will.
        (seen / str(os.getpid())).touch()
        give_up = time.monotonic() + 60
        while len(list(seen.iterdir())) < 2 and time.monotonic() < give_up:
            time.sleep(0.1)
        return shards.corner_labeling(Lake(), str(tmp_path / "out"), profile.spec)

    # Room for one at the start.
    with watched("assign") as board:
        bound, place = Bound(board=board, most=5), Place(Lake(), str(tmp_path / "out"))
        total = label_all(config, load, profile.slices, 3, bound, place, slots=1)
    assert total.labels == sum(s.num_rows for s in profile.slices)
    assert len(list(seen.iterdir())) == 2


def test_actors_start_for_the_cores_that_a_single_machine_has(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    settings = partial(shards.settings, tmp_path)
    assert assign.free_slots(settings()) == 3
    assert assign.free_slots(settings(assign={"cpus_per_actor": 2})) == 1
    # A number that was asked for is a number that was meant.
    assert assign.free_slots(settings(ray={"num_cpus": 5})) == 5


def test_a_driver_that_died_after_the_sum_was_written_leaves_only_files_to_remove(tmp_path):
    fill(tmp_path / "in", num_bad=3)
    config, run = labeled_run(tmp_path)
    expected = {"rows": 100, "labels": 97, "rejects": 3, "slices": 3}
    files = sorted(p for p in Path(run.uri("slices")).rglob("*") if p.is_file())
    assert len(files) == 3
    groups = num_groups(artifacts.MODEL.load(run), artifacts.baselines_of(run).values())
    before = artifacts.STATISTICS.read(run, groups).to_bytes()
    # While they were removed; a labeling would need a cluster, which is not there.
    files[1].unlink()
    for _ in range(2):
        assert assign.run(config, run) == expected
        assert not Path(run.uri("slices")).exists()
    assert artifacts.STATISTICS.read(run, groups).to_bytes() == before
    publish.run(config, run)
    assert artifacts.MANIFEST.read(run)["rows"] == {"input": 100, "labels": 97, "rejects": 3}


def test_slices_share_a_task_where_they_are_many():
    parts = [
        Slice(index=i, name=f"{i}.parquet", uri="", row_groups=(0,), first_row=0, first_key=i, num_rows=1, num_bytes=1)
        for i in range(100_000)
    ]
    groups = assign.grouped(parts[:3000], 8)
    assert [len(g) for g in groups] == [1] * 3000
    groups = assign.grouped(parts, 8)
    assert [p.index for g in groups for p in g] == list(range(100_000))
    assert {len(g) for g in groups} == {25} and len(groups) == 4000
    # Actors enough for more tasks get four each at least.
    assert len(assign.grouped(parts, 6400)) == 25_000
