"""The actors of a labeling: how the slices are shared among them, and that nothing lives on when one fails."""

import os
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from raydc.data.sample import profile_input
from raydc.errors import DataError
from raydc.labeling.label_slice import Labeling
from raydc.runtime import session
from raydc.runtime.attempts import Bound
from raydc.runtime.board import watched
from raydc.stages import assign
from raydc.stages.assign import label_all
from raydc.storage.lake import Lake
from tests import shards


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("iter_threaded", "StreamingExecutor"))]


def test_no_reader_outlives_a_labeling_that_fails(ray_cluster, tmp_path):
    for number in range(24):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number:02}.parquet", shards.rows(x, 50 * number))
    config = shards.settings(tmp_path / "in", assign={"num_actors": 1})
    profile = profile_input(config, Lake())
    (tmp_path / "in" / "part-01.parquet").write_bytes(b"no parquet")

    def load() -> Labeling:
        return shards.corner_labeling(Lake(), str(tmp_path / "out"), profile.spec)

    # Slices enough for twenty seconds are left when the error comes.
    slow: Any = SimpleNamespace(check_owner=lambda: time.sleep(1), tell=lambda line: None)
    with (
        watched("assign") as board,
        pytest.raises(DataError, match=r"part-01\.parquet") as caught,
    ):
        bound = Bound(board=board, most=5)
        label_all(config, load, profile.slices, 3, bound, slow)
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
        total = label_all(config, load, profile.slices, 3, Bound(board=board, most=5), slots=1)
    assert total.labels == sum(s.num_rows for s in profile.slices)
    assert len(list(seen.iterdir())) == 2


def test_actors_start_for_the_cores_that_a_single_machine_has(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    settings = partial(shards.settings, tmp_path)
    assert assign.free_slots(settings()) == 3
    assert assign.free_slots(settings(assign={"cpus_per_actor": 2})) == 1
    # A number that was asked for is a number that was meant.
    assert assign.free_slots(settings(ray={"num_cpus": 5})) == 5
