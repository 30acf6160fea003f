"""The order of a merge tree: its leaves from left to right, its cuts, its nodes. Loops, never recursion.

A tree is scipy's linkage matrix Z: row t joins nodes Z[t, 0] and Z[t, 1] into node K + t at height Z[t, 2]; heights
never fall. A node's leaves stand side by side in the leaf order, first those of Z[t, 0], then those of Z[t, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Letters in this module: K leaves, T = K - 1 merges, V = 2K - 1 nodes, D width, G and P groups.


def checked_children(Z: np.ndarray) -> np.ndarray:
    """Return the (T, 2) int64 children of a (T, 4) linkage matrix.

    Raises:
        ValueError: Z is not a linkage matrix.
    """
    Z = np.asarray(Z)
    if Z.ndim != 2 or Z.shape[1] != 4:
        raise ValueError(f"a linkage matrix has shape (K-1, 4), got {Z.shape}")
    children_T2 = Z[:, :2].astype(np.int64)
    num_merges = len(Z)
    made_T1 = num_merges + 1 + np.arange(num_merges)[:, None]
    if (children_T2 < 0).any() or (children_T2 >= made_T1).any():
        raise ValueError("a linkage matrix joins leaves and merges of earlier rows only")
    if len(np.unique(children_T2)) != 2 * num_merges:
        raise ValueError("a linkage matrix joins each node once")
    return children_T2


def leaf_counts(children_T2: np.ndarray) -> list[int]:
    """Return the number of leaves under each node, V numbers, from the (T, 2) children."""
    count = [1] * (len(children_T2) + 1)
    for left, right in children_T2.tolist():
        count.append(count[left] + count[right])
    return count


def leaf_places(children_T2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first place of each node's leaves in the leaf order, and their number, both (V,) int64."""
    count = leaf_counts(children_T2)
    start = [0] * len(count)
    num_leaves = len(children_T2) + 1
    for merge in range(len(children_T2) - 1, -1, -1):
        left, right = children_T2[merge].tolist()
        start[left] = start[num_leaves + merge]
        start[right] = start[left] + count[left]
    return np.array(start, dtype=np.int64), np.array(count, dtype=np.int64)


def generations(children_T2: np.ndarray) -> Iterator[np.ndarray]:
    """Yield merges in groups whose children all lie in earlier groups: the steps of a vectorized pass upwards."""
    num_leaves = len(children_T2) + 1
    generation = [0] * num_leaves
    for left, right in children_T2.tolist():
        generation.append(1 + max(generation[left], generation[right]))
    made_T = np.array(generation[num_leaves:], dtype=np.int64)
    order_T = np.argsort(made_T, kind="stable")
    yield from np.split(order_T, np.flatnonzero(np.diff(made_T[order_T])) + 1) if len(order_T) else []


def leaf_order(Z: np.ndarray) -> np.ndarray:
    """Return the leaves from left to right: neighbors in the order are neighbors in the tree.

    The same as scipy.cluster.hierarchy.leaves_list, at any depth.

    Args:
        Z: (K-1, 4) linkage matrix.

    Returns:
        (K,) int64; entry i is the leaf at place i.

    Raises:
        ValueError: Z is not a linkage matrix.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    order_K = np.empty(num_leaves, dtype=np.int64)
    order_K[leaf_places(children_T2)[0][:num_leaves]] = np.arange(num_leaves)
    return order_K


def relabel(Z: np.ndarray, order_K: np.ndarray) -> np.ndarray:
    """Return the same tree with leaf order_K[i] named i; with the order of leaf_order, leaf ids follow the tree.

    Heights, counts, merge rows and which child stands left are kept.

    Args:
        Z: (K-1, 4) linkage matrix.
        order_K: (K,) a permutation of the leaves.

    Returns:
        (K-1, 4) float64.

    Raises:
        ValueError: Z is not a linkage matrix, or order_K is not a permutation of its leaves.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    order_K = np.asarray(order_K)
    if not np.array_equal(np.sort(order_K), np.arange(num_leaves)):
        raise ValueError(f"order must be a permutation of the {num_leaves} leaves")
    name_V = np.arange(2 * num_leaves - 1)
    name_V[order_K] = np.arange(num_leaves)
    relabeled = np.array(Z, dtype=np.float64)
    relabeled[:, :2] = name_V[children_T2]
    return relabeled


def heavier_left(Z: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """Return the same tree with the heavier child of each merge on the left.

    So the leaf order says something (largest branch first, at every node), and does not hang on how the leaves were
    numbered: a fit that differs by rounding alone gets the same order. Children of equal weight stay as they are.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) weight of each leaf.

    Returns:
        (K-1, 4) float64.

    Raises:
        ValueError: Z is not a linkage matrix, or there is not one weight per leaf.
    """
    children_T2 = checked_children(Z)
    if len(weights_K) != len(children_T2) + 1:
        raise ValueError(f"{len(weights_K)} weights for a tree of {len(children_T2) + 1} leaves")
    mass = np.asarray(weights_K, dtype=np.float64).tolist()
    for left, right in children_T2.tolist():
        mass.append(mass[left] + mass[right])
    turned = np.array(Z, dtype=np.float64)
    mass_T2 = np.array(mass)[children_T2]
    swap_T = mass_T2[:, 1] > mass_T2[:, 0]
    turned[swap_T, :2] = turned[swap_T, 1::-1]
    return turned


def in_tree_order(Z: np.ndarray, weights_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tree whose leaf ids follow its leaf order, heavier branches first, and each new leaf's present id.

    Neighboring ids are then neighboring leaves, whatever the leaves were called before.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) weight of each leaf.

    Returns:
        The (K-1, 4) float64 linkage matrix, and the (K,) int64 order: new leaf i is the present leaf order[i].

    Raises:
        ValueError: Z is not a linkage matrix, or there is not one weight per leaf.
    """
    turned = heavier_left(Z, weights_K)
    order_K = leaf_order(turned)
    return relabel(turned, order_K), order_K


def _top_nodes(children_T2: np.ndarray, num_groups: int, start_V: np.ndarray) -> np.ndarray:
    """Return the nodes left when the last num_groups - 1 merges are undone, in tree order."""
    num_leaves = len(children_T2) + 1
    if not 1 <= num_groups <= num_leaves:
        raise ValueError(f"cannot cut a tree of {num_leaves} leaves into {num_groups} groups")
    if num_groups == 1:
        return np.array([2 * num_leaves - 2])
    first_undone = 2 * num_leaves - num_groups
    node_G = children_T2[num_leaves - num_groups :].reshape(-1)
    node_G = node_G[node_G < first_undone]
    return node_G[np.argsort(start_V[node_G])]


def cut(Z: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the group of each leaf when the tree is cut into exactly num_groups groups.

    The last num_groups - 1 merges are undone. Groups are numbered from left to right in the leaf order, so neighboring
    numbers are neighboring groups, and a finer cut splits groups of a coarser one.

    Args:
        Z: (K-1, 4) linkage matrix.
        num_groups: 1 to K. Exact even where heights tie.

    Returns:
        (K,) int32.

    Raises:
        ValueError: Z is not a linkage matrix, or num_groups is out of range.
    """
    children_T2 = checked_children(Z)
    start_V, count_V = leaf_places(children_T2)
    node_G = _top_nodes(children_T2, num_groups, start_V)
    place_K = start_V[: len(children_T2) + 1]
    group_K: np.ndarray = np.repeat(np.arange(len(node_G), dtype=np.int32), count_V[node_G])[place_K]
    return group_K


@dataclass(frozen=True)
class TopOfTree:
    """The highest merges of a tree, as a tree of its own whose leaves are groups."""

    merges: np.ndarray
    """(P-1, 4) float64 linkage matrix over the groups, which are numbered as cut numbers them."""
    nodes: np.ndarray
    """(P,) int64 node of the full tree that each group is."""
    num_leaves: np.ndarray
    """(P,) int64 leaves of the full tree under each group."""


def truncate(Z: np.ndarray, num_groups: int) -> TopOfTree:
    """Return the tree above the num_groups groups of a cut, for drawing.

    Args:
        Z: (K-1, 4) linkage matrix.
        num_groups: groups to keep; a tree with fewer leaves is returned whole.

    Returns:
        The last merges, renumbered.

    Raises:
        ValueError: Z is not a linkage matrix, or num_groups is under 1.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    num_groups = min(num_groups, num_leaves)
    start_V, count_V = leaf_places(children_T2)
    node_P = _top_nodes(children_T2, num_groups, start_V)
    name_V = np.full(2 * num_leaves - 1, -1)
    name_V[node_P] = np.arange(num_groups)
    kept = slice(num_leaves - num_groups, num_leaves - 1)
    name_V[num_leaves + np.arange(num_leaves - 1)[kept]] = num_groups + np.arange(num_groups - 1)
    merges = np.array(Z, dtype=np.float64)[kept]
    merges[:, :2] = name_V[children_T2[kept]]
    merges[:, 3] = leaf_counts(merges[:, :2].astype(np.int64))[num_groups:]
    return TopOfTree(merges, node_P, count_V[node_P])


def node_table(
    Z: np.ndarray, weights_K: np.ndarray, sse_K: np.ndarray | None = None, centers_KD: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return one row for each node, leaves first, then merges in the order of their heights.

    SSE(A + B) = SSE(A) + SSE(B) + w_A w_B / (w_A + w_B) |c_A - c_B|^2. Without centers the last term is taken from the
    height of a Ward tree, height^2 / 2; for any other tree give the centers.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) rows of each leaf.
        sse_K: (K,) sum of squared errors inside each leaf; zero by default.
        centers_KD: (K, D) center of each leaf.

    Returns:
        Columns of length 2K - 1: node, parent (-1 at the root), left, right (-1 at leaves), num_leaves: int64;
        height, rows, sse: float64.

    Raises:
        ValueError: Z is not a linkage matrix, or shapes disagree.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    num_nodes = 2 * num_leaves - 1
    weights_K = np.asarray(weights_K, dtype=np.float64)
    sse_K = np.zeros(num_leaves) if sse_K is None else np.asarray(sse_K, dtype=np.float64)
    if weights_K.shape != (num_leaves,) or sse_K.shape != (num_leaves,):
        raise ValueError(f"weights and sse must have shape ({num_leaves},), got {weights_K.shape} and {sse_K.shape}")
    if centers_KD is not None and len(centers_KD) != num_leaves:
        raise ValueError(f"centers must have {num_leaves} rows, got {len(centers_KD)}")
    rise_T = np.asarray(Z)[:, 2] ** 2 / 2 if centers_KD is None else merge_sse(children_T2, weights_K, centers_KD)
    parent_V = np.full(num_nodes, -1, dtype=np.int64)
    parent_V[children_T2] = num_leaves + np.arange(num_leaves - 1)[:, None]
    rows, sse = weights_K.tolist(), sse_K.tolist()
    for (left, right), rise in zip(children_T2.tolist(), rise_T.tolist(), strict=True):
        rows.append(rows[left] + rows[right])
        sse.append(sse[left] + sse[right] + rise)
    none_K = np.full(num_leaves, -1, dtype=np.int64)
    return {
        "node": np.arange(num_nodes, dtype=np.int64),
        "parent": parent_V,
        "left": np.concatenate([none_K, children_T2[:, 0]]),
        "right": np.concatenate([none_K, children_T2[:, 1]]),
        "num_leaves": np.array(leaf_counts(children_T2), dtype=np.int64),
        "height": np.concatenate([np.zeros(num_leaves), np.asarray(Z, dtype=np.float64)[:, 2]]),
        "rows": np.array(rows),
        "sse": np.array(sse),
    }


def merge_sse(children_T2: np.ndarray, weights_K: np.ndarray, centers_KD: np.ndarray) -> np.ndarray:
    """Return the rise of the sum of squared errors at each merge, (T,) float64; O(K D) memory."""
    num_leaves = len(weights_K)
    center_KD = np.asarray(centers_KD, dtype=np.float64)
    center_KD = center_KD - center_KD.mean(axis=0)
    weight_K = weights_K.copy()
    row_V = np.arange(2 * num_leaves - 1)  # A merge takes over the row of its left child.
    rise_T = np.zeros(len(children_T2))
    for merges in generations(children_T2):
        left, right = row_V[children_T2[merges, 0]], row_V[children_T2[merges, 1]]
        row_V[num_leaves + merges] = left
        total = weight_K[left] + weight_K[right]
        share = np.divide(weight_K[right], total, out=np.zeros_like(total), where=total > 0)
        step = center_KD[right] - center_KD[left]
        rise_T[merges] = weight_K[left] * share * np.einsum("md,md->m", step, step)
        center_KD[left] += share[:, None] * step
        weight_K[left] = total
    return rise_T


def central_leaves(
    Z: np.ndarray, weights_K: np.ndarray, centers_KD: np.ndarray, allowed_K: np.ndarray | None = None
) -> np.ndarray:
    """Return for each node a leaf that stands for it: of its two children's leaves, the one nearer to the node's mean.

    A leaf stands for itself. So what climbs the tree is a tournament, O(K D) in all; the nearest of all leaves under a
    node would cost O(K D) for each level of the tree. On equal distances the left child's leaf is taken.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) rows of each leaf.
        centers_KD: (K, D) center of each leaf.
        allowed_K: (K,) bool; a leaf that is not allowed stands for nothing.

    Returns:
        (V,) int64 leaves; -1 where no leaf under the node is allowed.

    Raises:
        ValueError: Z is not a linkage matrix, or lengths disagree.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    allowed_K = np.ones(num_leaves, dtype=bool) if allowed_K is None else np.asarray(allowed_K, dtype=bool)
    weight_K = np.array(weights_K, dtype=np.float64)
    if not len(weight_K) == len(centers_KD) == len(allowed_K) == num_leaves:
        raise ValueError(f"a tree of {num_leaves} leaves needs as many weights, centers and allowed leaves")
    center_KD = np.asarray(centers_KD, dtype=np.float64)
    center_KD = center_KD - center_KD.mean(axis=0)
    mean_KD = center_KD.copy()
    row_V = np.arange(2 * num_leaves - 1)  # A merge takes over the row of its left child.
    central_V = np.full(2 * num_leaves - 1, -1, dtype=np.int64)
    central_V[:num_leaves] = np.where(allowed_K, np.arange(num_leaves), -1)
    for merges in generations(children_T2):
        left, right = row_V[children_T2[merges, 0]], row_V[children_T2[merges, 1]]
        row_V[num_leaves + merges] = left
        total = weight_K[left] + weight_K[right]
        share = np.divide(weight_K[right], total, out=np.full_like(total, 0.5), where=total > 0)
        mean_KD[left] += share[:, None] * (mean_KD[right] - mean_KD[left])
        weight_K[left] = total
        leaf_M2 = central_V[children_T2[merges]]
        step_M2D = center_KD[leaf_M2] - mean_KD[left][:, None]
        squared_M2 = np.where(leaf_M2 >= 0, np.einsum("msd,msd->ms", step_M2D, step_M2D), np.inf)
        central_V[num_leaves + merges] = leaf_M2[np.arange(len(merges)), squared_M2.argmin(axis=1)]
    return central_V
