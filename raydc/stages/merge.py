"""merge: the weighted Ward tree over the leaves, its levels, and the model with leaf ids in tree order."""

import io
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from raydc.config import Config
from raydc.core.linkage import ward
from raydc.core.tree import heavier_left, leaf_order, levels, node_table, relabel
from raydc.lake import Lake, join
from raydc.model import Model
from raydc.rundir import RunDir
from raydc.schema import level_column

log = logging.getLogger(__name__)


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write tree/ (linkage.npy, nodes.parquet, levels.parquet, leaves.safetensors) and model/."""
    lake = run.lake
    leaves = safetensors.torch.load(lake.read_bytes(run.uri("fit", "leaves.safetensors")))
    weights, means, sse = (leaves[name].numpy() for name in ("weights", "means", "sse"))
    tree = ward(means, weights, sse)
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
    _write_tree(lake, run.uri("tree"), linkage, groups, node_table(linkage, weights, sse))
    statistics = {"weights": weights, "means": means, "sse": sse}
    body = safetensors.torch.save({k: torch.from_numpy(np.ascontiguousarray(a)) for k, a in statistics.items()})
    lake.write_bytes(run.uri("tree", "leaves.safetensors"), body)
    Model.load(run.uri("fit", "model"), lake).reordered(order.tolist(), groups).save(lake, run.uri("model"))
    return {
        "leaves": len(order),
        "left_out": len(tree.left_out),
        "levels": sizes,
        "rounds": tree.num_rounds,
        "inversions": tree.num_inversions,
    }


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
    return np.load(io.BytesIO(run.lake.read_bytes(run.uri("tree", "linkage.npy"))), allow_pickle=False)


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
