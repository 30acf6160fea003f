"""merge: the tree over the weighted leaves, its levels, and the model with leaf ids in tree order."""

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import safetensors.torch
import torch
from threadpoolctl import threadpool_limits

from raydc.config import Config, MergeConfig
from raydc.core.tree.cells import CellMerges, CellState, Runner, run_here
from raydc.core.tree.linkage import Linkage, agglomerate
from raydc.core.tree.order import heavier_left, leaf_order, level_statistics, levels, node_table, relabel
from raydc.data.schema import level_column
from raydc.errors import StageError
from raydc.model import Model
from raydc.runfolder import merge_cells as cells
from raydc.runfolder.attempts import Bound
from raydc.runfolder.folder import RunDir
from raydc.runfolder.merge_cells import fingerprint, kept
from raydc.runtime.remedies import remedy
from raydc.runtime.session import bounded, in_one_line, root_cause
from raydc.storage.lake import Lake, join

log = logging.getLogger(__name__)

_CELL_RETRIES = 10
"""Processes and nodes that a cell may lose where its attempts are not counted. Another try gives the same merges."""

_LESS_MEMORY = "If memory was short, raise merge.cpus_per_cell, or give the workers more."


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write model/ and tree/: linkage.npy, nodes.parquet, levels.parquet, level_statistics.json, leaves.safetensors."""
    lake = run.lake
    leaves = safetensors.torch.load(lake.read_bytes(run.uri("fit", "leaves.safetensors")))
    weights, means, sse = (leaves[name].numpy() for name in ("weights", "means", "sse"))
    tree = merge_leaves(config, means, weights, sse, run)
    if len(tree.left_out):
        log.warning(
            "merge: %d of %d leaves hold no row and are left out of the model", len(tree.left_out), len(weights)
        )
    turned = heavier_left(tree.merges, weights[tree.leaves])
    order = tree.leaves[leaf_order(turned)]
    linkage = relabel(turned, leaf_order(turned))
    weights, means, sse = weights[order], means[order], sse[order]
    sizes = [k for k in config.levels if k < len(order)]
    if sizes != config.levels:
        log.warning(
            "merge: the tree has %d leaves; levels %s are left out", len(order), sorted({*config.levels} - {*sizes})
        )
    groups = levels(linkage, sizes, weights, config.merge.min_population)
    for k, labels in groups.items():
        if (found := int(labels.max()) + 1) < k:
            log.warning("merge: level %d has %d groups; no other split leaves min_population on both sides", k, found)
    # Only a Ward tree's heights tell how the sum of squared errors rises.
    centers = None if config.merge.linkage == "ward" else means
    _write_tree(lake, run.uri("tree"), linkage, groups, node_table(linkage, weights, sse, centers))
    described = {str(k): asdict(level_statistics(labels, weights, means, sse)) for k, labels in groups.items()}
    described["leaves"] = asdict(level_statistics(np.arange(len(order)), weights, means, sse))
    lake.write_json(run.uri("tree", "level_statistics.json"), described)
    statistics = {"weights": weights, "means": means, "sse": sse}
    body = safetensors.torch.save({k: torch.from_numpy(np.ascontiguousarray(a)) for k, a in statistics.items()})
    lake.write_bytes(run.uri("tree", "leaves.safetensors"), body)
    run.remove("/".join(cells.FOLDER))
    Model.load(run.uri("fit", "model"), lake).reordered(order.tolist(), groups).save(lake, run.uri("model"))
    return {
        "leaves": len(order),
        "left_out": len(tree.left_out),
        "levels": sizes,
        "level_statistics": described,
        "method": tree.method,
        "reason": tree.reason,
        "rounds": tree.num_rounds,
        "cells": tree.num_cells,
        "cell_merges": tree.num_cell_merges,
        "inversions": tree.num_inversions,
    }


def merge_leaves(
    config: Config,
    means: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    sse: npt.NDArray[np.float64],
    run: RunDir | None = None,
) -> Linkage:
    """Return the tree by the settings of the section; its cells, if it takes any, are tasks on the cluster.

    With a run folder, cells that are merged stay merged if the driver dies.

    Raises:
        StageError: the leaves do not fit the linkage or the metric, or a cell was lost for good.
    """
    section = config.merge
    _warn_of_idle_settings(section)
    connected = ray.is_initialized()
    run_cells: Runner = partial(run_on_cluster, num_cpus=section.cpus_per_cell) if connected else run_here
    if connected and run is not None:
        run_cells = partial(_run_counted, config, run)
    if run is not None:
        run_cells = kept(run, run_cells)
    try:
        return agglomerate(
            means,
            weights,
            # Under cosine and pearson the leaves are directions; their squared errors are of the plain space.
            sse if section.metric == "euclidean" else None,
            linkage=section.linkage,
            metric=section.metric,
            method=section.method,
            eps=section.eps,
            cell_size=section.cell_size,
            top_size=section.top_size,
            seed=config.seed,
            budget_seconds=section.budget_seconds,
            num_parallel=_cells_at_a_time(section.cpus_per_cell) if connected else 1,
            run_cells=run_cells,
        )
    except ValueError as error:
        raise StageError(f"merge: {error}.") from error
    except ray.exceptions.RayError as error:
        cause = root_cause(error)
        raise StageError(
            f"merge: a cell failed with {in_one_line(cause)}.{remedy('merge', cause)} Cells that are done are kept; "
            "the same command continues."
        ) from error


def _run_counted(
    config: Config, run: RunDir, step: Callable[..., CellMerges], state: CellState, cells: Sequence[int]
) -> Iterable[CellMerges]:
    with bounded("merge", config, run.lake, run.root) as bound:
        yield from run_on_cluster(step, state, cells, num_cpus=config.merge.cpus_per_cell, bound=bound)


def run_on_cluster(
    step: Callable[..., CellMerges],
    state: CellState,
    cells: Sequence[int],
    *,
    num_cpus: int,
    bound: Bound | None = None,
) -> Iterable[CellMerges]:
    """Run each cell as a task and yield their merges in the order of the cells; a task that is lost runs again.

    The state is put into the object store once, and a task reads it there without a copy.

    Args:
        step: called with state and cell.
        state: of all clusters of the round.
        cells: which cells.
        num_cpus: CPUs and threads of a task.
        bound: on the attempts at a cell; None leaves them to Ray's own count.

    Raises:
        ray.exceptions.RayError: a cell was lost too often, or raised.
    """
    shared = ray.put(state)
    retries = _CELL_RETRIES if bound is None else bound.retries
    task = ray.remote(num_cpus=num_cpus, max_retries=retries)(_run_cell)
    name = "" if bound is None else fingerprint(step, state)
    waiting = [task.remote(step, shared, cell, num_cpus, bound, f"{name}/{cell:06d}") for cell in cells]
    for one in waiting:
        yield ray.get(one)


def _run_cell(
    step: Callable[..., CellMerges],
    state: CellState,
    cell: int,
    num_threads: int,
    bound: Bound | None,
    piece: str,
) -> CellMerges:
    # The search asks BLAS for its number of threads, and a worker serves tasks of several widths in its life.
    with threadpool_limits(num_threads):
        if bound is None:
            return step(state, cell)
        with bound.attempt(piece) as lost:
            bound.require(lost, f"cell {cell} of {len(state.weight_M):,} clusters", _LESS_MEMORY)
            return step(state, cell)


def _cells_at_a_time(cpus_per_cell: int) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus_per_cell)


def _warn_of_idle_settings(section: MergeConfig) -> None:
    if section.linkage in ("single", "complete") and section.method != "auto":
        log.warning("merge: method=%s has no effect on linkage=%s", section.method, section.linkage)
    elif section.eps > 0 and section.method in ("exact", "minibatch"):
        log.warning("merge: eps=%g has no effect with method=%s", section.eps, section.method)


def leaf_statistics(run: RunDir) -> dict[str, npt.NDArray[np.float64]]:
    """Return weights (K,), means (K, L) and sse (K,) of the model's leaves, as fit saw them."""
    body = run.lake.read_bytes(run.uri("tree", "leaves.safetensors"))
    return {name: tensor.numpy() for name, tensor in safetensors.torch.load(body).items()}


def group_centers(
    groups_K: npt.NDArray[np.int32], statistics: dict[str, npt.NDArray[np.float64]]
) -> npt.NDArray[np.float64]:
    """Return the (G, L) weighted mean of the leaves of each group."""
    weights, means = statistics["weights"], statistics["means"]
    mass = np.bincount(groups_K, weights)
    sums = np.zeros((len(mass), means.shape[1]))
    np.add.at(sums, groups_K, means * weights[:, None])
    return sums / mass[:, None]


def read_linkage(run: RunDir) -> npt.NDArray[np.float64]:
    """Return the scipy linkage matrix of the run's tree."""
    return run.lake.read_array(run.uri("tree", "linkage.npy"))


def _write_tree(
    lake: Lake,
    uri: str,
    linkage: npt.NDArray[np.float64],
    groups: dict[int, npt.NDArray[np.int32]],
    nodes: dict[str, npt.NDArray[Any]],
) -> None:
    buffer = io.BytesIO()
    np.save(buffer, linkage, allow_pickle=False)
    lake.write_bytes(join(uri, "linkage.npy"), buffer.getvalue())
    leaf = np.arange(len(linkage) + 1, dtype=np.int32)
    table = {"leaf": leaf} | {level_column(k): g for k, g in groups.items()}
    for name, columns in (("levels", table), ("nodes", nodes)):
        with lake.staged(join(uri, f"{name}.parquet")) as path:
            pq.write_table(pa.table(columns), path)
