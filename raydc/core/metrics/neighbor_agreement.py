"""How far a partition keeps near rows together. Letters: N rows, D width of a row, Q queries, M neighbors, K groups.

A criterion for partitions made in different spaces must not be measured in either method's own space: k-means has the
least squared error among the raw rows, and a space that was trained to be tight is tighter than any other, whether its
groups are right or not. Here both partitions answer one question that neither was fitted to: of the nearest neighbors
of a row, among the preprocessed rows, how many are in its group? The neighbors come from the data alone. A space that
tears them apart has lost what was there; and k-means, whose squared error is made by the far rows, gets nothing for
free either, because its cells may cut through dense regions. The premise is that near rows are near for a reason; where
even those distances say nothing, this criterion says nothing, and k-means on the rows is no baseline either.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raydc.core.search.nearest import nearest


@dataclass(frozen=True)
class Neighbors:
    """The nearest other rows of some rows of a sample."""

    queries_Q: npt.NDArray[np.int64]
    ids_QM: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How one partition treats the neighbors."""

    score: float
    """Mean of score_Q: 0 by chance, 1 where every neighbor is in the row's group."""

    share: float
    """Share of the neighbors that are in the group of their row."""

    chance: float
    """Share of all pairs of rows that are in one group; what a partition of these sizes would reach at random."""

    num_effective: float
    """exp of the entropy of the group sizes: K for equal groups, 1 where all rows are in one."""

    score_Q: npt.NDArray[np.float64]
    """(share of a query's neighbors in its group - chance) / (1 - chance)."""


def nearest_neighbors(x_ND: npt.NDArray[np.float32], *, num: int, max_queries: int) -> Neighbors:
    """Return the nearest other rows, by Euclidean distance, of up to `max_queries` rows spread evenly over the sample.

    Takes Q N D multiply-adds. A row is not its own neighbor, by its number: of equal rows only the row itself is left
    out.

    Args:
        x_ND: (N, D) preprocessed rows.
        num: M, below N.
        max_queries: Q at most.

    Raises:
        ValueError: not more rows than neighbors.
    """
    n = len(x_ND)
    if n <= num:
        raise ValueError(f"{num} neighbors asked of {n} rows")
    queries = np.unique(np.linspace(0, n - 1, min(n, max_queries)).astype(np.int64))
    rows = torch.from_numpy(np.require(x_ND, requirements=["C", "W"]))
    # One more than asked: the row itself is among them, or was pushed out by rows equal to it.
    nearest_QM = nearest(rows[torch.from_numpy(queries)], rows, num=num + 1)[0].numpy()
    others = nearest_QM != queries[:, None]
    others[others.all(axis=1), -1] = False
    return Neighbors(queries, nearest_QM[others].reshape(len(queries), num))


def agreement(group_N: npt.NDArray[np.integer], neighbors: Neighbors) -> Agreement:
    """Return how far a partition keeps neighbors together.

    The share of neighbors in the same group rises when groups are merged: one group of all rows keeps them all. So it
    is corrected for chance, (share - chance) / (1 - chance) with chance = sum_k (n_k / N)^2. What the correction cannot
    see is a partition that leaves most of its groups empty and keeps a few good ones, which is why the effective number
    of groups is given beside it.

    Args:
        group_N: group of each row of the sample.
        neighbors: of the sample.

    Source: the correction is that of Cohen, "A coefficient of agreement for nominal scales", 1960.
    """
    sizes = np.bincount(group_N) / len(group_N)
    sizes = sizes[sizes > 0]
    chance = float((sizes**2).sum())
    same_Q = (group_N[neighbors.ids_QM] == group_N[neighbors.queries_Q, None]).mean(axis=1)
    rest = 1.0 - chance
    score_Q = (same_Q - chance) / rest if rest > 0 else np.zeros(len(same_Q))
    effective = float(np.exp(-(sizes * np.log(sizes)).sum()))
    return Agreement(
        score=float(score_Q.mean()), share=float(same_Q.mean()), chance=chance, num_effective=effective, score_Q=score_Q
    )


def gain(ours: Agreement, other: Agreement) -> tuple[float, float]:
    """Return the mean difference of two partitions' scores over the same queries, and its standard error.

    Paired: the spread over the queries that both find hard falls out of the difference.
    """
    difference = ours.score_Q - other.score_Q
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return float(difference.mean()), error
