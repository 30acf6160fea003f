"""scikit-learn's clusterings behind one call, with the parameters chosen by stated rules. Letters: N rows, D width.

Several of these need the distances of all pairs, or close to it: they are there to be compared with on a sample.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import (
    DBSCAN,
    HDBSCAN,
    AgglomerativeClustering,
    KMeans,
    MiniBatchKMeans,
    SpectralClustering,
)
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

_NEIGHBORS = 10
"""Neighbors of the graph, and of a core row of a density."""

_BRIDGE = 1e-3
"""Weight of an edge that joins two pieces of the graph."""


@dataclass(frozen=True)
class Classical:
    """A partition, and how it was made."""

    groups_N: npt.NDArray[np.int64]
    """-1 for noise."""

    parameters: str


def _kmeans(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    return Classical(KMeans(k, n_init=10, random_state=seed).fit_predict(x), "n_init 10")


def _minibatch_kmeans(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    groups = MiniBatchKMeans(k, n_init=10, batch_size=1024, random_state=seed).fit_predict(x)
    return Classical(groups, "n_init 10, batches of 1024")


def _gmm(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    # A floor for the variances: a pixel that is always 0 has none.
    floor = 1e-3 * float(x.var(axis=0).mean()) or 1e-6
    model = GaussianMixture(k, covariance_type="diag", reg_covar=floor, random_state=seed)
    return Classical(model.fit_predict(x.astype(np.float64)), f"diagonal covariances, variance floor {floor:.3g}")


def _dbscan(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    eps = knee_distance(x, _NEIGHBORS)
    groups = DBSCAN(eps=eps, min_samples=_NEIGHBORS).fit_predict(x)
    return Classical(groups, f"min_samples {_NEIGHBORS}, eps {eps:.4g} at the knee of the distances to that neighbor")


def _hdbscan(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    size = max(_NEIGHBORS, len(x) // (20 * k))
    groups = HDBSCAN(min_cluster_size=size, min_samples=_NEIGHBORS, copy=True).fit_predict(x)
    return Classical(groups, f"min_cluster_size {size} (a twentieth of the mean group), min_samples {_NEIGHBORS}")


def _agglomerative(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    return Classical(AgglomerativeClustering(k, linkage="ward").fit_predict(x), "Ward")


def _spectral(x: npt.NDArray[np.float32], k: int, seed: int) -> Classical:
    # Made symmetric, and its pieces joined by light edges: scikit-learn warns of either.
    graph = NearestNeighbors(n_neighbors=_NEIGHBORS + 1).fit(x).kneighbors_graph(x)
    graph = (0.5 * (graph + graph.T)).tolil()
    num_pieces, piece_N = connected_components(graph)
    first = [int(np.flatnonzero(piece_N == piece)[0]) for piece in range(num_pieces)]
    for one, other in itertools.pairwise(first):
        graph[one, other] = graph[other, one] = _BRIDGE
    model = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=seed)
    return Classical(
        model.fit_predict(graph.tocsr()), f"graph of {_NEIGHBORS} neighbors in {num_pieces} piece(s), cluster_qr"
    )


METHODS: dict[str, Callable[[npt.NDArray[np.float32], int, int], Classical]] = {
    "kmeans": _kmeans,
    "minibatch_kmeans": _minibatch_kmeans,
    "gmm": _gmm,
    "dbscan": _dbscan,
    "hdbscan": _hdbscan,
    "agglomerative": _agglomerative,
    "spectral": _spectral,
}
"""Each method by its name: rows (N, D), number of groups and seed in, a partition out."""

DETERMINISTIC = frozenset({"dbscan", "hdbscan", "agglomerative"})
"""Methods in which no seed plays a part; one run of them stands for all seeds."""


def knee_distance(x_ND: npt.NDArray[np.float32], num_neighbors: int) -> float:
    """Return the distance at the knee of the sorted distances of all rows to their `num_neighbors`-th neighbor.

    The knee is the point farthest below the line from the first to the last of them: inside a cluster the distances
    rise slowly, and fast among the rows outside. DBSCAN's authors read it off a figure by eye.

    Source: Ester, Kriegel, Sander, Xu, "A density-based algorithm for discovering clusters", 1996, section 4.2.
    """
    search = NearestNeighbors(n_neighbors=num_neighbors + 1).fit(x_ND)
    distances = np.sort(search.kneighbors(x_ND)[0][:, -1].astype(np.float64))
    line = np.linspace(distances[0], distances[-1], len(distances))
    # Never 0, which DBSCAN refuses: many equal rows put their neighbors at no distance.
    return float(distances[np.argmax(line - distances)]) or float(np.finfo(np.float32).tiny)
