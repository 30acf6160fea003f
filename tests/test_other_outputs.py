"""What demo, compare and assign write, beside files of somebody else; no Ray here."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydc import pipeline
from raydc.cli import main
from raydc.commands import compare, demo
from raydc.errors import ConfigError
from raydc.runfolder.lease import acquire
from raydc.storage.lake import Lake
from tests import shards
from tests.foreign import FOREIGN, TIMES, Local, Reached, as_written_before, call, job

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
    as_written_before(uri, "format", "format_version", "predictor", "columns")
    shutil.rmtree(tmp_path / "new" / "lease")
    (tmp_path / "new" / "slices").mkdir()
    with pytest.raises(Reached):
        call("assign", tmp_path, rows, str(tmp_path), "new", model)
    assert Lake().read_json(uri) == now
    assert set(now) == {"format", "format_version", "model", "predictor", "input", "columns"}
