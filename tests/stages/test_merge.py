"""merge: the linkage and method of the settings, cells as tasks that may be lost, and what a level looks like."""

import os
import signal
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

from raydc.core.tree.linkage import agglomerate, ward
from raydc.core.tree.order import cut
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.stages import merge
from tests import shards
from tests.stages.runs import fill, labeled_run

RNG = np.random.default_rng(3)
MEANS = (RNG.normal(size=(30, 6)) * 4)[RNG.integers(0, 30, 600)] + RNG.normal(size=(600, 6))
WEIGHTS = RNG.integers(1, 50, 600).astype(float)
SSE = RNG.uniform(0, 5, 600) * WEIGHTS


def settings(**section):
    return shards.settings("in", cluster={"num_leaves": 600}, merge={"levels": [5], **section})


def test_the_cells_of_a_run_are_tasks_and_the_certified_tree_is_the_exact_one(ray_cluster):
    config = settings(method="certified", cell_size=60, top_size=50)
    found = merge.merge_leaves(config, MEANS, WEIGHTS, SSE)
    assert found.method == "certified" and found.num_cells > 5 and found.num_cell_merges > 0
    assert found.merges.tobytes() == ward(MEANS, WEIGHTS).merges.tobytes()


@pytest.mark.parametrize("method", ["certified", "minibatch"])
def test_a_task_whose_worker_is_killed_runs_again_and_the_tree_is_the_same(ray_cluster, tmp_path, method):
    def killed_once(step, state, cell):
        if cell == 1:
            try:
                (tmp_path / "killed").touch(exist_ok=False)
            except FileExistsError:
                (tmp_path / "again").touch()
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(state, cell)

    def run_cells(step, state, cells):
        return merge.run_on_cluster(partial(killed_once, step), state, cells, num_cpus=1)

    build = partial(agglomerate, MEANS, WEIGHTS, method=method, cell_size=60, top_size=50)
    here, there = build(), build(run_cells=run_cells)
    assert (tmp_path / "again").exists()
    assert there.merges.tobytes() == here.merges.tobytes()
    assert there.sse.tobytes() == here.sse.tobytes()


def test_a_task_computes_on_the_threads_that_it_asked_for(ray_cluster):
    from threadpoolctl import threadpool_info

    def count(state, cell):
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    for num_cpus in (2, 1):
        (threads,) = merge.run_on_cluster(count, None, [0], num_cpus=num_cpus)
        assert threads and set(threads) == {num_cpus}


def test_a_cell_that_raises_stops_the_stage_in_one_line(ray_cluster, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("no room for a cell")

    def build(*args, run_cells, **kwargs):
        return list(run_cells(broken, None, [0]))

    monkeypatch.setattr(merge, "agglomerate", build)
    with pytest.raises(StageError, match="merge: a cell failed with MemoryError: no room for a cell"):
        merge.merge_leaves(settings(), MEANS, WEIGHTS, SSE)


def test_auto_says_what_it_chose_and_why(caplog):
    with caplog.at_level("INFO"):
        found = merge.merge_leaves(settings(), MEANS, WEIGHTS, SSE)
    assert found.method == "exact"
    assert "exact (K=600, D=6: exact about 0 s, within the budget of 1800 s)" in caplog.text
    hurried = merge.merge_leaves(settings(budget_seconds=1e-3), MEANS, WEIGHTS, SSE)
    assert hurried.method == "minibatch" and "over the budget" in hurried.reason


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["average", "single", "complete"])
def test_other_linkages_and_metrics_are_scipys(kind, metric):
    # Average linkage is of squared distances; with single rows as leaves it is scipy's.
    found = merge.merge_leaves(settings(linkage=kind, metric=metric), MEANS, np.ones(600), np.zeros(600))
    distances = pdist(MEANS, "sqeuclidean" if (kind, metric) == ("average", "euclidean") else metric)
    np.testing.assert_allclose(found.merges[:, 2], linkage(distances, kind)[:, 2], rtol=1e-7)


def test_a_leaf_without_direction_is_refused_under_cosine():
    means = MEANS.copy()
    means[3] = 0
    with pytest.raises(StageError, match="merge: 1 centers have no direction under metric cosine"):
        merge.merge_leaves(settings(linkage="average", metric="cosine"), means, WEIGHTS, SSE)


def test_settings_without_effect_are_told(caplog):
    merge.merge_leaves(settings(method="exact", eps=0.1), MEANS[:50], WEIGHTS[:50], SSE[:50])
    assert "merge: eps=0.1 has no effect with method=exact" in caplog.text
    merge.merge_leaves(settings(linkage="single", method="certified"), MEANS[:50], WEIGHTS[:50], SSE[:50])
    assert "merge: method=certified has no effect on linkage=single" in caplog.text


@pytest.mark.parametrize("section", [{}, {"linkage": "average", "metric": "cosine"}])
def test_nodes_and_levels_tell_the_squared_errors_of_any_tree(tmp_path, section):
    fill(tmp_path / "in")
    offset = None if not section else np.array([1.0, 1.0])
    _, run = labeled_run(tmp_path, merge=section, offset=offset)
    nodes = pq.read_table(run.uri("tree", "nodes.parquet")).to_pydict()
    leaves = artifacts.LEAVES.read(run)
    weights, means = leaves.weights_K, leaves.means_KL
    total = leaves.sse_K.sum() + (weights @ (means - np.average(means, axis=0, weights=weights)) ** 2).sum()
    assert nodes["sse"][-1] == pytest.approx(total)
    written = run.lake.read_json(run.uri("tree", "level_statistics.json"))
    assert set(written) == {"2", "leaves"}
    group_K = cut(artifacts.LINKAGE.read(run), 2)
    centers = leaves.group_centers(group_K)
    assert written["2"] == {
        "num_groups": 2,
        "size_cv": pytest.approx(np.bincount(group_K).std() / np.bincount(group_K).mean()),
        "size_max_over_mean": pytest.approx(np.bincount(group_K).max() / 2),
        "num_over_4x_mean": 0,
        "smallest": 25.0 * np.bincount(group_K).min(),
        "sse": pytest.approx(leaves.sse_K.sum() + (weights @ (means - centers[group_K]) ** 2).sum()),
    }
    assert run.metrics("merge")["level_statistics"] == written
    assert run.metrics("merge")["method"] == "exact"


def test_a_level_with_fewer_groups_than_asked_is_told(tmp_path, caplog):
    fill(tmp_path / "in")
    _, run = labeled_run(tmp_path, merge={"levels": [2, 3], "min_population": 0.3})
    assert "merge: level 3 has 2 groups; no other split leaves min_population on both sides" in caplog.text
    assert run.metrics("merge")["level_statistics"]["3"]["num_groups"] == 2
