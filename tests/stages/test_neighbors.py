"""The neighbors stage on the session's cluster: exact, approximate, sampled, resumed, refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydc.core.search.knn import Neighbors, Shard, prepare, search
from raydc.data.sample import profile_input
from raydc.errors import DataError, StageError
from raydc.runfolder.folder import RunDir
from raydc.stages import neighbors
from raydc.storage.lake import Lake
from tests import shards

NUM = 4


def a_run(folder, *, num_rows=240, bad=None, **sections):
    """Return settings and the folder of a run over three files and an empty one, profiled."""
    x = np.random.default_rng(1).normal(size=(num_rows, 12)).astype(np.float32)
    x[num_rows // 2 : num_rows // 2 + 20] = x[3]
    if bad is not None:
        x[bad] = np.nan
    for number, rows in enumerate(np.array_split(np.arange(num_rows), 3)):
        shards.write(folder / "in" / f"part-{number}.parquet", shards.rows(x[rows], first_id=int(rows[0])))
    shards.write(folder / "in" / "part-3.parquet", shards.rows(x[:0]))
    sections["neighbors"] = {"num": NUM} | sections.get("neighbors", {})
    sections["fit"] = {"objective": "icon"} | sections.get("fit", {})
    config = shards.settings(folder / "in", **sections)
    run = RunDir(Lake(), str(folder / "runs"), "r1")
    # Profile's sample would find the bad row itself; this stage must as well, where the sample has missed it.
    quarantine = config.input.model_copy(update={"on_bad_rows": "quarantine"})
    profile = profile_input(config.model_copy(update={"input": quarantine}), run.lake)
    body = profile.to_json()
    body["spec"]["on_bad_rows"] = config.input.on_bad_rows
    run.lake.write_json(run.uri("profile.json"), body)
    return config, run, x


def files(run):
    return sorted(Path(run.uri("neighbors")).glob("*.parquet"))


def read_all(run):
    tables = [pq.read_table(f) for f in files(run)]
    keys = np.concatenate([t["key"].to_numpy() for t in tables])
    lists = [t[name].combine_chunks().flatten().to_numpy() for name in ("neighbors", "similarities") for t in tables]
    found, similarities = (
        np.concatenate(half).reshape(len(keys), -1) for half in (lists[: len(tables)], lists[len(tables) :])
    )
    return keys, found, similarities


def expected(x, keys):
    rows = prepare(x[keys], "cosine")
    return search(keys, rows, Shard.from_rows(keys, rows), Neighbors.none(len(keys), NUM), metric="cosine")


def test_the_files_hold_the_exact_neighbors_over_all_slices(ray_cluster, tmp_path):
    config, run, x = a_run(tmp_path)
    metrics = neighbors.run(config, run)
    keys, found, similarities = read_all(run)
    np.testing.assert_array_equal(keys, np.arange(240))
    best = expected(x, keys)
    np.testing.assert_array_equal(found, best.keys_QM)
    np.testing.assert_allclose(similarities, best.scores_QM, rtol=1e-6)
    assert [f.name for f in files(run)] == ["part-0.parquet", "part-1.parquet", "part-2.parquet"]
    assert metrics == {
        "rows": 240,
        "num": NUM,
        "metric": "cosine",
        "method": "exact",
        "recall": 1.0,
        "recall_rows": 240,
        "mean_similarity": pytest.approx(best.scores_QM.mean()),
    }


def test_a_resumed_stage_makes_only_the_slices_that_are_missing(ray_cluster, tmp_path):
    config, run, _ = a_run(tmp_path)
    first = neighbors.run(config, run)
    bodies, made = {f.name: f.read_bytes() for f in files(run)}, files(run)[0].stat().st_mtime_ns
    files(run)[1].unlink()
    assert neighbors.run(config, run) == first
    assert {f.name: f.read_bytes() for f in files(run)} == bodies
    assert files(run)[0].stat().st_mtime_ns == made


def test_a_fit_on_a_sample_has_neighbors_within_the_sample(ray_cluster, tmp_path):
    config, run, x = a_run(tmp_path, fit={"max_rows": 100})
    metrics = neighbors.run(config, run)
    keys, found, _ = read_all(run)
    assert metrics["rows"] == len(keys) and 70 < len(keys) < 130
    assert set(found.flat) <= set(keys.tolist())
    np.testing.assert_array_equal(found, expected(x, keys).keys_QM)


def test_the_approximate_search_reports_its_measured_recall(ray_cluster, tmp_path):
    section = {"method": "ivf", "num_probes": 4, "recall_rows": 1000}
    config, run, x = a_run(tmp_path, neighbors=section)
    metrics = neighbors.run(config, run)
    keys, found, _ = read_all(run)
    np.testing.assert_array_equal(keys, np.arange(240))
    exact = expected(x, keys).keys_QM
    recall = np.mean([len(set(a) & set(b)) / NUM for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    # Every row was asked, and none was left with fewer neighbors than it should have.
    assert metrics["method"] == "ivf" and metrics["recall_rows"] == 240
    assert metrics["recall"] <= recall < 1.0 and recall > 0.4
    assert (found >= 0).all() and (found != keys[:, None]).all()
    facts = json.loads(pq.read_schema(files(run)[0]).metadata[b"raydc"])
    assert not facts["exact"]


def test_more_neighbors_than_rows_and_a_bad_row_are_refused(ray_cluster, tmp_path):
    config, run, _ = a_run(tmp_path / "few", num_rows=30, neighbors={"num": 30})
    with pytest.raises(StageError, match="30 rows cannot have 30 neighbors each. Lower neighbors.num"):
        neighbors.run(config, run)
    config, run, _ = a_run(tmp_path / "bad", bad=100)
    with pytest.raises(DataError, match=r"neighbors: .*part-1.parquet row 20 \(id 100\) is bad: not_finite"):
        neighbors.run(config, run)


def test_the_stage_is_part_of_the_runs_that_need_it_only():
    with_graph, without = (shards.settings("in", fit={"objective": o}) for o in ("icon", "kmeans"))
    assert with_graph.stages[:3] == ["profile", "neighbors", "fit"] and "neighbors" not in without.stages
    changed = shards.settings("in", neighbors={"num": 3}, head={"debiasing": 0.1})
    assert changed.fingerprint("fit") == without.fingerprint("fit")
    changed = shards.settings("in", fit={"objective": "icon"}, neighbors={"num": 3})
    assert changed.fingerprint("neighbors") != with_graph.fingerprint("neighbors")
    sampled = shards.settings("in", fit={"objective": "icon", "max_rows": 10})
    assert sampled.fingerprint("neighbors") != with_graph.fingerprint("neighbors")
    workers = shards.settings("in", fit={"objective": "icon", "num_workers": 2}, neighbors={"cpus_per_task": 2})
    assert workers.fingerprint("neighbors") == with_graph.fingerprint("neighbors")
    # The head's settings come after the graph.
    head = shards.settings("in", fit={"objective": "icon"}, head={"debiasing": 0.1})
    assert head.fingerprint("neighbors") == with_graph.fingerprint("neighbors")
    assert head.fingerprint("fit") != with_graph.fingerprint("fit")
