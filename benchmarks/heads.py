"""Heads on frozen rows beside spherical k-means and DEC: digits, and 1000 planted clusters of very uneven sizes.

The planted rows are made here: K centers drawn on the unit sphere of 384 dimensions, sizes by Zipf's law (1/rank), and
each row its center plus isotropic noise of twice the center's length, put back on the sphere. The centers themselves
label every row rightly; what k-means loses, it loses by cutting the large clusters and joining the small ones.

The fit is the job's own (raydc.core.training.fit) in one process without Ray, and so is the search of the neighbors.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn.datasets
import torch

from benchmarks.methods import record
from raydc.config import parse_config
from raydc.core.metrics import scores as metrics
from raydc.core.models.preprocess import Preprocess
from raydc.core.process import prepare_process
from raydc.core.search.knn import Neighbors, Shard, prepare, search
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import Fitted, fit
from raydc.core.training.neighbor_pairs import NeighborPairs
from raydc.core.training.rows import ResidentRows

# torch before faiss: the other order gives the two libraries separate thread settings.
import faiss  # isort: skip

DIGITS, PLANTED = "digits, unit rows", "planted"
_PLANTED_ROWS, _PLANTED_LEAVES, _PLANTED_DIM, _PLANTED_NOISE = 50_000, 1000, 384, 2.0
_NUM_NEIGHBORS = 10
METHODS = ("spherical_kmeans", "temi", "icon", "dec")

_DIGITS: dict[str, Any] = {
    "cluster": {"num_leaves": 10, "num_restarts": 20},
    "autoencoder": {"hidden_dims": [500, 500, 2000], "latent_dim": 10},
    "pretrain": {"num_epochs": 40, "batch_rows": 64},
    "refine": {"num_epochs": 50, "batch_rows": 256, "tolerance": 0.0},
    "head": {"learning_rate": 1e-2},
}
_DIGITS_DEC: dict[str, Any] = {
    "preprocess": {"method": "scale"},
    "refine": {"num_epochs": 20, "batch_rows": 64, "learning_rate": 5e-4},
}
_LARGE: dict[str, Any] = {
    "cluster": {"num_leaves": _PLANTED_LEAVES, "num_restarts": 1, "num_iterations": 10},
    "autoencoder": {"hidden_dims": [384], "latent_dim": 128},
    "pretrain": {"num_epochs": 6, "batch_rows": 1024, "learning_rate": 1e-3},
    "refine": {"num_epochs": 6, "batch_rows": 1024, "tolerance": 0.0},
    # The sizes are uneven, so leaves must be free to die.
    "head": {"learning_rate": 3e-3, "pair_exponent": 1.0},
}
_LARGE_DEC: dict[str, Any] = {"preprocess": {"method": "scale"}, "refine": {"num_epochs": 5, "batch_rows": 1024}}


@dataclass(frozen=True)
class Data:
    """Rows of unit norm with known classes."""

    name: str
    x_ND: npt.NDArray[np.float32]
    classes_N: npt.NDArray[np.int64]
    settings: dict[str, Any]
    dec_settings: dict[str, Any]
    """Beside `settings`, for DEC."""

    kmeans_restarts: int


def main(options: argparse.Namespace) -> None:
    """Run every method on both data sets, digits over all seeds."""
    prepare_process(torch.get_num_threads())
    chosen = [m for m in options.methods or METHODS if m in METHODS]
    made: dict[str, Callable[[int], Data]] = {"digits": lambda seed: _digits(), "planted": _planted}
    for name in options.data or list(made):
        if name not in made:
            print(f"heads on {name} skipped: not among {', '.join(made)}")
            continue
        for seed in options.seeds if name == "digits" else options.seeds[:1]:
            data = made[name](seed)
            run(data, seed, chosen)


def run(data: Data, seed: int, methods: list[str]) -> None:
    """Record every method on one data set under one seed."""
    graph, graph_seconds = None, 0.0
    for method in methods:
        started = time.perf_counter()
        if method == "spherical_kmeans":
            leaves = _spherical_kmeans(data, seed)
        elif method == "dec":
            leaves = _leaves(data, _fit(data, method, seed, None), data.dec_settings)
        else:
            if graph is None:
                graph = _graph(data.x_ND)
                graph_seconds = time.perf_counter() - started
                started = time.perf_counter()
            leaves = _leaves(data, _fit(data, method, seed, graph), {})
        seconds = time.perf_counter() - started + (graph_seconds if method in ("temi", "icon") else 0.0)
        entry = {"data": data.name, "method": method, "seed": seed, **_scores(data.classes_N, leaves)}
        entry |= {"seconds": round(seconds, 1), "threads": torch.get_num_threads()}
        print(json.dumps(entry), flush=True)
        record(entry)


def _digits() -> Data:
    x, classes = sklearn.datasets.load_digits(return_X_y=True)
    return Data(DIGITS, prepare(x, "cosine"), classes.astype(np.int64), _DIGITS, _DIGITS_DEC, 20)


def _planted(seed: int) -> Data:
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(_PLANTED_LEAVES, _PLANTED_DIM))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    sizes = 1.0 / np.arange(1, _PLANTED_LEAVES + 1)
    classes = generator.choice(_PLANTED_LEAVES, _PLANTED_ROWS, p=sizes / sizes.sum())
    noise = generator.normal(size=(_PLANTED_ROWS, _PLANTED_DIM)) * (_PLANTED_NOISE / _PLANTED_DIM**0.5)
    x = prepare(centers[classes] + noise, "cosine")
    return Data(PLANTED, x, classes.astype(np.int64), _LARGE, _LARGE_DEC, 1)


def _spherical_kmeans(data: Data, seed: int) -> npt.NDArray[np.int64]:
    leaves = int(data.settings["cluster"]["num_leaves"])
    kmeans = faiss.Kmeans(
        data.x_ND.shape[1],
        leaves,
        niter=25,
        nredo=data.kmeans_restarts,
        seed=seed,
        spherical=True,
        init_method=faiss.ClusteringInitMethod_AFK_MC2,
        max_points_per_centroid=len(data.x_ND),
        min_points_per_centroid=1,
    )
    kmeans.train(data.x_ND)
    return kmeans.index.search(data.x_ND, 1)[1][:, 0]


def _graph(x_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    keys = np.arange(len(x_ND))
    found = Neighbors.none(len(x_ND), _NUM_NEIGHBORS)
    return search(keys, x_ND, Shard.from_rows(keys, x_ND), found, metric="cosine").keys_QM


def _fit(data: Data, method: str, seed: int, graph: npt.NDArray[np.int64] | None) -> Fitted:
    values: dict[str, Any] = {name: dict(section) for name, section in data.settings.items()}
    for name, section in (data.dec_settings if method == "dec" else {}).items():
        values[name] = values.get(name, {}) | section
    values |= {"input": {"path": data.name}, "seed": seed, "fit": {"objective": method}}
    rows = ResidentRows(
        torch.from_numpy(data.x_ND),
        torch.arange(len(data.x_ND)),
        torch.ones(len(data.x_ND)),
        Ranks(),
        None if graph is None else torch.from_numpy(graph),
    )
    pairs = None if graph is None else NeighborPairs(rows, Ranks())
    return fit(rows, _preprocess(data, values), parse_config(values).fit_settings(data.name), Launcher(), pairs)


def _preprocess(data: Data, settings: dict[str, Any]) -> Preprocess:
    factor = data.x_ND.shape[1] ** 0.5 if settings.get("preprocess") else 1.0
    return Preprocess("scale", (), None, torch.tensor([factor], dtype=torch.float32))


class Launcher:
    """The core's Context in one process, without checkpoints."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def report(self, metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        """Say where the fit stands."""
        print({k: v for k, v in metrics.items() if k in ("phase", "epoch", "loss", "changed", "empty")}, flush=True)

    def latest_checkpoint(self) -> Path | None:
        """Return nothing."""
        return None


def _leaves(data: Data, fitted: Fitted, settings: dict[str, Any]) -> npt.NDArray[np.int64]:
    preprocess, found = _preprocess(data, settings), []
    with torch.no_grad():
        for block in torch.from_numpy(data.x_ND).split(8192):
            x = preprocess(block)
            z = x if fitted.clustering.encoder is None else fitted.clustering.encoder(x)
            found.append(fitted.clustering.assign(z)[0].numpy())
    return np.concatenate(found)


def _scores(classes_N: npt.NDArray[np.int64], leaves_N: npt.NDArray[np.int64]) -> dict[str, float]:
    scores = metrics.external(metrics.counted(leaves_N, classes_N))
    return {k: round(float(v), 4) for k, v in scores.items() if k in ("acc", "nmi", "ari")}
