"""A slice, or another piece of work, that kills its process: bounded, named, and left out where the settings say so."""

import logging
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from raydc.core.tree.cells import CellState
from raydc.data.reader import all_rejected
from raydc.data.sample import profile_input
from raydc.errors import DataError, StageError
from raydc.labeling.label_slice import Labeling
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runtime.attempts import Attempts, Bound, Ledger, known_attempts
from raydc.runtime.board import bounded, watched
from raydc.runtime.row_dataset import slice_dataset
from raydc.runtime.session import node_is_gone
from raydc.stages import merge, neighbors
from raydc.stages import profile as profiling
from raydc.stages.assign import label_all
from raydc.storage.lake import Lake, join
from tests import shards
from tests.stages.test_neighbors import a_run

POISON = "part-1.parquet"


def killing_lake(folder: Path, times: int, poison: str = POISON) -> Lake:
    """Return a lake in which a process is killed when it opens the file `poison`, the first `times` times."""
    folder.mkdir(exist_ok=True)
    driver = os.getpid()

    class KillingLake(Lake):
        def open_parquet(self, uri):
            if uri.endswith(poison) and os.getpid() != driver and len(list(folder.iterdir())) < times:
                (folder / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().open_parquet(uri)

    return KillingLake()


@pytest.fixture
def job(ray_cluster, tmp_path):
    """Label three files, of which one kills; returns the call and what it needs."""
    for number in range(3):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number}.parquet", shards.rows(x, 50 * number))

    def label(times, on_bad_files="fail", max_attempts=2):
        sections = {"input": {"on_bad_files": on_bad_files}, "ray": {"max_attempts": max_attempts}}
        config = shards.settings(tmp_path / "in", assign={"num_actors": 2}, **sections)
        profile = profile_input(config, Lake())
        lake, out = killing_lake(tmp_path / "kills", times), str(tmp_path / "out")

        def load() -> Labeling:
            return shards.corner_labeling(lake, out, profile.spec)

        with bounded("assign", config, Place(Lake(), out)) as bound:
            return label_all(config, load, profile.slices, 3, bound, Place(Lake(), out))

    return SimpleNamespace(label=label, out=tmp_path / "out", kills=lambda: len(list((tmp_path / "kills").iterdir())))


def test_a_slice_that_kills_its_process_each_time_is_named_and_stays_counted(job, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(DataError) as caught:
        job.label(99)
    assert f"in/{POISON} (rows 0 to 49) killed its process 2 times and is not tried again." in str(caught.value)
    assert "raise ray.max_attempts=2" in str(caught.value) and "input.on_bad_files=quarantine" in str(caught.value)
    assert job.kills() == 2
    deaths = [r.message for r in caplog.records if "its process died" in r.message]
    assert deaths == [f"assign: {POISON}: its process died without a word ({n} by now)" for n in (1, 2)]
    # Another driver goes on counting.
    with pytest.raises(DataError, match="killed its process 2 times"):
        job.label(99)
    assert job.kills() == 2


@pytest.mark.slow
def test_the_rows_of_a_slice_that_kills_each_time_go_to_the_rejects_under_quarantine(job):
    # Its ids cannot be read either: that is one more death.
    total = job.label(99, "quarantine")
    assert job.kills() == 3
    assert (total.rows, total.labels, total.rejects) == (150, 100, 50)
    assert pq.read_metadata(job.out / "labels" / POISON).num_rows == 0
    rejects = pq.read_table(job.out / "rejects" / POISON)
    assert rejects["row"].to_pylist() == list(range(50)) and set(rejects["slice"].to_pylist()) == {POISON}
    assert rejects["reason"].unique().to_pylist() == ["killed_process"] and rejects["id"].null_count == 50
    ids = [i for n in (0, 2) for i in pq.read_table(job.out / "labels" / f"part-{n}.parquet")["id"].to_pylist()]
    assert ids == [*range(50), *range(100, 150)]
    # And once more: it is complete.
    assert job.label(99, "quarantine").rejects == 50
    assert job.kills() == 3


@pytest.mark.slow
def test_a_slice_that_kills_twice_and_then_works_is_labeled(job):
    total = job.label(2, max_attempts=3)
    assert job.kills() == 2
    assert (total.rows, total.labels, total.rejects) == (150, 150, 0)
    assert known_attempts(Lake(), join(str(job.out), "attempts", "assign")) == {POISON: Attempts(deaths=2)}


@pytest.mark.slow
def test_the_ids_of_a_rejected_slice_are_kept_where_they_can_be_read(job):
    total = job.label(2, "quarantine")
    assert (total.labels, total.rejects) == (100, 50)
    assert pq.read_table(job.out / "rejects" / POISON)["id"].to_pylist() == list(range(50, 100))


@pytest.mark.slow
def test_an_actor_that_hangs_is_seen_and_replaced(ray_cluster, tmp_path, caplog):
    for number in range(3):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number}.parquet", shards.rows(x, 50 * number))
    driver, hung = os.getpid(), tmp_path / "hung"
    hung.mkdir()

    class HangingLake(Lake):
        def open_parquet(self, uri):
            if os.getpid() != driver and uri.endswith(("0.parquet", "1.parquet")):
                try:
                    (hung / Path(uri).name).touch(exist_ok=False)
                except FileExistsError:
                    return super().open_parquet(uri)
                # One process stands still as a whole, of the other one the reader alone.
                os.kill(os.getpid(), signal.SIGSTOP) if uri.endswith("0.parquet") else time.sleep(3600)
            return super().open_parquet(uri)

    config = shards.settings(
        tmp_path / "in", assign={"num_actors": 2, "stall_seconds": 8}, storage={"max_wait_seconds": 2}
    )
    profile = profile_input(config, Lake())

    def load() -> Labeling:
        return shards.corner_labeling(HangingLake(), str(tmp_path / "out"), profile.spec)

    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        bounded("assign", config, Place(Lake(), str(tmp_path)), stall_seconds=config.assign.stall_seconds) as bound,
    ):
        total = label_all(config, load, profile.slices, 3, bound, Place(Lake(), str(tmp_path / "out")))
    assert (total.rows, total.labels) == (150, 150)
    assert time.monotonic() - started < 300
    for name in ("part-0.parquet", "part-1.parquet"):
        assert f"assign: {name}: no progress for 8 s; its process is replaced" in caplog.text
    assert "part-2.parquet" not in caplog.text


def test_an_actor_hangs_once_its_progress_stops_for_longer_than_the_bound():
    ledger = Ledger({}, lambda node: False)
    ledger.begin("a", "a", "worker 1", "here", now=0.0, actor="actor 1")
    ledger.begin("b", "b", "worker 2", "here", now=0.0)
    assert ledger.hung(10.0, 10.0) == []
    ledger.progressed("a", 5.0)
    assert ledger.hung(15.0, 10.0) == []
    assert ledger.hung(16.0, 10.0) == [("a", "actor 1")]
    # It gets as long again to die.
    assert ledger.hung(20.0, 10.0) == [] and ledger.hung(27.0, 10.0) == [("a", "actor 1")]
    # Its process has died by itself, and loads the model again.
    ledger.begin("a.model", "a.model", "worker 3", "here", now=28.0, actor="actor 1")
    assert ledger.hung(38.0, 10.0) == []
    assert ledger.hung(39.0, 10.0) == [("a.model", "actor 1")]
    ledger.done("a.model", "worker 3")
    assert ledger.hung(99.0, 10.0) == []


def test_a_slice_that_kills_the_readers_of_a_fit_is_named_or_not_trained_on(ray_cluster, tmp_path):
    for number in range(3):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number}.parquet", shards.rows(x, 50 * number))
    lake = killing_lake(tmp_path / "kills", 99)
    config = shards.settings(tmp_path / "in", ray={"max_attempts": 2})

    def read(on_bad_files):
        chosen = config.input.model_copy(update={"on_bad_files": on_bad_files})
        profile = profile_input(config.model_copy(update={"input": chosen}), Lake())
        with bounded("fit", config, Place(Lake(), str(tmp_path))) as bound:
            rows = slice_dataset(lake, profile.slices, profile.spec, bound, seed=0, fraction=1.0, num_readers=2)
            try:
                return sorted(key for block in rows.iter_batches(batch_size=None) for key in block["key"].tolist())
            except Exception:
                return ray.get(bound.board.failure.remote())

    kind, text = read("fail")
    assert kind == "DataError" and f"{POISON} (rows 0 to 49) killed its process 2 times" in text
    assert read("quarantine") == [*range(50), *range(100, 150)]
    assert len(list((tmp_path / "kills").iterdir())) == 2


def test_a_slice_that_kills_the_search_of_neighbors_is_named_or_left_out(ray_cluster, tmp_path):
    config, run, _ = a_run(tmp_path, ray={"max_attempts": 2})
    run.lake = killing_lake(tmp_path / "kills", 99)
    with pytest.raises(DataError, match=rf"neighbors: .*{POISON} \(rows 0 to 79\) killed its process 2 times"):
        neighbors.run(config, run)
    body = run.lake.read_json(run.uri("profile.json"))
    body["spec"]["on_bad_files"] = "quarantine"
    run.lake.write_json(run.uri("profile.json"), body)
    # The files that are written then are read by the driver, which the lake spares.
    assert neighbors.run(config, run)["rows"] == 160
    keys, lists = artifacts.NEIGHBORS.read(Place(Lake(), run.root), artifacts.PROFILE.read(run).slices[1])
    assert keys.shape == (0,) and lists.shape == (0, 4)
    assert known_attempts(Lake(), run.uri("attempts", "neighbors")) == {POISON: Attempts(deaths=2, left_out=True)}


def test_a_cell_of_the_merge_that_kills_each_time_ends_and_is_named(ray_cluster, tmp_path):
    def kill(state, cell):
        if cell == 1:
            (tmp_path / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return cell

    four = np.zeros(4)
    state = CellState(
        kind="ward",
        center_MD=four[:, None],
        weight_M=four,
        spread_M=four,
        leaf_M=np.arange(4),
        first_C=np.array([0, 2, 4]),
    )
    told = "cell 1 of 4 clusters killed its process 2 times"
    with watched("merge") as board, pytest.raises(StageError, match=told):
        list(merge.run_on_cluster(kill, state, [0, 1], num_cpus=1, bound=Bound(board=board, most=2)))
    assert len(list(tmp_path.iterdir())) == 2


def test_ids_that_kill_the_process_are_not_compared_and_that_is_told(ray_cluster, tmp_path, caplog):
    for number in range(3):
        ids = pa.array([7, number], pa.int64())
        shards.write(tmp_path / "in" / f"part-{number}.parquet", shards.rows(shards.vectors(2), id=ids))
    profile = profile_input(shards.settings(tmp_path / "in"), Lake())
    lake = killing_lake(tmp_path / "kills", 99)
    with caplog.at_level(logging.WARNING), watched("profile") as board:
        found = profiling.repeats_by_tasks(profile.slices, profile.spec, lake, 2, Bound(board=board, most=2))
    assert found.rows == 1 and len(list((tmp_path / "kills").iterdir())) == 2
    assert f"profile: {POISON} killed its process 2 times: its 2 ids are not compared" in caplog.text


def test_work_that_the_run_cannot_do_without_is_told_apart_from_data(ray_cluster):
    with watched("merge") as board:
        bound = Bound(board=board, most=2)
        with pytest.raises(StageError, match=r"cell 3 killed its process 2 times .* Take more\."):
            bound.require(Attempts(deaths=2), "cell 3", "Take more.")
        bound.require(Attempts(deaths=1, losses=7), "cell 3", "Take more.")


def test_a_death_is_charged_to_the_piece_that_the_process_was_at():
    ledger = Ledger({}, lambda node: node == "lost")
    assert ledger.begin("a", "task 1", "worker 1", "here") == (Attempts(), None)
    assert ledger.begin("b", "task 2", "worker 2", "here") == (Attempts(), None)
    ledger.done("task 2", "worker 2")
    # The same task goes on to another piece, and its process dies there.
    assert ledger.begin("c", "task 1", "worker 1", "here") == (Attempts(), None)
    lost, line = ledger.begin("a", "task 1", "worker 3", "here")
    assert lost == Attempts() and line is not None and line == "c: its process died without a word (1 by now)"
    assert ledger.begin("c", "task 1", "worker 3", "here") == (Attempts(deaths=1), None)
    # What is done is not charged when Ray makes its output again.
    assert ledger.begin("b", "task 2", "worker 4", "here") == (Attempts(), None)


def test_a_lost_node_counts_a_quarter():
    ledger = Ledger({"a": Attempts(deaths=1)}, lambda node: True)
    ledger.begin("a", "a", "worker 0", "lost")
    for number in range(1, 8):
        lost, line = ledger.begin("a", "a", f"worker {number}", "lost")
        assert line is not None and "its node was lost" in line
        assert lost == Attempts(deaths=1, losses=number) and lost.beyond(2) < 0
    lost, _ = ledger.begin("a", "a", "worker 8", "lost")
    assert lost.beyond(2) == 0


def test_a_piece_is_left_out_once():
    ledger = Ledger({"a": Attempts(deaths=5)}, lambda node: False)
    assert [ledger.leave_out("a"), ledger.leave_out("a")] == [True, False]


def test_a_node_that_lives_is_not_gone(ray_cluster):
    assert not node_is_gone(ray.get_runtime_context().get_node_id())
    assert node_is_gone("0" * 56)


def test_a_rejected_slice_keeps_its_place_in_a_file_of_several(tmp_path):
    x, _ = shards.near_corners(90)
    path = shards.write(tmp_path / "in" / "a.parquet", shards.rows(x), row_group_size=30)
    config = shards.settings(path, input={"slice_bytes": 1})
    profile = profile_input(config, Lake())
    part = profile.slices[1]
    for with_ids in (True, False):
        tables = list(all_rejected(Lake(), part, profile.spec, "killed_process", with_ids=with_ids, block_rows=20))
        assert [len(t) for t in tables] == [20, 10]
        assert np.concatenate([t["row"].to_numpy() for t in tables]).tolist() == list(range(30, 60))
        ids = [i for t in tables for i in t["id"].to_pylist()]
        assert ids == (list(range(30, 60)) if with_ids else [None] * 30)
