"""Names of runs, and places that lie within one another: refused before anything is touched; no Ray here."""

import os

import pytest

from raydc import pipeline
from raydc.errors import ConfigError
from raydc.runfolder.folder import RunDir
from raydc.runfolder.ownership import check_run_id, overlaps
from raydc.storage.lake import Lake
from tests import shards
from tests.foreign import Local, Reached, call, refusal


@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep", "assign"])
def test_an_input_in_the_folder_of_the_run_is_refused_and_stays(
    command, place, rows, model, tmp_path, capsys, no_cluster
):
    for inside in ("imagenet/fit", "imagenet/labels/deep", "imagenet"):
        place.put(f"data/{inside}/a.parquet", (rows / "a.parquet").read_bytes())
        before = place.everything()
        source = f"{place.root}/data/{inside}"
        told = refusal(capsys, command, tmp_path, source, f"{place.root}/data", "imagenet", model)
        assert "ConfigError: " in told and "raydc would mix what it reads with what it writes" in told
        assert place.everything() == before


@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep", "assign"])
def test_an_output_in_the_input_is_refused_before_anything_is_written(
    command, place, model, tmp_path, capsys, no_cluster
):
    place.put("data/a.parquet", b"")
    before = place.everything()
    for path, output in (("data", "data/runs"), ("data/**/*.parquet", "data/runs"), ("", "data")):
        told = refusal(capsys, command, tmp_path, f"{place.root}/{path}", f"{place.root}/{output}", "first", model)
        assert "ConfigError: " in told and f"/{output}" in told and " lies in " in told
        assert place.everything() == before


@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep"])
def test_an_input_below_the_output_is_refused_for_a_new_run_and_may_go_on_in_an_earlier_one(
    command, place, rows, model, tmp_path, capsys, no_cluster
):
    place.put("data/rows/a.parquet", (rows / "a.parquet").read_bytes())
    arguments = (tmp_path, f"{place.root}/data/rows", f"{place.root}/data", "first", model)
    before = place.everything()
    assert f"input.path={place.root}/data/rows lies in output=" in refusal(capsys, command, *arguments)
    assert place.everything() == before
    run = RunDir(Lake(), f"{place.root}/data", "first")
    config = shards.settings(arguments[1], output=arguments[2])
    run.write_header(config, "sweep" if command == "sweep" else "run")
    if command == "dry run":
        call(command, *arguments)
    else:
        with pytest.raises(Reached):
            call(command, *arguments)


# Fields: input, output, whether they meet.
PLACES = [
    ("data", "data", True),
    ("data/", "data", True),
    ("./data/../data", "data", True),
    ("data", "data/runs", True),
    ("data/in", "data", True),
    ("data", "runs", False),
    ("data", "data-runs", False),
    ("data-in", "data", False),
    ("lake/in", "lake/runs", False),
    ("runs/first/labels", "runs", True),
    (["elsewhere", "runs/in"], "runs", True),
    (["elsewhere", "other"], "runs", False),
    ("data/*.parquet", "data", True),
    ("data/*.parquet", "data/runs", False),
    ("data/*/*.parquet", "data/runs", True),
    ("data/r?ns/*.parquet", "data/runs", True),
    ("data/[!r]*/*.parquet", "data/runs", False),
    ("data/*/*.parquet", "data/runs/all", False),
    ("data/**/*.parquet", "data/runs/all", True),
    ("d*/in/a.parquet", "data", True),
    ("runs/in/a.parquet", "runs", True),
    ("/", "runs", True),
    ("s3://b/data", "s3://b/data/runs", True),
    ("s3://b/data/", "s3a://b/data", True),
    ("s3n://b/data/in", "s3://b/data", True),
    ("s3://b", "s3://b/runs", True),
    ("s3://b/in", "s3://b", True),
    ("s3://b/in", "s3://b/runs", False),
    ("s3://b/data", "s3://other/data", False),
    ("s3://b/data", "gs://b/data", False),
    ("gcs://b/data", "gs://b/data/runs", True),
    ("s3://b/*/part.parquet", "s3://b/runs", True),
    ("s3://b/data", "b/data", False),
]


@pytest.mark.parametrize(("path", "output", "meet"), PLACES)
def test_places_that_share_a_file_are_told_from_those_that_do_not(path, output, meet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bool(overlaps("input.path=", path, "output=", output)) == meet
    if isinstance(path, str) and "://" not in path and "://" not in output:
        for first in (path, f"file://{os.path.abspath(path)}"):
            for second in (output, f"{output}/", os.path.abspath(output), f"file://{os.path.abspath(output)}"):
                assert bool(overlaps("input.path=", first, "output=", second)) == meet, (first, second)


def test_a_link_is_followed_to_the_place_that_it_names(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert overlaps("", str(tmp_path / "link"), "", str(tmp_path / "data" / "runs"))
    assert overlaps("", str(tmp_path / "data" / "*" / "*.parquet"), "", str(tmp_path / "link" / "runs"))
    assert not overlaps("", str(tmp_path / "link"), "", str(tmp_path / "runs"))


def test_the_message_says_which_lies_in_which():
    (told,) = overlaps("input.path=", "s3://b/in", "output=", "s3://b")
    assert told.startswith("input.path=s3://b/in lies in output=s3://b: ")
    (told,) = overlaps("input.path=", "s3://b/d/**/*.parquet", "output=", "s3://b/d/runs")
    assert told.startswith("output=s3://b/d/runs lies in input.path=s3://b/d/**/*.parquet: ")


BAD_IDS = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/x",
    "a\\b",
    ".x",
    "_x",
    "-x",
    "a b",
    "a\n",
    "\u00e9",
    "~",
    "x" * 129,
    "s3://b/x",
]


@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep"])
def test_a_name_that_is_no_run_id_is_refused_before_anything_is_touched(
    command, rows, model, tmp_path, capsys, no_cluster
):
    lake = Local(tmp_path / "lake")
    for name in ("labels/a.parquet", "model/config.json", "x/labels/a.csv", "runs/labels/a.parquet"):
        lake.put(name, b"somebody's")
    before = lake.everything()
    for run_id in BAD_IDS:
        told = refusal(capsys, command, tmp_path, rows, f"{lake.root}/runs", run_id, model)
        assert "ConfigError: --run-id " in told and "begins with a letter or a digit" in told, run_id
        assert lake.everything() == before, run_id


def test_a_run_id_may_have_128_letters_digits_dots_hyphens_and_underscores():
    for run_id in ("a", "1", "imagenet-1", "20260101-120000", "A._-z", "x" * 128):
        check_run_id(run_id)
    with pytest.raises(ConfigError, match="--run-id '7': a run id has 1 to 128"):
        check_run_id(7)


def test_a_teacher_in_the_folder_of_the_run_is_refused(tmp_path, model):
    sections = {"fit": {"objective": "distill", "teacher": str(tmp_path / "runs" / "r" / "model")}}
    config = shards.settings(tmp_path / "rows", output=str(tmp_path / "runs"), **sections)
    with pytest.raises(ConfigError, match=r"fit.teacher=.* lies in the run folder "):
        pipeline.check(config, "r")
    pipeline.check(config, "another")


def test_an_input_in_a_shared_delta_table_is_refused(tmp_path):
    publish = {"delta": {"uri": str(tmp_path / "lake")}}
    config = shards.settings(tmp_path / "lake" / "rows", output=str(tmp_path / "lake" / "_runs"), publish=publish)
    with pytest.raises(ConfigError, match=r"input.path=.* lies in publish.delta.uri="):
        pipeline.check(config, "r")
