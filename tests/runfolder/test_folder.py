"""A run folder: markers, resume, and the refusal of other settings."""

import json

import pytest

from raydc import pipeline
from raydc.cli import main
from raydc.data.schema import FORMAT_VERSION
from raydc.errors import StageError
from raydc.runfolder import folder
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake
from tests import shards

STAGES = ("profile", "fit", "merge", "assign", "evaluate", "report", "publish")


@pytest.fixture
def run(tmp_path):
    return RunDir(Lake(), str(tmp_path / "runs"), "r1")


def test_the_folder_is_output_and_run_id(run, tmp_path, monkeypatch):
    assert run.uri("labels", "a.parquet") == f"{tmp_path}/runs/r1/labels/a.parquet"
    monkeypatch.chdir(tmp_path)
    assert RunDir(Lake(), "runs", "r1").root == run.root


def test_a_stage_goes_from_unknown_to_running_to_done(run):
    settings = {"seed": 0}
    assert run.marker("fit") is None
    assert not run.is_done("fit", settings)
    run.begin("fit", settings)
    assert run.marker("fit")["state"] == "running"
    assert not run.is_done("fit", settings)
    with pytest.raises(StageError, match="fit: run 'r1' has not finished this stage"):
        run.metrics("fit")
    run.mark_done("fit", settings, 1.23456, {"loss": 0.5})
    assert run.is_done("fit", settings)
    assert run.metrics("fit") == {"loss": 0.5}
    assert run.marker("fit")["seconds"] == 1.235


@pytest.mark.parametrize("state", ["running", "done"])
def test_a_rerun_with_other_settings_is_refused_and_told_which(run, state):
    before = shards.settings("data", autoencoder={"latent_dim": 10})
    now = shards.settings("data", autoencoder={"latent_dim": 32}, seed=3)
    run.begin("fit", before.settings("fit"))
    if state == "done":
        run.mark_done("fit", before.settings("fit"), 1.0, {})
    with pytest.raises(StageError) as caught:
        run.is_done("fit", now.settings("fit"))
    assert str(caught.value) == (
        "fit: run 'r1' was started with other settings: autoencoder.latent_dim was 10, is 32; seed was 0, is 3. "
        f"Use a new --run-id, or delete {run.uri('stages', 'fit.json')} and the markers of the stages after it to do "
        "them again."
    )


def test_another_input_is_refused_like_another_setting(run):
    settings = shards.settings("data").settings("profile")
    run.mark_done("profile", settings | {"input_fingerprint": "aa"}, 1.0, {})
    with pytest.raises(StageError, match="other settings: input_fingerprint was 'aa', is 'bb'"):
        run.is_done("profile", settings | {"input_fingerprint": "bb"})


def test_a_setting_that_did_not_exist_before_is_refused_with_a_reason(run):
    run.mark_done("fit", {"fit": {}}, 1.0, {})
    with pytest.raises(StageError, match="other settings: a setting was added or removed"):
        run.is_done("fit", {"fit": {"max_rows": None}})


def test_operational_settings_may_change_between_runs(run):
    before, now = shards.settings("data"), shards.settings("data", fit={"num_workers": 4}, output="elsewhere")
    for stage in STAGES:
        run.mark_done(stage, before.settings(stage), 1.0, {})
        assert run.is_done(stage, now.settings(stage))


def test_settings_are_equal_after_their_way_through_json(run):
    config = shards.settings("data", merge={"levels": [2, 3]}, input={"carry_columns": ["uri"], "image_shape": [1, 2]})
    for stage in STAGES:
        run.mark_done(stage, config.settings(stage), 1.0, {})
        assert run.marker(stage)["settings"] == config.settings(stage)


def test_the_header_holds_what_a_rerun_needs(run):
    config = shards.settings("data", seed=5)
    run.write_header(config)
    header = json.loads(Lake().read_bytes(run.uri("run.json")))
    assert (header["run_id"], header["seed"], header["format_version"]) == ("r1", 5, FORMAT_VERSION)
    assert type(config).model_validate(header["config"]) == config
    assert {"python", "ray", "torch", "numpy", "pyarrow"} <= set(header["versions"])
    assert header["started"].endswith("Z")


def test_the_header_tells_of_the_last_driver_and_the_first_start(run, monkeypatch):
    run.write_header(shards.settings("data"))
    monkeypatch.setattr(folder, "now", lambda: "later")
    run.write_header(shards.settings("data", fit={"num_workers": 3}))
    header = run.lake.read_json(run.uri("run.json"))
    assert header["config"]["fit"]["num_workers"] == 3 and header["started"].startswith("20")


def test_a_run_of_the_former_format_is_refused_with_what_to_do_but_can_be_read(run):
    config = shards.settings("data")
    assert run.header("run") is None
    run.write_header(config)
    assert run.header("run")["run_id"] == "r1"
    old = run.lake.read_json(run.uri("run.json")) | {"format_version": 1}
    run.lake.write_json(run.uri("run.json"), old)
    text = "run: run 'r1' in .* was written by format 1, and this raydc writes format 2. Use a new --run-id"
    for call in (lambda: run.check(config), lambda: run.write_header(config), lambda: run.header("run")):
        with pytest.raises(StageError, match=text):
            call()
    assert run.header() == old


def test_a_job_does_not_start_in_a_folder_of_the_former_format_and_its_reader_is_not_warned(tmp_path, capsys):
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(shards.vectors(50)))
    config = shards.settings(tmp_path / "in", output=str(tmp_path / "runs"))
    run = RunDir(Lake(), config.output, "r1")
    run.write_header(config)
    header = run.lake.read_json(run.uri("run.json"))
    header["config"]["neighbours"] = header["config"].pop("neighbors")
    run.lake.write_json(run.uri("run.json"), header | {"format_version": 1})
    before = (tmp_path / "runs" / "r1" / "run.json").read_bytes()
    with pytest.raises(StageError, match="written by format 1, .* Use a new --run-id"):
        pipeline.run(config, "r1")
    for command in ("resume", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, run.root])
        assert "written by format 1" in capsys.readouterr().err
    main(["show", run.root])
    assert "left        profile, " in capsys.readouterr().out
    assert [p.read_bytes() for p in (tmp_path / "runs" / "r1").iterdir()] == [before]


def test_remove_forgets_files_folders_and_what_is_not_there(run):
    run.begin("fit", {})
    run.lake.write_bytes(run.uri("labels", "a.parquet"), b"")
    run.remove("labels", "stages/fit.json", "none")
    assert run.lake.find(run.root) == []


@pytest.mark.s3
def test_a_run_folder_may_lie_in_s3(bucket):
    run = RunDir(Lake(), f"{bucket}/runs", "r1")
    run.begin("fit", {"seed": 0})
    run.mark_done("fit", {"seed": 0}, 1.0, {"loss": 0.5})
    assert run.is_done("fit", {"seed": 0})
    assert [f.uri for f in run.lake.find(run.root)] == [f"{bucket}/runs/r1/stages/fit.json"]
