"""The whole job on scikit-learn's digits, on a real Ray cluster."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raydc import pipeline
from raydc.cli import main
from raydc.data import json_schema
from raydc.data.schema import labels_schema
from raydc.errors import DataError, StageError
from raydc.model import Model
from raydc.runfolder import artifacts
from raydc.runtime import session
from raydc.storage.lake import Lake
from tests.small_job import read_input, read_labels, settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def output(on_one_worker):
    """The folder of the shared run's folder."""
    return Path(on_one_worker.root).parent


@pytest.fixture(scope="module")
def on_two_workers(ray_cluster, digits, tmp_path_factory):
    return pipeline.run(settings(digits, tmp_path_factory.mktemp("runs"), fit={"num_workers": 2}), "two")


def test_the_job_finds_the_digits(on_one_worker, digits):
    metrics = on_one_worker.lake.read_json(on_one_worker.uri("metrics.json"))
    assert metrics["rows"] == {"input": 1797, "labels": 1797, "rejects": 0}
    assert metrics["quality"]["leaf"]["acc"] > 0.75
    assert metrics["quality"]["leaf"]["nmi"] > metrics["baselines"]["raw_kmeans"]["nmi"] - 0.02
    assert set(metrics["quality"]["levels"]) == {"3", "6"}
    assert set(metrics["quality"]["leaf"]) == {"acc", "nmi", "ami", "ari", "purity"}
    assert 0 < metrics["quality"]["dendrogram_purity"] <= 1
    assert {"raw_kmeans", "autoencoder_kmeans", "learned"} == set(metrics["baselines"])
    assert metrics["fit"]["num_workers"] == 1 and metrics["fit"]["rows"] == 1797


def test_every_file_of_a_run_is_in_the_list_of_what_its_stages_write(on_one_worker):
    found = {path.name for path in Path(on_one_worker.root).iterdir()}
    listed = {name for stage in pipeline.STAGES for name in stage.writes}
    assert found - listed == {"run.json", "stages", "lease"}


def test_label_files_stand_beside_the_input(on_one_worker, digits):
    for source in sorted(digits.glob("*.parquet")):
        labels = pq.read_table(Path(on_one_worker.uri("labels", source.name)))
        assert labels.schema.equals(labels_schema(pa.int64(), [3, 6]))
        assert labels["id"].to_pylist() == pq.read_table(source)["id"].to_pylist()
    table = read_labels(on_one_worker)
    leaf, level3, level6 = (table[name].to_numpy() for name in ("leaf", "level_3", "level_6"))
    # Levels nest, and both follow the order of the leaves.
    assert all(len(np.unique(level6[leaf == k])) == 1 for k in range(10))
    assert all(len(np.unique(level3[level6 == k])) == 1 for k in range(6))
    order = np.argsort(leaf, kind="stable")
    assert (np.diff(level6[order]) >= 0).all() and (np.diff(level3[order]) >= 0).all()
    assert (table["distance"].to_numpy() <= table["second_distance"].to_numpy()).all()
    assert (table["leaf"].to_numpy() != table["second_leaf"].to_numpy()).all()


def test_the_saved_model_gives_the_labels_that_the_job_wrote(on_one_worker, digits):
    _, x, _ = read_input(digits)
    found = Model.load(on_one_worker.uri("model")).predict(x)
    table = read_labels(on_one_worker)
    np.testing.assert_array_equal(found.leaf, table["leaf"].to_numpy())
    np.testing.assert_array_equal(found.levels[6], table["level_6"].to_numpy())
    np.testing.assert_allclose(found.confidence, table["confidence"].to_numpy(), rtol=1e-4)


def test_the_manifest_lists_every_file_with_its_checksum(on_one_worker):
    manifest = on_one_worker.lake.read_json(on_one_worker.uri("_MANIFEST.json"))
    paths = {entry["path"]: entry for entry in manifest["files"]}
    assert {"labels/part-00000.parquet", "model/config.json", "tree/nodes.parquet", "report/index.html"} <= set(paths)
    assert manifest["rows"] == {"input": 1797, "labels": 1797, "rejects": 0}
    import hashlib

    body = Path(on_one_worker.uri("labels", "part-00000.parquet")).read_bytes()
    entry = paths["labels/part-00000.parquet"]
    assert entry["sha256"] == hashlib.sha256(body).hexdigest() and entry["bytes"] == len(body) and entry["rows"] == 450


DOCUMENTS = {
    "run": artifacts.RUN,
    "profile": artifacts.PROFILE,
    "level_statistics": artifacts.LEVEL_STATISTICS,
    "agreement": artifacts.AGREEMENT,
    "metrics": artifacts.METRICS,
    "manifest": artifacts.MANIFEST,
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_of_a_run_has_the_keys_of_its_schema(on_one_worker, name):
    body = on_one_worker.lake.read_json(DOCUMENTS[name].uri(on_one_worker))
    jsonschema.validate(body, json_schema.schema(name))


def test_every_marker_of_a_run_has_the_keys_of_its_schema(on_one_worker):
    assert set(json_schema.DOCUMENTS) == {*DOCUMENTS, "stage", "sweep"}
    for stage in pipeline.stages_of(settings("in", "out")):
        marker = on_one_worker.marker(stage.name)
        jsonschema.validate(marker, json_schema.schema("stage"))
        jsonschema.validate(marker["metrics"], json_schema.schema_of(json_schema.STAGE_METRICS[stage.name]))


def test_every_file_of_a_run_is_on_the_list_of_what_a_run_writes(on_one_worker):
    known = [artifacts.RUN, artifacts.STAGES, artifacts.LEASE]
    known += [artifact for written in artifacts.WRITES.values() for artifact in written]
    for file in on_one_worker.lake.find(on_one_worker.root):
        path = file.uri.removeprefix(on_one_worker.root + "/")
        assert any(path == a.path or path.startswith(f"{a.path}/") for a in known), path


def test_two_workers_agree_with_one(on_one_worker, on_two_workers):
    one, two = (read_labels(r)["leaf"].to_numpy() for r in (on_one_worker, on_two_workers))
    print(f"labels equal: {(one == two).mean():.4f}")
    assert (one == two).mean() >= 0.99
    curves = []
    for run in (on_one_worker, on_two_workers):
        history = run.lake.read_json(run.uri("metrics.json"))["fit"]["history"]
        curves.append([h["loss"] for h in history if h["phase"] == "pretrain"][:5])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_a_finished_run_is_not_done_again(on_one_worker, digits, output, caplog):
    before = Path(on_one_worker.uri("labels", "part-00000.parquet")).stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        pipeline.run(settings(digits, output), "one")
    assert [m for m in caplog.messages if "skipped" in m] == [
        f"{stage.name}: done earlier, skipped" for stage in pipeline.stages_of(settings(digits, output))
    ]
    assert Path(on_one_worker.uri("labels", "part-00000.parquet")).stat().st_mtime_ns == before


def test_a_run_that_lacks_only_its_report_joins_no_cluster(on_one_worker, digits, output, monkeypatch):
    page, marker = (Path(on_one_worker.uri(name)) for name in ("report/index.html", "stages/report.json"))
    before = page.read_bytes()
    marker.unlink()
    page.unlink()
    monkeypatch.setattr(session, "connected", lambda config: pytest.fail("joined a cluster"))
    pipeline.run(settings(digits, output), "one")
    assert page.read_bytes() == before and marker.exists()


def test_another_number_of_workers_is_the_same_run_but_other_settings_are_not(on_one_worker, digits, output):
    pipeline.run(settings(digits, output, fit={"num_workers": 2}), "one")
    with pytest.raises(StageError, match=r"fit: run 'one' .* autoencoder.latent_dim was 10, is 7"):
        pipeline.run(settings(digits, output, autoencoder={"latent_dim": 7}), "one")


@pytest.fixture(scope="module")
def with_bad_rows(digits, tmp_path_factory):
    """The digits with nine bad rows in each file, and a file without rows."""
    folder = tmp_path_factory.mktemp("bad")
    for source in digits.glob("*.parquet"):
        table = pq.read_table(source)
        x = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), 64).copy()
        x[3:12, 5] = np.nan
        rows = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 64)
        pq.write_table(table.set_column(1, "embedding", rows), folder / source.name)
    pq.write_table(table.slice(0, 0), folder / "part-empty.parquet")
    return folder


@pytest.fixture(scope="module")
def streamed(ray_cluster, with_bad_rows, tmp_path_factory):
    """A run on two workers that keep no rows and leave the bad ones out."""
    return pipeline.run(
        settings(
            with_bad_rows,
            tmp_path_factory.mktemp("runs"),
            input={"path": str(with_bad_rows), "label_column": "label", "on_bad_rows": "quarantine"},
            fit={"num_workers": 2, "resident_bytes": 0, "objective": "idec"},
            pretrain={"num_epochs": 2},
            refine={"num_epochs": 1},
        ),
        "streamed",
    )


def test_streamed_rows_train_on_two_workers(streamed):
    fit = streamed.lake.read_json(streamed.uri("metrics.json"))["fit"]
    assert fit["mode"] == "streamed"
    import safetensors.numpy

    weights = safetensors.numpy.load_file(streamed.uri("tree", "leaves.safetensors"))["weights"]
    assert weights.sum() == 1761
    assert all(h["steps"] >= 28 for h in fit["history"] if h["phase"] == "pretrain")


def test_bad_rows_are_refused_with_their_number(ray_cluster, with_bad_rows, tmp_path):
    with pytest.raises(DataError, match="36 not_finite"):
        pipeline.run(settings(with_bad_rows, tmp_path / "runs"), "failing")


def test_quarantined_rows_are_accounted_for(streamed):
    metrics = streamed.lake.read_json(streamed.uri("metrics.json"))
    assert metrics["rows"] == {"input": 1797, "labels": 1761, "rejects": 36}
    rejects = pa.concat_tables([pq.read_table(f) for f in sorted(Path(streamed.uri("rejects")).glob("*.parquet"))])
    assert set(rejects["reason"].to_pylist()) == {"not_finite"}
    ids = set(rejects["id"].to_pylist()) | set(read_labels(streamed)["id"].to_pylist())
    assert ids == set(range(1797))
    assert pq.read_metadata(Path(streamed.uri("labels", "part-empty.parquet"))).num_rows == 0


def test_a_bad_row_that_the_sample_missed_stops_the_fit_with_its_place(ray_cluster, digits, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    for source in digits.glob("*.parquet"):
        table = pq.read_table(source)
        if source.name == "part-00003.parquet":
            x = table["embedding"].combine_chunks().flatten().to_numpy().copy()
            x[64 * 400] = np.inf
            table = table.set_column(1, "embedding", pa.FixedSizeListArray.from_arrays(pa.array(x), 64))
        pq.write_table(table, folder / source.name)
    config = settings(folder, tmp_path / "runs", input={"path": str(folder), "sample_rows": 40})
    with pytest.raises(DataError, match=r"part-00003.parquet row 400 \(id 1748\) is bad: not_finite"):
        pipeline.run(config, "bad")


@pytest.mark.slow
def test_a_terminated_and_killed_run_continues_on_another_number_of_workers(
    ray_cluster, digits, tmp_path, on_one_worker
):
    values = json.loads(settings(digits, tmp_path).model_dump_json())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "raydc", "run", "--config", str(tmp_path / "job.yaml"), "--run-id", "killed"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    # An epoch a second. At the pace that raydc asks of Train they would be over before a signal comes in the middle.
    environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"
    # While the workers start, and in the middle of the epochs.
    for moment, number in (("plan: time", signal.SIGTERM), ("pretrain epoch 4/", signal.SIGKILL)):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if moment in line:
                    break
            if number == signal.SIGTERM:
                # The line is the last of the stage before.
                time.sleep(1)
            process.send_signal(number)
            rest = process.stdout.read() if number == signal.SIGTERM else ""
        if number == signal.SIGTERM:
            assert process.returncode == 143
            assert f"fit: stopped by SIGTERM; `raydc resume {tmp_path}/killed` continues" in rest
    # The cluster goes down with its driver; until it has, its worker may still report an epoch.
    time.sleep(5)
    run = pipeline.run(settings(digits, tmp_path, fit={"num_workers": 2}), "killed")
    metrics = run.lake.read_json(run.uri("metrics.json"))
    assert metrics["rows"]["labels"] == 1797 and metrics["fit"]["num_workers"] == 2
    epochs = [h["epoch"] for h in metrics["fit"]["history"] if h["phase"] == "pretrain"]
    assert epochs == list(range(20))
    # Fitted twice as far on two workers it would take the time of both; what counts is that the result is as good.
    unbroken = on_one_worker.lake.read_json(on_one_worker.uri("metrics.json"))["quality"]["leaf"]["acc"]
    assert metrics["quality"]["leaf"]["acc"] >= unbroken - 0.01


def test_new_rows_are_labeled_with_the_model_of_a_run(on_one_worker, digits, tmp_path, capsys):
    arguments = ["assign", "--model", on_one_worker.root, "--input", str(digits), "--output", str(tmp_path / "new")]
    main(arguments)
    assert "1797 rows in, 1797 labels, 0 rejects" in capsys.readouterr().out
    for source in digits.glob("*.parquet"):
        ours = pq.read_table(tmp_path / "new" / "labels" / source.name)
        assert ours.equals(pq.read_table(Path(on_one_worker.uri("labels", source.name))))
    # As a driver leaves it that was killed at its last slice: the same command does that one alone.
    (tmp_path / "new" / "slices" / "part-00003.npz").unlink()
    (tmp_path / "new" / "labels" / "part-00003.parquet").unlink()
    done = [tmp_path / "new" / "labels" / f"part-0000{i}.parquet" for i in range(3)]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in done]
    main(arguments)
    assert "1797 rows in, 1797 labels, 0 rejects" in capsys.readouterr().out
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in done] == before
    last = pq.read_table(tmp_path / "new" / "labels" / "part-00003.parquet")
    assert last.equals(pq.read_table(Path(on_one_worker.uri("labels", "part-00003.parquet"))))
    arguments[4] = str(digits / "part-00000.parquet")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "holds labels made from another input" in capsys.readouterr().err


def test_show_and_evaluate_print_the_results_of_a_run(on_one_worker, capsys):
    before = on_one_worker.lake.read_bytes(on_one_worker.uri("metrics.json"))
    main(["evaluate", on_one_worker.root])
    assert on_one_worker.lake.read_bytes(on_one_worker.uri("metrics.json")) == before
    main(["show", on_one_worker.root])
    text = capsys.readouterr().out
    assert "published" in text and "autoencoder + k-means" in text and "1,797 in = 1,797 labels + 0 rejects" in text


def test_resume_of_a_finished_run_does_nothing_and_prints_its_results(on_one_worker, digits, output, capsys):
    main(["resume", on_one_worker.root])
    text = capsys.readouterr().out
    assert text.count("done earlier, skipped") == len(pipeline.stages_of(settings(digits, output)))
    assert "run         one, published" in text and "driver" not in text


def test_expected_failures_end_with_one_message_and_exit_code_two(tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"input": {"path": str(tmp_path / "nowhere")}}))
    with pytest.raises(SystemExit) as stop:
        main(["run", "--config", str(tmp_path / "job.yaml"), "--dry-run"])
    assert stop.value.code == 2
    assert "DataError: input.path=" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(digits, tmp_path, capsys):
    values = json.loads(settings(digits, tmp_path / "runs").model_dump_json())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    main(["run", "--config", str(tmp_path / "job.yaml"), "--dry-run"])
    text = capsys.readouterr().out
    assert "rows        1,797 in 4 slices" in text and "FLOP" in text and "memory" in text
    assert not (tmp_path / "runs").exists()
    assert Lake().exists(str(tmp_path))
