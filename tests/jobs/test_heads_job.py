"""A whole job with an objective that learns from neighbors, on scikit-learn's digits."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.fault_rig import prune
from raydc import pipeline
from raydc.commands.assign import label_new_rows
from raydc.commands.show import lines
from raydc.config import parse_config
from raydc.errors import ConfigError, StageError
from raydc.model import Model


def settings(path, output, objective="icon", **fit):
    """Return the settings of a small job on two workers."""
    return parse_config(
        {
            "input": {"path": str(path), "label_column": "label"},
            "output": str(output),
            "preprocess": {"method": "l2"},
            "cluster": {"num_leaves": 10, "num_restarts": 5},
            "fit": {"objective": objective, "precision": "float32", "num_workers": 2} | fit,
            "refine": {"num_epochs": 20, "batch_rows": 128},
            "head": {"learning_rate": 1e-2},
            "merge": {"levels": [3]},
            "assign": {"num_actors": 1},
            "evaluate": {"map_rows": 200},
        }
    )


@pytest.fixture(scope="module")
def finished(ray_cluster, digits, tmp_path_factory):
    return pipeline.run(settings(digits, tmp_path_factory.mktemp("runs")), "icon")


def table_of(folder):
    return pa.concat_tables([pq.read_table(f) for f in sorted(Path(folder).rglob("*.parquet"))]).sort_by("id")


def test_the_job_is_better_than_k_means_on_the_rows(finished):
    metrics = finished.lake.read_json(finished.uri("metrics.json"))
    assert metrics["rows"] == {"input": 1797, "labels": 1797, "rejects": 0}
    assert metrics["quality"]["leaf"]["nmi"] > metrics["baselines"]["raw_kmeans"]["nmi"] + 0.03
    assert set(metrics["baselines"]) == {"raw_kmeans", "learned"}
    assert metrics["neighbors"]["method"] == "exact" and metrics["neighbors"]["rows"] == 1797
    assert {"profile", "neighbors", "fit", "merge", "assign"} <= set(metrics["stages"])
    assert "I-Con" in Path(finished.uri("report", "index.html")).read_text()
    assert any("neighbors" in line for line in lines(finished) if line.startswith("stages"))


def test_the_saved_model_gives_the_labels_that_the_job_wrote(finished, digits):
    inputs = table_of(digits)
    x = inputs["embedding"].combine_chunks().flatten().to_numpy().reshape(len(inputs), -1)
    model, labels = Model.load(finished.uri("model")), table_of(finished.uri("labels"))
    found = model.predict(x)
    np.testing.assert_array_equal(found.leaf, labels["leaf"].to_numpy())
    np.testing.assert_allclose(found.confidence, labels["confidence"].to_numpy(), rtol=1e-4)
    assert model.encoder is None and model.predictor is not None and model.predictor.kind == "head"
    # The center of a leaf is the mean of its rows.
    points = model.encode(x).numpy()
    for leaf in range(model.num_leaves):
        np.testing.assert_allclose(model.centers_KL[leaf], points[found.leaf == leaf].mean(axis=0), atol=1e-5)


def test_new_rows_are_labeled_by_the_head(finished, digits, tmp_path):
    config = settings(digits, tmp_path)
    assert label_new_rows(config, finished.root, str(tmp_path / "new")) == (1797, 1797, 0)
    np.testing.assert_array_equal(
        table_of(tmp_path / "new" / "labels")["leaf"].to_numpy(), table_of(finished.uri("labels"))["leaf"].to_numpy()
    )


def test_a_shard_that_does_not_fit_is_refused(finished, digits, tmp_path):
    # Profile and neighbors are those of the finished run.
    shutil.copytree(finished.root, tmp_path / "streamed")
    prune(tmp_path / "streamed", "fit")
    with pytest.raises(StageError, match="temi meets each row with its neighbors and needs the rows resident"):
        pipeline.run(settings(digits, tmp_path, "temi", resident_bytes=1000), "streamed")


def test_a_head_with_hidden_layers_cannot_start_at_centers():
    with pytest.raises(ConfigError, match="head.start=kmeans needs a linear head"):
        parse_config({"input": {"path": "in"}, "head": {"hidden_dims": [64]}})
