"""The nearest neighbors of rows among others, shard by shard. Letters: Q queries, N rows of a shard, D, M, C cells.

The search runs in float32 and proposes; float64 decides. A row that the search did not propose but that its rounding
cannot rule out is looked at, too, and equal similarities go to the lower key. So the answer depends neither on the cut
into shards nor on blocks or threads, and a row never finds itself: it is left out by its key.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# torch before faiss: the other order gives the two libraries separate thread settings.
import torch  # noqa: F401  isort: skip
import faiss  # isort: skip

Metric = Literal["cosine", "l2"]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

_MARGIN = 8
"""Candidates that the search proposes beyond those asked for; with some to spare, a second look is rare."""

_BLOCK_BYTES = 64 * 2**20
"""Bytes of the largest temporary of a search."""


@dataclass(frozen=True)
class Shard:
    """Some of the rows that may be neighbors."""

    keys_N: Ints
    x_ND: npt.NDArray[np.float32]
    """As `prepare` returns them."""

    bounds: Ints
    """(C + 1,): the rows of cell c are bounds[c] to bounds[c + 1]; one cell where the search is exact."""

    @classmethod
    def from_rows(cls, keys_N: Ints, x_ND: npt.NDArray[np.float32]) -> "Shard":
        """Return a shard of one cell."""
        return cls(keys_N, x_ND, np.array([0, len(keys_N)], np.int64))

    def in_cells(self, centers_CD: npt.NDArray[np.float32], metric: Metric) -> "Shard":
        """Return the same rows, sorted by the nearest cell center."""
        cells = nearest_cells(self.x_ND, centers_CD, 1, metric)[:, 0]
        order = np.argsort(cells, kind="stable")
        bounds = np.searchsorted(cells[order], np.arange(len(centers_CD) + 1))
        return Shard(self.keys_N[order], np.ascontiguousarray(self.x_ND[order]), bounds.astype(np.int64))


@dataclass(frozen=True)
class Neighbors:
    """The best rows found so far, best first."""

    keys_QM: Ints
    """-1 where fewer than M were found."""

    scores_QM: npt.NDArray[np.float64]
    """Cosine similarity, or the negative squared distance; -inf where there is none."""

    @classmethod
    def none(cls, num_queries: int, num: int) -> "Neighbors":
        """Return no neighbors."""
        return cls(np.full((num_queries, num), -1, np.int64), np.full((num_queries, num), -np.inf))

    @property
    def missing_Q(self) -> npt.NDArray[np.bool_]:
        """Which queries have fewer than M neighbors."""
        return self.keys_QM[:, -1] < 0

    def take(self, queries: npt.NDArray[Any]) -> "Neighbors":
        """Return those of some queries."""
        return Neighbors(self.keys_QM[queries], self.scores_QM[queries])


def prepare(x_ND: Floats, metric: Metric) -> npt.NDArray[np.float32]:
    """Return the float32 rows that are searched: of unit norm for `cosine`; a row of zeros stays one."""
    x = np.ascontiguousarray(x_ND, np.float32)
    if metric == "cosine":
        norms = np.sqrt((x.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        x = (x / np.maximum(norms, 1e-30)).astype(np.float32)
    return x


def search(
    query_keys_Q: Ints,
    queries_QD: npt.NDArray[np.float32],
    shard: Shard,
    found: Neighbors,
    *,
    metric: Metric,
    probes_QP: Ints | None = None,
) -> Neighbors:
    """Return the best of `found` and the rows of a shard, M for each query.

    Peak memory beside the rows: (12 (M + 9) + 40 M) Q + 3 * 2^26 bytes.

    Args:
        query_keys_Q: (Q,) own key of each query; a row of this key is not its neighbor.
        queries_QD: (Q, D) as `prepare` returns them.
        shard: the rows to look at; all of them unless `probes_QP` says otherwise.
        found: what other shards gave; `Neighbors.none` at first.
        metric: of `queries_QD` and of the shard.
        probes_QP: (Q, P) cells to look into, from `nearest_cells`. The search is then approximate: a neighbor in
            another cell is missed.

    Raises:
        ValueError: queries and shard do not share D.
    """
    if queries_QD.shape[1] != shard.x_ND.shape[1]:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, rows {shard.x_ND.shape[1]}")
    if probes_QP is None:
        return _search_rows(query_keys_Q, queries_QD, shard.keys_N, shard.x_ND, found, metric)
    keys, scores = found.keys_QM.copy(), found.scores_QM.copy()
    for cell, asking in _queries_of_cells(probes_QP):
        rows = slice(int(shard.bounds[cell]), int(shard.bounds[cell + 1]))
        if rows.start == rows.stop:
            continue
        before = Neighbors(keys[asking], scores[asking])
        best = _search_rows(
            query_keys_Q[asking], queries_QD[asking], shard.keys_N[rows], shard.x_ND[rows], before, metric
        )
        keys[asking], scores[asking] = best.keys_QM, best.scores_QM
    return Neighbors(keys, scores)


def nearest_cells(x_ND: npt.NDArray[np.float32], centers_CD: npt.NDArray[np.float32], num: int, metric: Metric) -> Ints:
    """Return the ids (N, num) of the nearest cell centers, nearest first."""
    if not len(x_ND):
        return np.empty((0, num), np.int64)
    return faiss.knn(x_ND, centers_CD, num, metric=_FAISS_METRIC[metric])[1]


def cell_centers(sample_ND: npt.NDArray[np.float32], num_cells: int, *, seed: int) -> npt.NDArray[np.float32]:
    """Return the (C, D) centers of a k-means on a sample, all of which is used."""
    kmeans = faiss.Kmeans(
        sample_ND.shape[1],
        num_cells,
        niter=10,
        seed=seed % (2**31 - 1),
        max_points_per_centroid=len(sample_ND),
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(sample_ND))
    return np.array(kmeans.centroids)


def num_hits(found: Neighbors, exact: Neighbors) -> int:
    """Return how many of the exact neighbors were found; divided by `exact.keys_QM.size` it is the recall."""
    both = np.sort(np.concatenate([found.keys_QM, exact.keys_QM], axis=1), axis=1)
    return int(((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum())


_FAISS_METRIC = {"cosine": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


def _queries_of_cells(probes_QP: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield each probed cell with the queries that look into it."""
    cells = probes_QP.reshape(-1)
    order = np.argsort(cells, kind="stable")
    found, starts = np.unique(cells[order], return_index=True)
    yield from zip(found.tolist(), np.split(order // probes_QP.shape[1], starts[1:]), strict=True)


def _search_rows(
    query_keys_Q: Ints,
    queries_QD: npt.NDArray[np.float32],
    keys_N: Ints,
    x_ND: npt.NDArray[np.float32],
    found: Neighbors,
    metric: Metric,
) -> Neighbors:
    if not len(query_keys_Q) or not len(keys_N):
        return found
    num, n = found.keys_QM.shape[1], len(keys_N)
    proposed = min(num + 1 + _MARGIN, n)
    # Moved by a common vector, distances stay and |q|^2 + |x|^2 - 2 q.x keeps its digits.
    shift = x_ND.mean(axis=0) if metric == "l2" else np.zeros((), np.float32)
    q, x = (queries_QD, x_ND) if metric == "cosine" else (queries_QD - shift, x_ND - shift)
    rough, ids = faiss.knn(q, x, proposed, metric=_FAISS_METRIC[metric])
    rough = rough if metric == "cosine" else -rough
    slack_Q = _slack(q, x, metric)
    query, column = np.nonzero(rough + slack_Q[:, None] >= found.scores_QM[:, -1:])
    best = _merge(found, _Pairs.scored(query, ids[query, column], query_keys_Q, queries_QD, keys_N, x_ND, metric))
    if proposed == n:
        return best
    # What was not proposed scores at most as well as the last proposal, up to the rounding of the search.
    doubtful = np.flatnonzero(rough[:, -1] + slack_Q >= best.scores_QM[:, -1])
    if not len(doubtful):
        return best
    keys, scores = best.keys_QM.copy(), best.scores_QM.copy()
    step = max(1, _BLOCK_BYTES // (4 * n))
    for start in range(0, len(doubtful), step):
        rows = doubtful[start : start + step]
        floor = best.scores_QM[rows, -1] - slack_Q[rows]
        query, row = np.nonzero(_rough_scores(q[rows], x, metric) >= floor[:, None])
        pairs = _Pairs.scored(query, row, query_keys_Q[rows], queries_QD[rows], keys_N, x_ND, metric)
        again = _merge(best.take(rows), pairs)
        keys[rows], scores[rows] = again.keys_QM, again.scores_QM
    return Neighbors(keys, scores)


def _slack(q_QD: npt.NDArray[np.float32], x_ND: npt.NDArray[np.float32], metric: Metric) -> npt.NDArray[np.float64]:
    """Return how far a float32 score of each query may be from the true one: D rounding errors of 2^-24, doubled."""
    unit = 2.0**-23 * (q_QD.shape[1] + 4)
    largest = float(np.einsum("nd,nd->n", x_ND, x_ND).max())
    own: npt.NDArray[np.float64] = np.einsum("qd,qd->q", q_QD, q_QD).astype(np.float64)
    slack: npt.NDArray[np.float64]
    slack = unit * np.sqrt(own * largest) if metric == "cosine" else 2.0 * unit * (own + largest)
    return slack


def _rough_scores(q_QD: npt.NDArray[np.float32], x_ND: npt.NDArray[np.float32], metric: Metric) -> Floats:
    products: Floats = q_QD @ x_ND.T
    if metric == "cosine":
        return products
    squares = np.einsum("nd,nd->n", x_ND, x_ND)
    negative: Floats = 2.0 * products - squares - np.einsum("qd,qd->q", q_QD, q_QD)[:, None]
    return negative


@dataclass(frozen=True)
class _Pairs:
    """Candidates as (query, key, score), in any order."""

    query_P: npt.NDArray[np.int64]
    keys_P: Ints
    scores_P: npt.NDArray[np.float64]

    @classmethod
    def scored(
        cls,
        query_P: npt.NDArray[Any],
        row_P: npt.NDArray[Any],
        query_keys_Q: Ints,
        queries_QD: npt.NDArray[np.float32],
        keys_N: Ints,
        x_ND: npt.NDArray[np.float32],
        metric: Metric,
    ) -> "_Pairs":
        """Return the pairs of different keys with float64 scores, each summed in the same order wherever it stands."""
        other = keys_N[row_P] != query_keys_Q[query_P]
        pairs = cls(query_P[other], keys_N[row_P[other]], np.empty(int(other.sum())))
        rows = row_P[other]
        step = max(1, _BLOCK_BYTES // (8 * x_ND.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            q, x = queries_QD[pairs.query_P[part]].astype(np.float64), x_ND[rows[part]].astype(np.float64)
            pairs.scores_P[part] = (q * x).sum(axis=1) if metric == "cosine" else -((q - x) ** 2).sum(axis=1)
        return pairs


def _merge(found: Neighbors, pairs: _Pairs) -> Neighbors:
    """Return the M best of both, by (score, lower key); a key that stands on both sides counts once."""
    num_queries, num = found.keys_QM.shape
    known = found.keys_QM.reshape(-1) >= 0
    query = np.concatenate([np.repeat(np.arange(num_queries), num)[known], pairs.query_P])
    keys = np.concatenate([found.keys_QM.reshape(-1)[known], pairs.keys_P])
    scores = np.concatenate([found.scores_QM.reshape(-1)[known], pairs.scores_P])
    order = np.lexsort((keys, -scores, query))
    query, keys, scores = query[order], keys[order], scores[order]
    # The same pair has the same score to the bit, so its copies stand side by side.
    first = np.ones(len(query), bool)
    first[1:] = (query[1:] != query[:-1]) | (keys[1:] != keys[:-1])
    query, keys, scores = query[first], keys[first], scores[first]
    place = np.arange(len(query)) - np.searchsorted(query, query, side="left")
    kept = place < num
    best = Neighbors.none(num_queries, num)
    best.keys_QM[query[kept], place[kept]] = keys[kept]
    best.scores_QM[query[kept], place[kept]] = scores[kept]
    return best
