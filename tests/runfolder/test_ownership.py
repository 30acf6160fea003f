"""Whose folder it is: what is not raydc's stays as it is, byte for byte, whatever command meets it; no Ray here."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raydc import pipeline
from raydc.cli import main
from raydc.commands import compare, demo
from raydc.errors import ConfigError, StageError
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import acquire
from raydc.runfolder.ownership import LABELS, OwnedFolder, check_run_id, overlaps
from raydc.runtime import session
from raydc.storage.lake import Lake, join
from tests import shards

TIMES = {"heartbeat_seconds": 0.05, "stale_seconds": 5.0}

FOREIGN = {
    "names of our own folders": {
        "labels/human_labels.csv": b"id,label\n1,cat\n",
        "labels/part-00.parquet": b"PAR1 of somebody",
        "model/clip.pt": b"weights",
        "tree/wordnet.json": b"{}",
        "checkpoints/best.pt": b"weights",
        "sweep.json": b"[]",
        "sweep.md": b"# notes",
        "rejects/a.txt": b"",
        "stages/fit.json": b"{}",
        "_MANIFEST.json": b"{}",
    },
    "a run.json and labels.json of another program": {
        "run.json": b'{"run_id": "w4x1", "config": {"lr": 0.1}}',
        "labels.json": b'{"0": "cat", "1": "dog"}',
        "fit/a.bin": b"\0\1",
    },
    "markers that are no JSON": {"run.json": b"{", "labels.json": b"cat\n", "labels/a.csv": b"1"},
    "a contract in lease/": {"lease/agreement.pdf": b"%PDF", "lease/00000001.json": b"{}"},
    "a hidden file": {".notes.tmp": b"notes"},
}

COMMANDS = ("run", "dry run", "python", "sweep", "demo", "assign")


class Local:
    """A folder that stands for a lake."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def put(self, name: str, body: bytes) -> None:
        path = Path(self.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        os.utime(path, ns=(10**18, 10**18))

    def everything(self) -> dict:
        """Return contents and time of every file, and every folder."""
        paths = sorted(Path(self.root).rglob("*"))
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None for p in paths}


class Bucket:
    """A bucket that keeps every version, so that not even a deletion or a rewrite of the same bytes goes unseen."""

    def __init__(self, root: str, client) -> None:
        self.root, self._client, self._name = root, client, root.removeprefix("s3://")
        client.put_bucket_versioning(Bucket=self._name, VersioningConfiguration={"Status": "Enabled"})

    def put(self, name: str, body: bytes) -> None:
        self._client.put_object(Bucket=self._name, Key=name, Body=body)

    def everything(self) -> dict:
        """Return checksum and time of every version of every object, deletions among them."""
        found = self._client.list_object_versions(Bucket=self._name)
        assert not found["IsTruncated"]
        versions = [*found.get("Versions", []), *found.get("DeleteMarkers", [])]
        return {(v["Key"], v["VersionId"]): (v.get("ETag"), v["LastModified"], v["IsLatest"]) for v in versions}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path):
    if request.param == "local":
        (tmp_path / "lake").mkdir()
        return Local(tmp_path / "lake")
    return Bucket(request.getfixturevalue("bucket"), request.getfixturevalue("s3_client"))


@pytest.fixture
def rows(tmp_path):
    """A small input, far from every output."""
    x, _ = shards.near_corners(200)
    shards.write(tmp_path / "rows" / "a.parquet", shards.rows(x))
    return tmp_path / "rows"


@pytest.fixture
def model(tmp_path):
    shards.corner_model().save(Lake(), str(tmp_path / "trained" / "model"))
    return tmp_path / "trained"


class Reached(Exception):
    """The command came as far as the cluster."""


@pytest.fixture
def no_cluster(monkeypatch):
    """No command of these tests may start Ray; one that would raises Reached."""

    @contextmanager
    def refuse(config):
        raise Reached
        yield

    monkeypatch.setattr(session, "connected", refuse)


def job(folder: Path, path, output, **sections) -> str:
    """Write the settings of a small job and return their path."""
    values = {"lease": TIMES} | sections
    config = shards.settings(path if isinstance(path, list) else str(path), output=str(output), **values)
    (folder / "job.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return str(folder / "job.yaml")


def call(command: str, tmp_path: Path, rows, output: str, run_id: str, model: Path) -> None:
    """Start a command that would work in `<output>/<run_id>`."""
    config = job(tmp_path, rows, output)
    if command == "python":
        pipeline.run(shards.settings(rows, output=output, lease=TIMES), run_id)
        return
    main(
        {
            "run": ["run", "--config", config, f"--run-id={run_id}"],
            "dry run": ["run", "--config", config, f"--run-id={run_id}", "--dry-run"],
            "sweep": ["sweep", "--config", config, "--k", "2,3", f"--run-id={run_id}"],
            "demo": ["demo", "--output", output],
            "assign": ["assign", "--model", str(model), "--input", str(rows), "--output", join(output, run_id)],
        }[command]
    )


def refusal(capsys, command: str, *arguments) -> str:
    """Return the one message with which a command ends."""
    capsys.readouterr()
    if command == "python":
        with pytest.raises((ConfigError, StageError)) as caught:
            call(command, *arguments)
        return f"{type(caught.value).__name__}: {caught.value}"
    with pytest.raises(SystemExit) as stop:
        call(command, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(
    command, foreign, place, rows, model, tmp_path, capsys, no_cluster
):
    run_id = "demo" if command == "demo" else "imagenet"
    for name, body in FOREIGN[foreign].items():
        place.put(f"data/{run_id}/{name}", body)
    place.put("data/beside.txt", b"beside")
    before = place.everything()
    told = refusal(capsys, command, tmp_path, rows, f"{place.root}/data", run_id, model)
    assert f"{place.root}/data/{run_id} is not a folder of raydc: it" in told
    assert "Nothing there was touched. Use another --" in told
    assert place.everything() == before


@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep", "assign"])
@pytest.mark.parametrize("inside", ["imagenet/fit", "imagenet/labels/deep", "imagenet"])
def test_an_input_in_the_folder_of_the_run_is_refused_and_stays(
    command, inside, place, model, tmp_path, capsys, no_cluster
):
    x, _ = shards.near_corners(50)
    body = Path(shards.write(tmp_path / "a.parquet", shards.rows(x))).read_bytes()
    place.put(f"data/{inside}/a.parquet", body)
    before = place.everything()
    told = refusal(capsys, command, tmp_path, f"{place.root}/data/{inside}", f"{place.root}/data", "imagenet", model)
    assert "ConfigError: " in told and "raydc would mix what it reads with what it writes" in told
    assert place.everything() == before


@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep", "assign"])
@pytest.mark.parametrize(("path", "output"), [("data", "data/runs"), ("data/**/*.parquet", "data/runs"), ("", "data")])
def test_an_output_in_the_input_is_refused_before_anything_is_written(
    command, path, output, place, model, tmp_path, capsys, no_cluster
):
    place.put("data/a.parquet", b"")
    before = place.everything()
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


@pytest.mark.parametrize("run_id", BAD_IDS)
@pytest.mark.parametrize("command", ["run", "dry run", "python", "sweep"])
def test_a_name_that_is_no_run_id_is_refused_before_anything_is_touched(
    command, run_id, rows, model, tmp_path, capsys, no_cluster
):
    lake = Local(tmp_path / "lake")
    for name in ("labels/a.parquet", "model/config.json", "x/labels/a.csv", "runs/labels/a.parquet"):
        lake.put(name, b"somebody's")
    before = lake.everything()
    told = refusal(capsys, command, tmp_path, rows, f"{lake.root}/runs", run_id, model)
    assert "ConfigError: --run-id " in told and "begins with a letter or a digit" in told
    assert lake.everything() == before


def test_a_run_id_may_have_128_letters_digits_dots_hyphens_and_underscores():
    for run_id in ("a", "1", "imagenet-1", "20260101-120000", "A._-z", "x" * 128):
        check_run_id(run_id)
    with pytest.raises(ConfigError, match=r"--run-id '7' *:|--run-id"):
        check_run_id(7)


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
            assert found == [*leases, marker]


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
        _as_written_before(run.uri("run.json"), "format", "kind")
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
    _as_written_before(run.uri("run.json"), "format", "kind")
    run.lake.write_bytes(run.uri("exemplars.parquet"), b"kept")
    with pytest.raises(Reached):
        call(kind, tmp_path, rows, str(tmp_path / "runs"), "r", model)
    assert Path(run.uri("exemplars.parquet")).read_bytes() == b"kept"
    assert Lake().read_json(run.uri("run.json"))["kind"] == kind


def _sweep_marker(config, rows) -> dict:
    from raydc.config import digest
    from raydc.data.sample import profile_input

    settings = config.settings("fit") | {
        "sweep": config.sweep.model_dump(mode="json") | {"k": [2, 3]},
        "input_fingerprint": profile_input(config, Lake()).fingerprint,
    }
    return {"stage": "sweep", "fingerprint": digest(settings), "state": "running", "settings": settings}


def _as_written_before(uri: str, *keys: str) -> None:
    body = Lake().read_json(uri)
    Lake().write_json(uri, {k: v for k, v in body.items() if k not in keys})


def test_other_settings_are_refused_and_the_header_keeps_those_of_the_run(rows, model, tmp_path, no_cluster):
    run = RunDir(Lake(), str(tmp_path / "runs"), "r")
    with pytest.raises(Reached):
        call("run", tmp_path, rows, str(tmp_path / "runs"), "r", model)
    run.begin("profile", {"preprocess": {"method": "l2"}})
    before = Path(run.uri("run.json")).read_bytes()
    with pytest.raises(StageError, match="was started with other settings"):
        call("python", tmp_path, rows, str(tmp_path / "runs"), "r", model)
    assert Path(run.uri("run.json")).read_bytes() == before


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


# The demo's input.


@pytest.mark.parametrize(
    "foreign", [{"part-00002.parquet": b"PAR1 of somebody"}, {"readme.md": b"mine"}, {"part-9.parquet": b""}, None]
)
def test_the_demo_overwrites_no_file_where_its_input_belongs(foreign, place, tmp_path, capsys, no_cluster):
    if foreign is None:
        # Rows of somebody, under a name of the demo's.
        x, _ = shards.near_corners(20)
        foreign = {"part-00000.parquet": Path(shards.write(tmp_path / "x.parquet", shards.rows(x))).read_bytes()}
    for name, body in foreign.items():
        place.put(f"runs/input-digits/{name}", body)
    before = place.everything()
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output", f"{place.root}/runs"])
    assert stop.value.code == 2
    assert f"input-digits holds {next(iter(foreign))}, which is not the demo's" in capsys.readouterr().err
    assert place.everything() == before


def test_the_demo_completes_its_input_and_leaves_what_is_there(place, digits, no_cluster):
    for name in ("part-00000.parquet", "part-00003.parquet"):
        place.put(f"runs/input-digits/{name}", (digits / name).read_bytes())
    before = place.everything()
    for _ in range(2):
        with pytest.raises(Reached):
            main(["demo", "--output", f"{place.root}/runs"])
    after = place.everything()
    assert {key: after[key] for key in before if key in after} == before
    found = Lake().list_parquet(f"{place.root}/runs/input-digits")
    assert [f.uri.rpartition("/")[2] for f in found] == [p.name for p in sorted(digits.glob("*.parquet"))]
    for stored in found:
        with Lake().open_parquet(stored.uri) as handle:
            assert pq.read_table(handle).equals(pq.read_table(digits / stored.uri.rpartition("/")[2]))
    assert Lake().exists(f"{place.root}/runs/demo/run.json")


def test_a_refused_demo_writes_no_input(tmp_path):
    config = shards.settings(demo.DIGITS, output=str(tmp_path / "runs"))
    with pytest.raises(ConfigError):
        demo.with_data(config, lambda found: pipeline.check(found, "../x"))
    assert list(tmp_path.iterdir()) == []


# The files of a comparison.


@pytest.mark.parametrize(
    "foreign",
    [
        {"compare.json": b'{"rows": 3}'},
        {"compare.json": b"no JSON"},
        {"compare.md": b"# Comparison\n\nof somebody"},
        {"compare.json": b'{"rows": 1, "input_rows": 1, "num_leaves": 2, "entries": []}', "compare.md": b"# Mine"},
    ],
)
def test_a_comparison_overwrites_no_file_of_somebody_else(foreign, place, rows, tmp_path, capsys):
    for name, body in foreign.items():
        place.put(f"runs/{name}", body)
    before = place.everything()
    with pytest.raises(SystemExit) as stop:
        main(["compare", job(tmp_path, rows, f"{place.root}/runs"), "--objectives", "", "--classical", "kmeans"])
    assert stop.value.code == 2 and "not written by a comparison. Nothing was touched" in capsys.readouterr().err
    assert place.everything() == before


def test_a_comparison_replaces_its_own_files_alone(place, rows, tmp_path, capsys):
    for name, body in FOREIGN["names of our own folders"].items():
        place.put(f"runs/{name}", body)
    before = place.everything()
    arguments = ["compare", job(tmp_path, rows, f"{place.root}/runs"), "--objectives", "", "--classical", "kmeans"]
    for _ in range(2):
        main(arguments)
    after = place.everything()
    assert {key: after[key] for key in before} == before
    assert Lake().read_bytes(f"{place.root}/runs/compare.md").decode() in capsys.readouterr().out


def test_a_comparison_whose_output_lies_in_its_input_is_refused(rows):
    with pytest.raises(ConfigError, match=r"output=.* lies in input.path="):
        compare.check(shards.settings(rows, output=str(rows / "runs")))


# raydc assign.


def test_two_assigns_into_one_folder_do_not_both_write(place, rows, model, tmp_path, capsys, no_cluster):
    with pytest.raises(Reached):
        call("assign", tmp_path, rows, place.root, "new", model)
    with acquire(Lake(), f"{place.root}/new", **TIMES):
        before = Lake().read_bytes(f"{place.root}/new/labels.json")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            call("assign", tmp_path, rows, place.root, "new", model)
        assert f"{place.root}/new is driven by " in capsys.readouterr().err
        assert Lake().read_bytes(f"{place.root}/new/labels.json") == before


@pytest.mark.parametrize(
    ("change", "told"),
    [("input", "another input"), ("model", "another model"), ("columns", "another choice of columns")],
)
def test_an_assign_of_something_else_into_the_same_folder_is_refused(
    change, told, place, rows, model, tmp_path, capsys, no_cluster
):
    arguments = ["assign", "--model", str(model), "--input", str(rows), "--output", f"{place.root}/new"]
    with pytest.raises(Reached):
        main(arguments)
    before = place.everything()
    if change == "input":
        shutil.copy(rows / "a.parquet", rows / "b.parquet")
    elif change == "model":
        shards.corner_model(levels={}).save(Lake(), str(model / "model"))
    else:
        arguments += ["--set", "input.on_bad_rows=quarantine"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"holds labels made from {told}. Use another --output." in capsys.readouterr().err
    assert place.everything() == before


@pytest.mark.parametrize("inside", ["", "/model", "/new"])
def test_an_assign_into_the_folder_of_its_model_is_refused(inside, rows, model, tmp_path, capsys, no_cluster):
    place = Local(model)
    before = place.everything()
    for named in (model, model / "model"):
        with pytest.raises(SystemExit):
            main(["assign", "--model", str(named), "--input", str(rows), "--output", f"{model}{inside}"])
        assert f"--output {model}{inside} lies in --model {model}" in capsys.readouterr().err
    assert place.everything() == before


def test_an_assign_of_an_earlier_version_goes_on(rows, model, tmp_path, no_cluster):
    with pytest.raises(Reached):
        call("assign", tmp_path, rows, str(tmp_path), "new", model)
    uri = str(tmp_path / "new" / "labels.json")
    now = Lake().read_json(uri)
    _as_written_before(uri, "format", "format_version", "predictor", "columns")
    shutil.rmtree(tmp_path / "new" / "lease")
    (tmp_path / "new" / "slices").mkdir()
    with pytest.raises(Reached):
        call("assign", tmp_path, rows, str(tmp_path), "new", model)
    assert Lake().read_json(uri) == now
    assert set(now) == {"format", "format_version", "model", "predictor", "input", "columns"}


# How a folder is looked at.


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
