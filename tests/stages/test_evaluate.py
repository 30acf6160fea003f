"""evaluate and the summary: metrics.json from statistics and tree alone, and what a person reads of it."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raydc.commands import show
from raydc.core.metrics import scores
from raydc.data.statistics import Statistics
from raydc.stages import evaluate, publish
from raydc.stages.assign import neighbor_agreement
from tests import shards
from tests.stages.runs import fill, labeled_run


def written_labels(run) -> dict[str, list]:
    tables = [pq.read_table(f.uri).to_pydict() for f in run.lake.find(run.uri("labels"))]
    return {name: [v for t in tables for v in t[name]] for name in tables[0]}


def test_metrics_are_those_of_the_label_files(tmp_path):
    corner = fill(tmp_path / "in", num_bad=3)
    config, run = labeled_run(tmp_path)
    evaluate.run(config, run)
    body = run.lake.read_json(run.uri("metrics.json"))
    assert body["rows"] == {"input": 100, "labels": 97, "rejects": 3}
    labels = written_labels(run)
    for name, found in (("leaf", body["quality"]["leaf"]), ("level_2", body["quality"]["levels"]["2"])):
        table = np.zeros((max(labels[name]) + 1, 4), np.int64)
        np.add.at(table, (labels[name], corner), 1)
        assert found == pytest.approx(scores.external(table))
    assert body["quality"]["leaf"]["acc"] == 1.0
    assert body["quality"]["dendrogram_purity"] == 1.0
    assert body["internal"]["leaf"]["num_empty"] == 0
    assert set(body["internal"]["levels"]) == {"2"}
    assert body["baselines"]["raw_kmeans"]["rows"] == 97
    assert body["baselines"]["learned"] == pytest.approx(
        body["quality"]["leaf"] | body["internal"]["leaf"] | {"rows": 97}
    )
    assert body["stages"] == {s: {"seconds": 1.0} for s in ("profile", "fit", "merge", "assign")}
    assert body["fit"] == run.metrics("fit")
    assert body["warnings"] == ["3 rows were quarantined in rejects/"]


def test_without_labels_there_is_no_quality_and_the_rest_stays(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path, input={"label_column": None})
    evaluate.run(config, run)
    body = run.lake.read_json(run.uri("metrics.json"))
    assert "quality" not in body
    assert set(body["internal"]["leaf"]) == {
        "silhouette",
        "davies_bouldin",
        "size_cv",
        "size_max_over_mean",
        "num_empty",
    }
    assert "acc" not in body["baselines"]["raw_kmeans"]
    leaves = pq.read_table(run.uri("leaves.parquet"))
    assert leaves["majority_label"].null_count == 4
    assert "ACC" not in "\n".join(show.lines(run))


def test_the_table_of_leaves_tells_size_and_majority(tmp_path):
    corner = fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    evaluate.run(config, run)
    leaves = pq.read_table(run.uri("leaves.parquet")).to_pydict()
    assert leaves["leaf"] == [0, 1, 2, 3]
    assert sum(leaves["rows"]) == 100
    sizes = dict(zip(leaves["majority_label"], leaves["rows"], strict=True))
    assert sizes == {f"corner {k}": int(n) for k, n in enumerate(np.bincount(corner))}
    assert leaves["majority_share"] == [1.0] * 4


def test_a_leaf_without_a_known_class_has_no_majority(tmp_path):
    fill(tmp_path / "in", unknown_corner=2)
    config, run = labeled_run(tmp_path)
    evaluate.run(config, run)
    leaves = pq.read_table(run.uri("leaves.parquet")).to_pydict()
    assert min(leaves["rows"]) > 0
    assert sorted(leaves["majority_label"], key=str) == [None, "corner 0", "corner 1", "corner 3"]
    assert sorted(leaves["majority_share"], key=str) == [1.0, 1.0, 1.0, None]


def test_metrics_are_the_same_bytes_when_computed_again(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    evaluate.run(config, run)
    first = run.lake.read_bytes(run.uri("metrics.json"))
    evaluate.run(config, run)
    assert run.lake.read_bytes(run.uri("metrics.json")) == first


def test_every_node_has_the_nearest_row_of_a_leaf_under_it_as_its_medoid(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    assert "medoid_id" not in pq.read_schema(run.uri("tree", "nodes.parquet")).names
    evaluate.run(config, run)
    first = run.lake.read_bytes(run.uri("tree", "nodes.parquet"))
    nodes = pq.read_table(run.uri("tree", "nodes.parquet")).to_pydict()
    labels = written_labels(run)
    leaf, distance, ids = (np.array(labels[name]) for name in ("leaf", "distance", "id"))
    for k in range(4):
        assert nodes["medoid_id"][k] == ids[leaf == k][distance[leaf == k].argmin()]
    for node in range(4, 7):
        children = (nodes["left"][node], nodes["right"][node])
        assert nodes["medoid_id"][node] in [nodes["medoid_id"][child] for child in children]
    evaluate.run(config, run)
    assert run.lake.read_bytes(run.uri("tree", "nodes.parquet")) == first


def test_a_leaf_without_an_exemplar_has_no_medoid_and_gives_none_to_its_parents(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    exemplars = pq.read_table(run.uri("exemplars.parquet"))
    pq.write_table(exemplars.filter(pc.field("leaf") != 0), run.uri("exemplars.parquet"))
    evaluate.run(config, run)
    medoids = pq.read_table(run.uri("tree", "nodes.parquet"))["medoid_id"].to_pylist()
    assert medoids[0] is None and None not in medoids[1:]


def test_a_learned_space_that_is_no_better_than_the_raw_rows_is_said_so(tmp_path, caplog):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    run.mark_done("fit", config.settings("fit"), 1.0, {"objective": "dec"})
    evaluate.run(config, run)
    body = run.lake.read_json(run.uri("metrics.json"))
    sentence = (
        "The learned space is not better than k-means on the raw rows: "
        "NMI 1.000 against 1.000, ACC 1.000 against 1.000."
    )
    assert body["verdict"]["tone"] == "same" and body["verdict"]["sentence"] == sentence
    assert body["warnings"] == [sentence]
    assert sentence in caplog.text
    assert [line for line in show.lines(run) if sentence in line] == [sentence]


@pytest.mark.parametrize(("scatter", "tone"), [(False, "better"), (True, "worse")])
def test_without_labels_the_neighbors_tell_a_space_that_wins_from_one_that_loses(tmp_path, scatter, tone):
    fill(tmp_path / "in", num=400)
    config, run = labeled_run(tmp_path, input={"label_column": None}, evaluate={"neighbor_rows": 400})
    run.mark_done("fit", config.settings("fit"), 1.0, {"objective": "dec"})
    # Rows around four corners: one partition by corner, one that cuts across every corner.
    x, leaf = shards.near_corners(400)
    across = (np.round(x[:, 0] * 2) % 4).astype(np.int64)
    rows = pa.table(
        {
            "key": np.arange(400),
            "x": shards.column(x),
            "learned": across if scatter else leaf,
            "raw_kmeans": leaf if scatter else across,
        }
    )
    found = neighbor_agreement(config, Statistics(near_rows=rows))
    # In whatever order the slices end.
    turned = Statistics(near_rows=pa.concat_tables([rows.slice(150), rows.slice(0, 150)]))
    assert neighbor_agreement(config, turned) == found and turned.near_rows is None
    run.lake.write_json(run.uri("agreement.json"), found)
    evaluate.run(config, run)
    body = run.lake.read_json(run.uri("metrics.json"))
    assert body["verdict"]["tone"] == tone
    said = f"The learned space is {tone} than k-means on the raw rows: neighbor agreement"
    assert len([line for line in show.lines(run) if line.startswith(said)]) == 1
    assert bool(body["warnings"]) == scatter


def test_a_sample_without_known_classes_leaves_its_cells_empty(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    evaluate.run(config, run)
    body = run.lake.read_json(run.uri("metrics.json"))
    for name in ("acc", "nmi", "ami", "ari", "purity"):
        del body["baselines"]["raw_kmeans"][name]
    run.lake.write_json(run.uri("metrics.json"), body)
    (line,) = [line for line in show.lines(run) if line.startswith("k-means on the rows")]
    assert line.split()[4:8] == ["-"] * 4


def test_the_summary_follows_a_run_from_start_to_end(tmp_path):
    fill(tmp_path / "in", num_bad=1)
    config, run = labeled_run(tmp_path)
    text = show.lines(run)
    assert text[0] == "run         r1, evaluate not started"
    assert "stages      profile 1.0 s, fit 1.0 s, merge 1.0 s, assign 1.0 s, evaluate -, report -, publish -" in text
    assert f"labels      {run.uri('labels')}" in text
    run.begin("evaluate", config.settings("evaluate"))
    assert show.lines(run)[0] == "run         r1, evaluate started, not finished"
    evaluate.run(config, run)
    run.mark_done("evaluate", config.settings("evaluate"), 2.0, {})
    text = show.lines(run)
    assert "rows        100 in = 99 labels + 1 rejects" in text
    assert "leaves      4, levels 2" in text
    assert any(line.startswith("k-means on the rows") and "1.0000" in line for line in text)
    assert "warning: 1 rows were quarantined in rejects/" in text
    publish.run(config, run)
    assert show.lines(run)[0] == "run         r1, published"


def test_what_is_odd_in_the_input_stands_among_the_warnings(tmp_path):
    fill(tmp_path / "in")
    (tmp_path / "in" / "notes.csv").touch()
    # A corner of its own is left to one row, and a damaged file is left out.
    for path in sorted((tmp_path / "in").glob("part-[01].parquet")):
        table = pq.read_table(path)
        keep = pc.invert(pc.equal(table["label"], "corner 3"))
        pq.write_table(table.filter(keep), path)
    lone = shards.rows(np.array([[10.0, 10.0]], np.float32), first_id=1000, label=["corner 3"])
    shards.write(tmp_path / "in" / "part-3.parquet", lone)
    shards.write(tmp_path / "in" / "part-4.parquet", shards.rows(pa.array([["x"]]), first_id=2000, label=["y"]))
    (tmp_path / "in" / "part-5.parquet").write_bytes(b"damaged")
    config, run = labeled_run(tmp_path, input={"on_bad_files": "quarantine"})
    evaluate.run(config, run)
    passed, single, left_out = run.lake.read_json(run.uri("metrics.json"))["warnings"]
    assert passed.startswith("passed over 1 entry: 1 *.csv (such as ")
    assert single.startswith("1 of 4 leaves hold a single row: outliers, or more leaves than the rows fill.")
    assert left_out == "2 input files (1 rows, those of 1 unknown) were left out (input.on_bad_files=quarantine)"
    assert f"warning: {single}" in show.lines(run)
