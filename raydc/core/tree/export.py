"""The tree in other people's formats: Newick, nested JSON, edges, topics, condensed tree. All writers are loops."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from raydc.core.tree.order import checked_children, leaf_counts

# Letters in this module: K leaves, T = K - 1 merges, V = 2K - 1 nodes.

PLAIN_NEWICK_NAME = re.compile(r"[^\s()\[\]':;,]+")

MAX_TOPIC_LEAVES = 10_000
"""The topic table lists the leaves of every node: up to K^2 / 2 numbers in a chain."""


def _names(names_K: Sequence[str] | None, num_leaves: int) -> Sequence[str]:
    if names_K is None:
        return [str(leaf) for leaf in range(num_leaves)]
    if len(names_K) != num_leaves:
        raise ValueError(f"names must have {num_leaves} entries, one for each leaf, got {len(names_K)}")
    return names_K


def _heights(Z: np.ndarray, num_leaves: int) -> list[float]:
    merged: list[float] = np.asarray(Z, dtype=np.float64)[:, 2].tolist()
    return [0.0] * num_leaves + merged


def write_newick(Z: np.ndarray, out: TextIO, names_K: Sequence[str] | None = None) -> None:
    """Write the tree as one line of Newick; a branch is as long as its two ends differ in height.

    So the path from any leaf to the root adds up to the root's height. Names with spaces or punctuation are quoted.

    Args:
        Z: (K-1, 4) linkage matrix.
        out: open text file.
        names_K: leaf names; their numbers by default.

    Raises:
        ValueError: Z is not a linkage matrix, or there is not one name for each leaf.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    names_K, height_V = _names(names_K, num_leaves), _heights(Z, num_leaves)
    children = children_T2.tolist()
    # What is still to be written, last first: a node with the length of its branch, or text.
    waiting: list[tuple[int, float] | str] = [";\n", (2 * num_leaves - 2, -1.0)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            out.write(item)
            continue
        node, length = item
        branch = f":{length:.9g}" if length >= 0 else ""
        if node < num_leaves:
            name = str(names_K[node])
            out.write(name if PLAIN_NEWICK_NAME.fullmatch(name) else "'" + name.replace("'", "''") + "'")
            out.write(branch)
            continue
        left, right = children[node - num_leaves]
        here = height_V[node]
        out.write("(")
        waiting += [")" + branch, (right, here - height_V[right]), ",", (left, here - height_V[left])]


def write_d3_json(
    Z: np.ndarray,
    weights_K: np.ndarray,
    out: TextIO,
    names_K: Sequence[str] | None = None,
    *,
    max_nodes: int = 5000,
) -> None:
    """Write the top of the tree as nested JSON for d3.hierarchy.

    Every node has id, name, height, rows and num_leaves. One that is opened has children; one that is not has value,
    its rows, so that d3's sum() counts each row once. Nodes are opened from the root in the order of their heights,
    while there are at most max_nodes; a node that stays shut although it holds several leaves says "collapsed": true.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) rows of each leaf.
        out: open text file.
        names_K: leaf names; their numbers by default. Merges are named after the heaviest leaf under them.
        max_nodes: a browser draws some thousands.

    Raises:
        ValueError: Z is not a linkage matrix, or weights or names do not fit it.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    names_K, height_V = _names(names_K, num_leaves), _heights(Z, num_leaves)
    children, count_V = children_T2.tolist(), leaf_counts(children_T2)
    rows_V, heaviest_V = _rows_and_heaviest(children_T2, weights_K)
    # Merges are numbered by height, so those that are opened are the last ones.
    first_open = 2 * num_leaves - 1 - max(0, min(num_leaves - 1, (max_nodes - 1) // 2))
    waiting: list[int | str] = ["\n", 2 * num_leaves - 2]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            out.write(item)
            continue
        head = {
            "id": item,
            "name": str(names_K[heaviest_V[item]]),
            "height": height_V[item],
            "rows": rows_V[item],
            "num_leaves": count_V[item],
        }
        if item < first_open:
            head["value"] = rows_V[item]
            if item >= num_leaves:
                head["collapsed"] = True
            out.write(json.dumps(head))
            continue
        left, right = children[item - num_leaves]
        out.write(json.dumps(head)[:-1] + ', "children": [')
        waiting += ["]}", right, ", ", left]


def _rows_and_heaviest(children_T2: np.ndarray, weights_K: np.ndarray) -> tuple[list[float], list[int]]:
    """Return the rows of each node and the heaviest leaf under it."""
    num_leaves = len(children_T2) + 1
    rows = np.asarray(weights_K, dtype=np.float64).tolist()
    if len(rows) != num_leaves:
        raise ValueError(f"weights must have {num_leaves} entries, one for each leaf, got {len(rows)}")
    heaviest = list(range(num_leaves))
    for left, right in children_T2.tolist():
        rows.append(rows[left] + rows[right])
        a, b = heaviest[left], heaviest[right]
        heaviest.append(a if (rows[a], -a) >= (rows[b], -b) else b)
    return rows, heaviest


def edges(Z: np.ndarray) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Yield (parent, child, {"length": height difference}) for every branch: networkx.DiGraph(edges(Z)) is the tree.

    Args:
        Z: (K-1, 4) linkage matrix; a tree of one leaf has no edges.

    Raises:
        ValueError: Z is not a linkage matrix.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    height_V = _heights(Z, num_leaves)
    for merge, pair in enumerate(children_T2.tolist()):
        for child in pair:
            yield num_leaves + merge, child, {"length": height_V[num_leaves + merge] - height_V[child]}


def topics_table(
    Z: np.ndarray, weights_K: np.ndarray, names_K: Sequence[str] | None = None, *, num_words: int = 5
) -> dict[str, list[Any]]:
    """Return the merges as users of BERTopic's hierarchical_topics know them, the root first.

    pandas.DataFrame(topics_table(...)) has its columns: Parent_ID, Parent_Name, Topics, Child_Left_ID, Child_Left_Name,
    Child_Right_ID, Child_Right_Name, Distance; ids are strings. A merge is named after its heaviest leaves.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) rows of each leaf.
        names_K: leaf names; their numbers by default.
        num_words: leaves that make a merge's name.

    Returns:
        Columns of K - 1 entries.

    Raises:
        ValueError: Z is not a linkage matrix, weights or names do not fit it, or it has more than MAX_TOPIC_LEAVES
            leaves.
    """
    children_T2 = checked_children(Z)
    num_leaves = len(children_T2) + 1
    if num_leaves > MAX_TOPIC_LEAVES:
        raise ValueError(
            f"the topic table lists every leaf of every node; {num_leaves} leaves are more than {MAX_TOPIC_LEAVES}. "
            "Truncate the tree first"
        )
    names_K = _names(names_K, num_leaves)
    rows_V, _ = _rows_and_heaviest(children_T2, weights_K)
    heavy: list[list[int]] = [[leaf] for leaf in range(num_leaves)]
    topics: list[list[int]] = [[leaf] for leaf in range(num_leaves)]
    for left, right in children_T2.tolist():
        heavy.append(heapq.nsmallest(num_words, heavy[left] + heavy[right], key=lambda leaf: (-rows_V[leaf], leaf)))
        topics.append(sorted(topics[left] + topics[right]))
    name_V = ["_".join(str(names_K[leaf]) for leaf in leaves) for leaves in heavy]
    parents = list(range(2 * num_leaves - 2, num_leaves - 1, -1))
    left_T, right_T = ([int(children_T2[p - num_leaves, side]) for p in parents] for side in (0, 1))
    return {
        "Parent_ID": [str(p) for p in parents],
        "Parent_Name": [name_V[p] for p in parents],
        "Topics": [topics[p] for p in parents],
        "Child_Left_ID": [str(c) for c in left_T],
        "Child_Left_Name": [name_V[c] for c in left_T],
        "Child_Right_ID": [str(c) for c in right_T],
        "Child_Right_Name": [name_V[c] for c in right_T],
        "Distance": [float(Z[p - num_leaves][2]) for p in parents],
    }


def condensed_tree(Z: np.ndarray, weights_K: np.ndarray, min_rows: float) -> dict[str, np.ndarray]:
    """Return the tree without its small splits, in the columns of HDBSCAN's condensed tree.

    From the top, at lambda = 1 / height: where both sides hold at least min_rows, the cluster ends and two new ones
    begin. A smaller side's leaves fall out of the cluster there. A leaf that carries a cluster to its end leaves it at
    infinity. Clusters are numbered from K, the root, in the order of their heights; leaves are 0 to K - 1.

    Args:
        Z: (K-1, 4) linkage matrix.
        weights_K: (K,) rows of each leaf.
        min_rows: rows that make a cluster.

    Returns:
        parent, child: int64; lambda_val, child_size: float64.

    Raises:
        ValueError: Z is not a linkage matrix, or weights do not fit it.

    Source: Campello, Moulavi, Zimek, Sander, "Hierarchical density estimates for data clustering, visualization, and
    outlier detection", ACM TKDD 10(1), 2015, section 4; columns as in the hdbscan package. Its points weigh 1, our
    leaves their rows, so a leaf can be a cluster.
    """
    children_T2 = checked_children(Z)
    rows_V, _ = _rows_and_heaviest(children_T2, weights_K)
    height_V = _heights(Z, len(children_T2) + 1)
    parent, child, lambda_val, size = zip(*_condensed(children_T2.tolist(), rows_V, height_V, min_rows), strict=True)
    return {
        "parent": np.array(parent, dtype=np.int64),
        "child": np.array(child, dtype=np.int64),
        "lambda_val": np.array(lambda_val, dtype=np.float64),
        "child_size": np.array(size, dtype=np.float64),
    }


def _condensed(
    children: list[list[int]], rows_V: list[float], height_V: list[float], min_rows: float
) -> Iterator[tuple[int, int, float, float]]:
    """Yield (parent, child, lambda, rows) of the condensed tree."""
    num_leaves, num_clusters = len(children) + 1, 1
    # Nodes that carry a cluster, highest first.
    carrying = [(-(2 * num_leaves - 2), num_leaves)]
    while carrying:
        negative, cluster = heapq.heappop(carrying)
        node = -negative
        if node < num_leaves:
            yield cluster, node, np.inf, rows_V[node]
            continue
        pair = children[node - num_leaves]
        at = 1 / height_V[node] if height_V[node] > 0 else np.inf
        large = [child for child in pair if rows_V[child] >= min_rows]
        if len(large) == 2:
            for child in pair:
                yield cluster, num_leaves + num_clusters, at, rows_V[child]
                heapq.heappush(carrying, (-child, num_leaves + num_clusters))
                num_clusters += 1
            continue
        if large:
            heapq.heappush(carrying, (-large[0], cluster))
        falling = [child for child in pair if child not in large]
        while falling:
            child = falling.pop()
            if child < num_leaves:
                yield cluster, child, at, rows_V[child]
            else:
                falling += children[child - num_leaves]
