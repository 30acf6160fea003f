"""The look at the input before a run: each footer is read once, and not at all while the listing stays the same."""

import os
from collections import Counter

import numpy as np
import pytest

from raydc import pipeline
from raydc.errors import ConfigError, DataError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.stages import profile as profiling
from raydc.storage.lake import Lake
from tests import shards

NUM_FILES = 5


class CountingLake(Lake):
    """A lake that counts how often each file was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: Counter[str] = Counter()

    def open_parquet(self, uri):
        self.opened[uri] += 1
        return super().open_parquet(uri)


def fill(folder) -> None:
    """Write five files of ten rows."""
    for number in range(NUM_FILES):
        table = shards.rows(shards.vectors(10, seed=number), first_id=number * 10)
        shards.write(folder / f"{number}.parquet", table)


def profiled(tmp_path, **sections) -> tuple[RunDir, Counter[str]]:
    """Do what a run does up to the end of stage profile; return the folder, and what was opened before the stage."""
    config = shards.settings(tmp_path / "in", **sections)
    run = RunDir(CountingLake(), str(tmp_path / "runs"), "r1")
    run.write_header(config)
    found, inspected = pipeline.check_input(config, run)
    opened = Counter(run.lake.opened)
    settings = config.settings("profile") | {"input_fingerprint": found.fingerprint}
    run.begin("profile", settings)
    run.mark_done("profile", settings, 1.0, profiling.run(config, run, inspected))
    return run, opened


def opened_by_another_look(tmp_path, run, **sections) -> int:
    run.lake.opened.clear()
    pipeline.check_input(shards.settings(tmp_path / "in", **sections), run)
    return sum(run.lake.opened.values())


def test_every_footer_is_read_once_before_the_sample(tmp_path):
    fill(tmp_path / "in")
    run, before = profiled(tmp_path)
    assert before == {f"{tmp_path}/in/{n}.parquet": 1 for n in range(NUM_FILES)}
    # The rows of the sample, and the ids that are compared: as many as where profile had read the footers itself.
    with_inspection = sum(run.lake.opened.values())
    lake = CountingLake()
    profiling.run(shards.settings(tmp_path / "in"), RunDir(lake, str(tmp_path / "runs"), "r2"))
    assert with_inspection == sum(lake.opened.values())


def test_a_run_that_goes_on_opens_no_file_whose_listing_is_the_same(tmp_path):
    fill(tmp_path / "in")
    run, _ = profiled(tmp_path)
    assert opened_by_another_look(tmp_path, run) == 0
    found, inspected = pipeline.check_input(shards.settings(tmp_path / "in"), run)
    assert inspected is None
    assert found.fingerprint == artifacts.PROFILE.read(run).fingerprint


@pytest.mark.parametrize("what", ["rewritten", "added", "touched", "removed"])
def test_another_listing_is_looked_into(tmp_path, what):
    fill(tmp_path / "in")
    run, _ = profiled(tmp_path)
    before = artifacts.PROFILE.read(run).fingerprint
    path = tmp_path / "in" / "3.parquet"
    if what == "rewritten":
        # Of the same size.
        size, table = path.stat().st_size, shards.rows(shards.vectors(10, seed=3), first_id=90)
        shards.write(path, table)
        assert path.stat().st_size == size
    elif what == "added":
        shards.write(tmp_path / "in" / "9.parquet", shards.rows(shards.vectors(10), first_id=90))
    elif what == "touched":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    assert opened_by_another_look(tmp_path, run) == NUM_FILES + {"added": 1, "removed": -1}.get(what, 0)
    found, inspected = pipeline.check_input(shards.settings(tmp_path / "in"), run)
    assert inspected is found
    assert (found.fingerprint == before) == (what == "touched")


def test_a_change_behind_a_link_is_seen(tmp_path):
    fill(tmp_path / "blobs")
    (tmp_path / "in").mkdir()
    for number in range(NUM_FILES):
        (tmp_path / "in" / f"{number}.parquet").symlink_to(f"../blobs/{number}.parquet")
    run, _ = profiled(tmp_path)
    assert opened_by_another_look(tmp_path, run) == 0
    shards.write(tmp_path / "blobs" / "3.parquet", shards.rows(shards.vectors(10, seed=3), first_id=90))
    assert opened_by_another_look(tmp_path, run) == NUM_FILES


def test_other_settings_and_unfinished_profiles_are_looked_into(tmp_path):
    fill(tmp_path / "in")
    run, _ = profiled(tmp_path)
    assert opened_by_another_look(tmp_path, run, input={"sample_rows": 7}) == NUM_FILES
    config = shards.settings(tmp_path / "in")
    fingerprint = artifacts.PROFILE.read(run).fingerprint
    run.begin("profile", config.settings("profile") | {"input_fingerprint": fingerprint})
    assert opened_by_another_look(tmp_path, run) == NUM_FILES


def test_npy_files_beside_are_in_no_listing_and_looked_into_each_time(tmp_path):
    columns = {"embedding_columns": {"npy": "NAME_{number}.npy".replace("NAME", f"{tmp_path}/in/x")}}
    for number in range(NUM_FILES):
        table = shards.rows(shards.vectors(10), first_id=number * 10).drop_columns("embedding")
        shards.write(tmp_path / "in" / f"part_{number}.parquet", table)
        np.save(tmp_path / "in" / f"x_{number}.npy", shards.vectors(10, seed=number))
    run, _ = profiled(tmp_path, input=columns)
    assert opened_by_another_look(tmp_path, run, input=columns) == NUM_FILES


def test_settings_that_do_not_fit_are_refused_without_a_look_at_the_files(tmp_path):
    fill(tmp_path / "in")
    run, _ = profiled(tmp_path)
    with pytest.raises(ConfigError, match="cluster.num_leaves=51 exceeds the 50 rows of the input"):
        opened_by_another_look(tmp_path, run, cluster={"num_leaves": 51})
    assert not run.lake.opened


def test_problems_of_the_input_are_told_before_anything_is_written(tmp_path):
    fill(tmp_path / "in")
    (tmp_path / "in" / "3.parquet").write_bytes(b"garbage")
    run = RunDir(CountingLake(), str(tmp_path / "runs"), "r1")
    with pytest.raises(DataError, match="3.parquet: cannot be read"):
        pipeline.check_input(shards.settings(tmp_path / "in"), run)
    assert not (tmp_path / "runs").exists()
