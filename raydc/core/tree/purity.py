"""Dendrogram purity: how well a merge tree keeps known classes together.

A tree is scipy's linkage matrix, as in raydc.core.tree.order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raydc.core.tree.order import checked_children, generations

# Letters in this module: K leaves, T = K - 1 merges, V = 2K - 1 nodes, C classes.


def dendrogram_purity(Z: np.ndarray, table_KC: Any, *, block_cells: int = 2**23) -> float:
    """Return the mean, over all pairs of rows of one class, of that class's share in their lowest common ancestor.

    From counts alone: a leaf adds sum_c n_c (n_c - 1) / 2 * n_c / n, a merge of a and b adds
    sum_c n_ac n_bc (n_ac + n_bc) / (n_a + n_b); divided by the number of pairs. All in float64. O(K C), with memory for
    some of the classes at a time.

    Args:
        Z: (K-1, 4) linkage matrix.
        table_KC: (K, C) rows of each class in each leaf, an array or a sparse array of SciPy.
        block_cells: numbers of the dense table held at a time; the default takes 64 MiB.

    Returns:
        A share from 0 to 1.

    Raises:
        ValueError: Z is not a linkage matrix, the table has another number of rows or a negative entry, or no two rows
            share a class.

    Source: Heller, Ghahramani, "Bayesian hierarchical clustering", ICML 2005 (definition); the sum over leaves and
    merges is the same number.
    """
    import scipy.sparse

    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    shape = table_KC.shape if scipy.sparse.issparse(table_KC) else np.shape(table_KC)
    table = scipy.sparse.csc_array(table_KC, dtype=np.float64) if len(shape) == 2 else None
    if table is None or shape[0] != num_leaves or (table.data < 0).any():
        raise ValueError(f"the table must be ({num_leaves}, C) counts, got shape {shape}")
    class_C = table.sum(axis=0)
    num_pairs = float((class_C * (class_C - 1) / 2).sum())
    if num_pairs <= 0:
        raise ValueError("no two rows share a class: dendrogram purity has no meaning")
    steps = list(generations(children_T2))
    rows_V = np.concatenate([table.sum(axis=1), np.zeros(num_leaves - 1)])
    for merges in steps:
        rows_V[num_leaves + merges] = rows_V[children_T2[merges]].sum(axis=1)
    width = max(1, block_cells // num_leaves)
    blocks = (table[:, first : first + width].toarray() for first in range(0, shape[1], width))
    return sum(_pure_pairs(children_T2, steps, count_KC, rows_V) for count_KC in blocks) / num_pairs


def _pure_pairs(children_T2: np.ndarray, steps: list[np.ndarray], count_KC: np.ndarray, rows_V: np.ndarray) -> float:
    """Return the sum, over the pairs of these classes, of the class's share where they meet; the counts are used up."""

    def shares(pure_M: np.ndarray, rows_M: np.ndarray) -> float:
        return float(np.divide(pure_M, rows_M, out=np.zeros(len(rows_M)), where=rows_M > 0).sum())

    num_leaves = len(count_KC)
    total = shares((count_KC * (count_KC - 1) / 2 * count_KC).sum(axis=1), rows_V[:num_leaves])
    row_V = np.arange(2 * num_leaves - 1)  # A merge takes over the row of its left child.
    for merges in steps:
        left, right = row_V[children_T2[merges, 0]], row_V[children_T2[merges, 1]]
        row_V[num_leaves + merges] = left
        met_MC = count_KC[left] * count_KC[right]
        count_KC[left] += count_KC[right]
        total += shares((met_MC * count_KC[left]).sum(axis=1), rows_V[num_leaves + merges])
    return total
