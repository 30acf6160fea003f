"""The commands sweep and compare, on scikit-learn's digits."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from raydc.cli import main
from raydc.commands.sweep import parse_numbers
from raydc.data import json_schema
from tests.small_job import settings


def write_config(digits, folder, **sections):
    """Write a small job's settings and return the path."""
    small = {"pretrain": {"num_epochs": 5}, "refine": {"num_epochs": 1}} | sections
    values = json.loads(settings(digits, folder / "runs", **small).model_dump_json())
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "job.yaml")


def test_the_numbers_of_leaves_are_a_range_or_a_list():
    assert parse_numbers("5:50:5") == (5, 10, 15, 20, 25, 30, 35, 40, 45, 50)
    assert parse_numbers("8,2,8,5") == (2, 5, 8)


@pytest.mark.parametrize("text", ["5", "1,4", "5:2:1", "a,b", "2:10:0", "2:3"])
def test_other_numbers_of_leaves_are_refused(text, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--config", str(tmp_path / "none.yaml"), "--k", text])
    assert stop.value.code == 2
    assert f"ConfigError: --k {text}: expected" in capsys.readouterr().err


def test_a_sweep_writes_its_table_and_figure_and_is_not_done_twice(ray_cluster, digits, tmp_path, capsys):
    config = write_config(digits, tmp_path)
    main(["sweep", "--config", config, "--k", "4,10,16", "--run-id", "s", "--set", "fit.max_rows=1500"])
    text = capsys.readouterr().out
    body = json.loads((tmp_path / "runs" / "s" / "sweep.json").read_text())
    jsonschema.validate(body, json_schema.schema("sweep"))
    assert [e["k"] for e in body["entries"]] == [4, 10, 16]
    rows = body["rows"]
    assert rows["input"] == 1797 and rows["trained"] + rows["held_out"] == pytest.approx(1500, abs=100)
    assert rows["held_out"] == pytest.approx(150, abs=40) and rows["sample"] == rows["trained"]
    assert all(0 < e["nmi"] <= 1 and e["g"] > 0 and -1 <= e["silhouette"] <= 1 for e in body["entries"])
    assert body["recommendation"]["sentence"] in text and "NMI" in text
    assert Path(tmp_path / "runs" / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| K | inertia |" in (tmp_path / "runs" / "s" / "sweep.md").read_text()
    main(["sweep", "--config", config, "--k", "4,10,16", "--run-id", "s", "--set", "fit.max_rows=1500"])
    assert "sweep: done earlier, skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_tells_methods_rows_seeds_and_noise(digits, tmp_path, capsys):
    config = write_config(digits, tmp_path, cluster={"num_restarts": 2})
    main(["compare", config, "--seeds", "0,1", "--objectives", "autoencoder,dec", "--rows", "600",
          "--classical", "kmeans,dbscan,agglomerative"])  # fmt: skip
    text = capsys.readouterr().out
    body = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert body["rows"] == pytest.approx(600, abs=80) and body["input_rows"] == 1797
    by_method = {}
    for entry in body["entries"]:
        by_method.setdefault(entry["method"], []).append(entry)
    assert {m: len(found) for m, found in by_method.items()} == {
        "autoencoder": 2, "dec": 2, "kmeans": 2, "dbscan": 1, "agglomerative": 1,
    }  # fmt: skip
    assert all(e["rows"] == body["rows"] and 0 <= e["nmi"] <= 1 for e in body["entries"])
    (dbscan,) = by_method["dbscan"]
    assert dbscan["noise"] > 0 and "eps" in dbscan["parameters"]
    assert by_method["kmeans"][0]["nmi"] > 0.5
    assert "| method | rows | seeds |" in text and "seed 1" in text
    assert (tmp_path / "runs" / "compare.md").read_text() in text


def test_an_unknown_classical_method_is_refused(digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", write_config(digits, tmp_path), "--classical", "kmaens"])
    assert stop.value.code == 2
    assert "--classical kmaens: not known. Choose from kmeans," in capsys.readouterr().err
