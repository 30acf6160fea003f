"""merge: the tree over the weighted leaves, its levels, and the model with leaf ids in tree order."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from threadpoolctl import threadpool_limits

from raydc.config import Config, MergeConfig
from raydc.core.tree.cells import CellMerges, CellState, Runner, run_here
from raydc.core.tree.levels import level_statistics, levels
from raydc.core.tree.linkage import Linkage, agglomerate
from raydc.core.tree.order import in_tree_order, node_table
from raydc.data.records import LevelRecord, MergeMetrics
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.runfolder.artifacts import Leaves
from raydc.runfolder.folder import RunDir
from raydc.runfolder.merge_cells import fingerprint, kept
from raydc.runtime.attempts import Bound
from raydc.runtime.board import bounded
from raydc.runtime.failures import error_of
from raydc.runtime.remedies import remedy
from raydc.runtime.session import in_one_line, root_cause

log = logging.getLogger(__name__)

_CELL_RETRIES = 10
"""Processes and nodes that a cell may lose where its attempts are not counted. Another try gives the same merges."""

_LESS_MEMORY = "If memory was short, raise merge.cpus_per_cell, or give the workers more."


def run(config: Config, run: RunDir) -> MergeMetrics:
    """Write model/ and tree/: linkage.npy, nodes.parquet, levels.parquet, level_statistics.json, leaves.safetensors."""
    leaves = artifacts.FIT_LEAVES.read(run)
    tree = merge_leaves(config, leaves.means_KL, leaves.weights_K, leaves.sse_K, run)
    if len(tree.left_out):
        log.warning(
            "merge: %d of %d leaves hold no row and are left out of the model",
            len(tree.left_out),
            len(leaves.weights_K),
        )
    linkage, places = in_tree_order(tree.merges, leaves.weights_K[tree.leaves])
    order = tree.leaves[places]
    leaves = leaves.taken(order)
    weights, means, sse = leaves.weights_K, leaves.means_KL, leaves.sse_K
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
    artifacts.LINKAGE.write(run, linkage)
    artifacts.LEVELS.write(run, len(order), groups)
    artifacts.NODES.write(run, pa.table(node_table(linkage, weights, sse, centers)))
    described = _described(groups, leaves)
    artifacts.LEVEL_STATISTICS.write(run, described)
    artifacts.LEAVES.write(run, leaves)
    run.remove(artifacts.CELLS.path)
    artifacts.MODEL.save(run, artifacts.FIT_MODEL.load(run).reordered(order.tolist(), groups))
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


def _described(groups: dict[int, npt.NDArray[np.int32]], leaves: Leaves) -> dict[str, LevelRecord]:
    """Return the statistics of each level and of the leaves, by name."""
    every = {str(k): labels for k, labels in groups.items()} | {"leaves": np.arange(len(leaves.weights_K))}
    found = {
        name: level_statistics(labels, leaves.weights_K, leaves.means_KL, leaves.sse_K)
        for name, labels in every.items()
    }
    return {name: cast(LevelRecord, asdict(one)) for name, one in found.items()}


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
        raise error_of(
            cause,
            f"merge: a cell failed with {in_one_line(cause)}.{remedy('merge', cause)} Cells that are done are kept; "
            "the same command continues.",
        ) from error


def _run_counted(
    config: Config, run: RunDir, step: Callable[..., CellMerges], state: CellState, cells: Sequence[int]
) -> Iterable[CellMerges]:
    with bounded("merge", config, run) as bound:
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
