"""The first minute at the command line: the plan comes fast and refuses what cannot work; nothing here starts Ray."""

import os
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest

from raydc import cli
from tests import shards


@pytest.fixture
def rows(tmp_path):
    shards.write(tmp_path / "in/a.parquet", shards.rows(shards.vectors(40)))
    return tmp_path / "in"


def raydc(capsys, *arguments: str) -> tuple[object, str, str]:
    """Return exit code, output and errors of a command."""
    try:
        cli.main(list(arguments))
        code: object = 0
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


def plan(capsys, path, output, *settings: str) -> tuple[object, str, str]:
    given = [f"input.path={path}", f"output={output}", "cluster.num_leaves=4", *settings]
    return raydc(capsys, "run", "--dry-run", *(part for s in given for part in ("--set", s)))


def test_settings_need_no_file(capsys, rows, tmp_path):
    code, out, _ = plan(capsys, rows, tmp_path / "runs")
    assert code == 0
    assert "rows        40 in 1 slices" in out
    assert not (tmp_path / "runs").exists()
    code, _, err = raydc(capsys, "run", "--dry-run", "--set", "seed=1")
    assert (code, err) == (2, "ConfigError: raydc run: give --config FILE, or at least --set input.path=FOLDER.\n")


def test_a_plan_loads_neither_ray_nor_what_only_the_stages_need(rows, tmp_path):
    script = f"""
import sys
from raydc import cli
cli.main(["run", "--dry-run", "--set", "input.path={rows}", "--set", "cluster.num_leaves=4", "--set",
          "output={tmp_path}/runs"])
heavy = {{"ray", "faiss", "sklearn", "scipy", "matplotlib", "jinja2", "s3fs"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_version_is_told(capsys):
    assert raydc(capsys, "--version")[:2] == (0, f"raydc {metadata.version('raydc')}\n")


@pytest.mark.parametrize("name", ["set #2", "on", "2024", "a: b", "run[1]", "null"])
def test_a_path_is_taken_as_it_is_written(capsys, monkeypatch, rows, tmp_path, name):
    rows.rename(tmp_path / name)
    shards.write(tmp_path / "set/a.parquet", shards.rows(shards.vectors(7)))
    shards.write(tmp_path / "run1/a.parquet", shards.rows(shards.vectors(7)))
    code, out, err = plan(capsys, tmp_path / name, tmp_path / "runs #1")
    assert code == 0, err
    assert "rows        40 in 1 slices" in out
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(capsys, name, "runs")
    assert code == 0, err
    assert "rows        40 in 1 slices" in out


def test_an_output_that_cannot_be_written_is_refused_by_the_plan(capsys, rows, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = plan(capsys, rows, tmp_path / "file" / "runs")
    assert code == 2
    assert f"{tmp_path}/file is there and no folder. Move it away, or use another output." in err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_an_output_without_the_right_to_write_is_refused_by_the_plan(capsys, rows, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = plan(capsys, rows, tmp_path / "locked" / "runs")
    assert code == 2
    assert "locked may not be written. Give this user the right to write there" in err


def test_what_was_passed_over_stands_in_the_plan(capsys, rows, tmp_path):
    (rows / "notes.csv").touch()
    x = shards.vectors(400)
    x[3] = 1e9
    shards.write(rows / "b.parquet", shards.rows(x))
    code, out, _ = plan(capsys, rows, tmp_path / "runs")
    assert code == 0
    assert "note        passed over 1 entry: 1 *.csv (such as " in out
    assert "note        1 of 440 sampled rows are over 1000 times as long as the median row" in out


def test_bad_rows_are_told_with_their_remedy(capsys, rows, tmp_path):
    x = shards.vectors(10)
    x[3] = np.float32(1e30)
    shards.write(rows / "b.parquet", shards.rows(x))
    code, _, err = plan(capsys, rows, tmp_path / "runs")
    assert code == 2
    assert "row 3 (id 3) is bad: too_large" in err
    assert "input.on_bad_rows=quarantine" in err
