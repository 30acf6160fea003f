"""Whose folder it is: one that is not raydc's stays as it is, byte for byte, whatever command meets it; no Ray here."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raydc.cli import main
from raydc.errors import StageError
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import acquire
from raydc.runfolder.ownership import LABELS, OwnedFolder
from raydc.storage.lake import Lake
from tests import shards
from tests.foreign import COMMANDS, FOREIGN, TIMES, Local, Reached, as_written_before, call, refusal


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(
    command, place, rows, model, tmp_path, capsys, no_cluster
):
    run_id = "demo" if command == "demo" else "imagenet"
    place.put("data/beside.txt", b"beside")
    for number, (kind, files) in enumerate(FOREIGN.items()):
        for name, body in files.items():
            place.put(f"data/{number}/{run_id}/{name}", body)
        before = place.everything()
        told = refusal(capsys, command, tmp_path, rows, f"{place.root}/data/{number}", run_id, model)
        assert f"{place.root}/data/{number}/{run_id} is not a folder of raydc: it" in told, kind
        assert "Nothing there was touched. Use another --" in told
        assert place.everything() == before, kind


def test_a_folder_whose_name_is_no_run_id_is_shown_and_not_resumed(rows, tmp_path, capsys, no_cluster):
    run = RunDir(Lake(), str(tmp_path / "runs"), "my run")
    run.write_header(shards.settings(rows, output=str(tmp_path / "runs")))
    main(["show", run.root])
    with pytest.raises(SystemExit):
        main(["resume", run.root])
    assert "ConfigError: --run-id 'my run'" in capsys.readouterr().err
    assert [f.uri for f in Lake().find(run.root)] == [run.uri("run.json")]


@pytest.mark.parametrize("command", ["show", "evaluate", "resume"])
def test_a_run_json_of_another_program_is_no_run(command, place, capsys):
    place.put("w/run.json", b'{"run_id": "w4x1", "config": {"lr": 0.1}}')
    place.put("w/metrics.json", b"{}")
    before = place.everything()
    with pytest.raises(SystemExit) as stop:
        main([command, f"{place.root}/w"])
    assert stop.value.code == 2 and "its run.json is not one that raydc wrote" in capsys.readouterr().err
    assert place.everything() == before


def test_the_folder_is_claimed_before_the_cluster_is_joined_and_the_same_command_goes_on(
    place, rows, model, tmp_path, no_cluster
):
    for command, name, marker in (("run", "r", "run.json"), ("sweep", "s", "run.json"), ("assign", "a", "labels.json")):
        for number in (1, 2):
            with pytest.raises(Reached):
                call(command, tmp_path, rows, f"{place.root}/runs", name, model)
            root = f"{place.root}/runs/{name}"
            found = [f.uri.removeprefix(f"{root}/") for f in Lake().find(root)]
            leases = [f"lease/{n:08d}{kind}" for n in range(1, number + 1) for kind in (".beat.json", ".json")]
            assert found == sorted([*leases, marker])


def test_a_driver_that_died_between_the_lease_and_the_claim_leaves_a_folder_that_may_be_claimed(
    place, rows, model, tmp_path, no_cluster
):
    for command, name in (("run", "r"), ("sweep", "s"), ("assign", "a")):
        root = f"{place.root}/runs/{name}"
        with acquire(Lake(), root, **TIMES):
            pass
        if isinstance(place, Local):
            # What a writer that was killed leaves.
            marker = "labels" if command == "assign" else "run"
            Path(root, f".{marker}.json.4711.0123abcd.tmp").write_bytes(b"{")
            Path(root, "lease", ".00000002.json.4711.0123abcd.tmp").write_bytes(b"{")
        with pytest.raises(Reached):
            call(command, tmp_path, rows, f"{place.root}/runs", name, model)


def test_a_folder_that_becomes_somebody_elses_after_the_first_look_is_left_as_it_is(place, rows):
    run = RunDir(Lake(), f"{place.root}/runs", "r")
    config = shards.settings(rows, output=f"{place.root}/runs")
    run.check(config)
    place.put("runs/r/labels/a.csv", b"1,cat")
    before = place.everything()
    with pytest.raises(StageError, match="it holds labels, and no run.json"):
        run.write_header(config)
    assert place.everything() == before


@pytest.mark.parametrize("kinds", [("run", "run", "run"), ("run", "sweep", "run", "sweep")])
def test_of_drivers_that_claim_a_folder_at_once_one_wins(place, rows, kinds):
    config = shards.settings(rows, output=f"{place.root}/runs")
    barrier, over = threading.Barrier(len(kinds)), threading.Event()

    def claim(kind):
        run = RunDir(Lake(), f"{place.root}/runs", "r")
        barrier.wait()
        try:
            run.check(config, kind)
            with acquire(Lake(), run.root, heartbeat_seconds=0.05, stale_seconds=60) as lease:
                run.fence = lease.fence
                run.write_header(config, kind)
                assert over.wait(60)
                return kind
        except StageError as error:
            assert "is driven by" in str(error) or "belongs to `raydc" in str(error)
            return None

    with ThreadPoolExecutor(len(kinds)) as pool:
        waiting = [pool.submit(claim, kind) for kind in kinds]
        until = time.monotonic() + 60
        while sum(w.done() for w in waiting) < len(kinds) - 1 and time.monotonic() < until:
            time.sleep(0.02)
        over.set()
        won = [kind for w in waiting if (kind := w.result())]
    assert len(won) == 1
    assert Lake().read_json(f"{place.root}/runs/r/run.json")["kind"] == won[0]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("first", "second"), [("run", "sweep"), ("sweep", "run")])
def test_a_run_and_a_sweep_do_not_share_a_folder(first, second, earlier, rows, model, tmp_path, capsys, no_cluster):
    run = RunDir(Lake(), str(tmp_path / "runs"), "r")
    run.write_header(shards.settings(rows, output=str(tmp_path / "runs")), first)
    run.begin("sweep" if first == "sweep" else "fit", {})
    if earlier:
        as_written_before(run.uri("run.json"), "format", "kind")
    run.lake.write_bytes(run.uri("checkpoints", "epoch-3"), b"state")
    place = Local(tmp_path / "runs")
    before = place.everything()
    told = refusal(capsys, second, tmp_path, rows, str(tmp_path / "runs"), "r", model)
    assert f"{run.root} belongs to `raydc {first}`, whose files would be lost" in told
    assert place.everything() == before


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_folder_of_an_earlier_version_goes_on(kind, rows, model, tmp_path, no_cluster):
    run = RunDir(Lake(), str(tmp_path / "runs"), "r")
    run.write_header(shards.settings(rows, output=str(tmp_path / "runs")), kind)
    if kind == "sweep":
        with pytest.raises(Reached):
            call(kind, tmp_path, rows, str(tmp_path / "other"), "r", model)
        # Nothing was begun there yet; an earlier version began before it joined a cluster.
        config = shards.settings(rows, output=str(tmp_path / "runs"))
        run.lake.write_json(run.uri("stages", "sweep.json"), _sweep_marker(config, rows))
    as_written_before(run.uri("run.json"), "format", "kind")
    run.lake.write_bytes(run.uri("exemplars.parquet"), b"kept")
    with pytest.raises(Reached):
        call(kind, tmp_path, rows, str(tmp_path / "runs"), "r", model)
    assert Path(run.uri("exemplars.parquet")).read_bytes() == b"kept"
    assert Lake().read_json(run.uri("run.json"))["kind"] == kind


def _sweep_marker(config, rows) -> dict:
    from raydc.config import digest, dump
    from raydc.data.sample import profile_input

    settings = config.settings("fit") | {
        "sweep": dump(config.sweep) | {"k": [2, 3]},
        "input_fingerprint": profile_input(config, Lake()).fingerprint,
    }
    return {"stage": "sweep", "fingerprint": digest(settings), "state": "running", "settings": settings}


def test_other_settings_are_refused_and_the_header_keeps_those_of_the_run(rows, model, tmp_path, no_cluster):
    run = RunDir(Lake(), str(tmp_path / "runs"), "r")
    with pytest.raises(Reached):
        call("run", tmp_path, rows, str(tmp_path / "runs"), "r", model)
    run.begin("profile", {"preprocess": {"method": "l2"}})
    before = Path(run.uri("run.json")).read_bytes()
    with pytest.raises(StageError, match="was started with other settings"):
        call("python", tmp_path, rows, str(tmp_path / "runs"), "r", model)
    assert Path(run.uri("run.json")).read_bytes() == before


@pytest.mark.s3
def test_an_object_that_marks_a_folder_is_no_content(s3_client, bucket):
    for name in ("runs/", "runs/r/"):
        s3_client.put_object(Bucket=bucket.removeprefix("s3://"), Key=name, Body=b"")
    assert Lake().names(f"{bucket}/runs/r") == []
    assert OwnedFolder(Lake(), f"{bucket}/runs/r", LABELS).read_owner() is None
    s3_client.put_object(Bucket=bucket.removeprefix("s3://"), Key="runs/r/a/b/c", Body=b"")
    assert Lake().names(f"{bucket}/runs/r") == ["a"]


def test_the_names_in_a_folder_are_those_one_level_down(place):
    assert Lake().names(f"{place.root}/none") == []
    for name in ("f/b/c.txt", "f/a.txt", "f/.hidden", "file"):
        place.put(name, b"1")
    assert Lake().names(f"{place.root}/f") == [".hidden", "a.txt", "b"] == Lake().names(f"{place.root}/f/")
    assert Lake().names(f"{place.root}/file") == [""]


def test_a_file_in_the_place_of_the_folder_and_an_empty_folder_in_it_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run" / "labels").mkdir(parents=True)
    for name, told in (("file", "is not a folder of raydc"), ("run", "it holds labels, and no run.json")):
        with pytest.raises(StageError, match=told):
            RunDir(Lake(), str(tmp_path), name).header()
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "run" / "labels").is_dir()
