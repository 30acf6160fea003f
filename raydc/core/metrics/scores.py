"""Metrics of a partition from its statistics alone.

Letters: K groups, C classes, L width of the clustering space.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydc.core.metrics.partition_stats import Tally
from raydc.core.search.nearest import squared_distances

# Expected rows of a cell of the table above which its moments stand for its distribution; the error of ami stays
# below 1e-8.
_MANY = 300.0
_BLOCK_CELLS = 2**16


def external(table_KC: Any) -> dict[str, float]:
    """Return acc, nmi, ami, ari and purity of a partition against known classes.

    acc is the share of rows in the best one-to-one matching of groups and classes; nmi and ami are normalized by the
    arithmetic mean of the entropies, as in scikit-learn; purity is sum_k max_c n_kc / N. Only the pairs of a group and
    a class that have rows cost anything.

    Args:
        table_KC: (K, C) counts, an array or a sparse array of SciPy.

    Raises:
        ValueError: the table has no rows or no classes.
    """
    import scipy.sparse  # It takes a while, and a run needs it only at its end.

    table = scipy.sparse.csr_array(table_KC).astype(np.int64)
    table.eliminate_zeros()
    if not table.nnz:
        raise ValueError("the table counts no row of a known class")
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    total = int(table.sum())
    nmi, ami = _mutual_information(table, total)
    return {
        "acc": _matched(table) / total,
        "nmi": nmi,
        "ami": ami,
        "ari": _adjusted_rand(table),
        "purity": int(table.max(axis=1).sum()) / total,
    }


def counted(group_N: npt.NDArray[np.integer], class_N: npt.NDArray[np.integer]) -> Any:
    """Return the table of rows whose group and class are given, a scipy.sparse.csr_array of int64."""
    import scipy.sparse

    return scipy.sparse.csr_array((np.ones(len(group_N), np.int64), (group_N, class_N)))


def internal(tally: Tally, centers_KL: npt.NDArray[np.floating] | None = None) -> dict[str, float | int | None]:
    """Return the metrics that need no classes.

    silhouette is the simplified one (distances to centers, not to all rows); davies_bouldin is the mean over groups of
    the worst (s_i + s_j) / |c_i - c_j| with s the mean distance to the center, None where it is not defined.

    Args:
        tally: the statistics.
        centers_KL: (K, L) centers of the groups, for davies_bouldin.
    """
    rows = tally.rows_K.astype(np.float64)
    total = rows.sum()
    mean = rows.mean() if len(rows) else 0.0
    spread = None if centers_KL is None else davies_bouldin(tally, centers_KL)
    return {
        "silhouette": float(tally.silhouette_K.sum() / total) if total else 0.0,
        "davies_bouldin": spread,
        "size_cv": float(rows.std() / mean) if mean else 0.0,
        "size_max_over_mean": float(rows.max() / mean) if mean else 0.0,
        "num_empty": int((rows == 0).sum()),
    }


def davies_bouldin(tally: Tally, centers_KL: npt.NDArray[np.floating]) -> float | None:
    """Return the Davies-Bouldin index from per-group sums; None with fewer than two groups or equal centers.

    Source: Davies, Bouldin, "A Cluster Separation Measure", IEEE PAMI 1979.
    """
    used = np.flatnonzero(tally.rows_K > 0)
    if len(used) < 2:
        return None
    scatter = tally.distance_K[used] / tally.rows_K[used]
    centers = torch.from_numpy(np.ascontiguousarray(centers_KL[used], np.float64))
    worst = []
    for start in range(0, len(used), 1024):
        block = slice(start, start + 1024)
        apart = squared_distances(centers[block], centers).sqrt().numpy()
        own = np.arange(start, min(start + 1024, len(used)))
        apart[np.arange(len(own)), own] = np.inf
        if (apart <= 0).any():
            return None
        worst.append(((scatter[own, None] + scatter[None, :]) / apart).max(axis=1))
    return float(np.concatenate(worst).mean())


def _matched(table: Any) -> int:
    """Return the rows in the best one-to-one matching of groups and classes.

    Beside the classes every group has a column of its own, which stands for no class: so there is a matching that holds
    all groups, which the algorithm asks for. One more in every cell keeps these columns' zeros.

    Source: Jonker, Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
    Computing 1987, in SciPy.
    """
    import scipy.sparse.csgraph

    weights = (table if table.shape[0] <= table.shape[1] else table.T).astype(np.float64)
    weights.data += 1
    num = weights.shape[0]
    weights = scipy.sparse.hstack([weights, scipy.sparse.eye_array(num)], format="csr")
    matching = scipy.sparse.csgraph.min_weight_full_bipartite_matching(weights, maximize=True)
    matched: int = int(weights[matching].sum()) - num
    return matched


def _mutual_information(table: Any, total: int) -> tuple[float, float]:
    groups, classes = table.sum(axis=1), table.sum(axis=0)
    # Groups and classes agree; of rows that are all alone the formula would make 0 / 0.
    if len(groups) == len(classes) == table.nnz:
        return 1.0, 1.0
    g, c = table.nonzero()
    n = table.data.astype(np.float64)
    # In float64 and by logarithms: the product of two margins leaves int64 at a few billion rows.
    information = np.log(n) + np.log(total) - np.log(groups[g]) - np.log(classes[c])
    mi = max(0.0, float((n / total) @ information))
    mean = (_entropy(groups, total) + _entropy(classes, total)) / 2
    expected = _expected_information(groups, classes, total)
    tiny = np.finfo(np.float64).eps
    # The normalizer can be a rounding error away from zero; keep its sign, as scikit-learn does.
    denominator = mean - expected
    denominator = min(denominator, -tiny) if denominator < 0 else max(denominator, tiny)
    return (mi / mean if mean > tiny else 0.0), (mi - expected) / denominator


def _expected_information(groups: npt.NDArray[np.int64], classes: npt.NDArray[np.int64], total: int) -> float:
    """Return the mean mutual information of random tables with these margins.

    Every cell is hypergeometric; the mean of n/N log(n N / (a b)) is summed over the cells. scikit-learn walks from 1
    to min(a, b) in each: two minutes for 1000 leaves x 1000 classes x 1.28 M rows, and memory by the largest margin.
    Here equal pairs of margins are counted once, n runs through the window that holds all but e^-70 of the probability,
    and cells of many expected rows are expanded around their mean.

    Source: Vinh, Epps, Bailey, "Information theoretic measures for clusterings comparison", JMLR 2010, eq. 24a.
    """
    (sizes_a, count_a), (sizes_b, count_b) = (np.unique(m, return_counts=True) for m in (groups, classes))
    a, b = np.repeat(sizes_a, len(sizes_b)), np.tile(sizes_b, len(sizes_a))
    times = np.outer(count_a, count_b).ravel()
    mean = a.astype(np.float64) * b / total
    many = mean >= _MANY
    expected = float(times[many] @ _cell_by_moments(a[many], b[many], total))
    # Cells of like mean have windows of like width.
    few = np.flatnonzero(~many)[np.argsort(mean[~many], kind="stable")]
    for start in range(0, len(few), _BLOCK_CELLS):
        block = few[start : start + _BLOCK_CELLS]
        expected += float(times[block] @ _cell_by_window(a[block], b[block], total))
    return expected


def _cell_by_window(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.float64]:
    mean = a.astype(np.float64) * b / total
    # Bernstein's bound: a step of 12 deviations + 50 beyond the mean leaves less than e^-70.
    reach = 12 * np.sqrt(mean * (1 - a / total) * (1 - b / total)) + 50
    low = np.maximum(np.maximum(0, a + b - total), np.floor(mean - reach).astype(np.int64))
    high = np.minimum(np.minimum(a, b), np.ceil(mean + reach).astype(np.int64))
    log_ratio = np.log(total) - np.log(a) - np.log(b)
    likelihood, mass, information = np.ones(len(a)), np.zeros(len(a)), np.zeros(len(a))
    for step in range(int((high - low).max()) + 1):
        n = (low + step).astype(np.float64)
        likelihood *= low + step <= high
        mass += likelihood
        information += likelihood * n * (np.log(np.maximum(n, 1.0)) + log_ratio)
        # P(n + 1) / P(n) of the hypergeometric distribution.
        likelihood *= (a - n) / (n + 1) * (b - n) / (total - a - b + n + 1)
    return information / mass / total


def _cell_by_moments(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.float64]:
    mean = a.astype(np.float64) * b / total
    variance = mean * (1 - a / total) * (total - b) / (total - 1)
    third = variance * (1 - 2 * a / total) * (total - 2 * b) / (total - 2)
    # n log(n / mean) in powers of n - mean, up to the fourth.
    return (variance / (2 * mean) - third / (6 * mean**2) + variance**2 / (4 * mean**3)) / total


def _entropy(counts: npt.NDArray[np.int64], total: int) -> float:
    share = counts / total
    return float(-(share * np.log(share)).sum())


def _adjusted_rand(table: Any) -> float:
    # In float64: the number of pairs leaves int64 at a few billion rows.
    def pairs(counts: npt.NDArray[np.int64]) -> float:
        n = counts.astype(np.float64)
        return float((n * (n - 1) / 2).sum())

    both, groups, classes = pairs(table.data), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    everything = pairs(np.array([table.sum()]))
    expected = groups * classes / everything if everything else 0.0
    most = (groups + classes) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)
