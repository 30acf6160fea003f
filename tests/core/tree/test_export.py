"""The tree in other formats: read back by their own readers, by hand, and at depths where recursion would fail."""

import io
import json
import re

import networkx as nx
import numpy as np
import pytest
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import squareform

from raydc.core.tree import export

# Two pairs and a single: ((0, 3), (1, 2)), 4.
BY_HAND = np.array([[0, 3, 1.0, 2], [1, 2, 2.0, 2], [5, 6, 3.0, 4], [4, 7, 9.0, 5]])
NO_MERGES = np.empty((0, 4))


def chain(num_leaves: int) -> np.ndarray:
    merges = np.arange(num_leaves - 1)
    left = np.where(merges == 0, 0, num_leaves + merges - 1)
    return np.stack(
        [np.minimum(left, merges + 1), np.maximum(left, merges + 1), merges + 1.0, merges + 2.0], axis=1
    ).astype(float)


def newick(Z: np.ndarray, names: list[str] | None = None) -> str:
    out = io.StringIO()
    export.write_newick(Z, out, names)
    return out.getvalue()


def d3(Z: np.ndarray, weights: np.ndarray, **options) -> str:
    out = io.StringIO()
    export.write_d3_json(Z, weights, out, **options)
    return out.getvalue()


def test_newick_by_hand():
    assert newick(BY_HAND) == "(4:9,((0:1,3:1):2,(1:2,2:2):1):6);\n"
    assert newick(NO_MERGES) == "0;\n"


def test_newick_quotes_names():
    assert newick(np.array([[0, 1, 1.0, 2]]), ["it's", "a b"]) == "('it''s':1,'a b':1);\n"


def read_newick(text: str) -> tuple[dict[int, float], list[frozenset[int]]]:
    """Read a Newick line with a stack: the depth of each leaf, and the leaves of each inner node in closing order."""
    depth: dict[int, float] = {}
    inner: list[frozenset[int]] = []
    stack: list[list[frozenset[int]]] = [[]]
    for token in re.findall(r"[()]|[^(),;:]+|:[^(),;]+", text):
        if token == "(":
            stack.append([])
        elif token == ")":
            inner.append(frozenset().union(*stack.pop()))
            stack[-1].append(inner[-1])
        elif token.startswith(":"):
            for leaf in stack[-1][-1]:
                depth[leaf] = depth.get(leaf, 0.0) + float(token[1:])
        else:
            stack[-1].append(frozenset([int(token)]))
    return depth, inner


def test_newick_read_back_is_the_tree():
    Z = linkage(np.random.default_rng(0).normal(size=(40, 3)), "ward")
    depth, inner = read_newick(newick(Z).strip())
    assert list(depth.values()) == pytest.approx([Z[-1, 2]] * 40)
    under = [frozenset([leaf]) for leaf in range(40)]
    for left, right in Z[:, :2].astype(int):
        under.append(under[left] | under[right])
    assert set(inner) == set(under[40:])


def test_edges_make_a_networkx_tree():
    Z = linkage(np.random.default_rng(0).normal(size=(30, 3)), "average")
    graph = nx.DiGraph(export.edges(Z))
    assert nx.is_arborescence(graph) and graph.number_of_nodes() == 59
    paths = dict(nx.all_pairs_dijkstra_path_length(graph.to_undirected(), weight="length"))
    theirs = squareform(cophenet(Z))
    assert paths[3][17] == pytest.approx(2 * theirs[3, 17])
    assert list(export.edges(NO_MERGES)) == []


def test_d3_json_by_hand():
    weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    names = list("abcde")
    whole = json.loads(d3(BY_HAND, weights, names_K=names))
    assert (whole["id"], whole["rows"], whole["num_leaves"], whole["name"]) == (8, 15, 5, "e")
    assert [child["id"] for child in whole["children"]] == [4, 7]
    assert whole["children"][0] == {"id": 4, "name": "e", "height": 0.0, "rows": 5, "num_leaves": 1, "value": 5}
    top = json.loads(d3(BY_HAND, weights, names_K=names, max_nodes=5))
    assert [child["id"] for child in top["children"][1]["children"]] == [5, 6]
    assert top["children"][1]["children"][0]["collapsed"] is True
    assert top["children"][1]["children"][0]["value"] == 5
    assert json.loads(d3(NO_MERGES, np.ones(1)))["value"] == 1


def test_d3_json_keeps_to_its_nodes_and_counts_each_row_once():
    Z = linkage(np.random.default_rng(0).normal(size=(500, 3)), "ward")
    weights = np.random.default_rng(1).integers(1, 9, 500).astype(float)
    waiting, num_nodes, total = [json.loads(d3(Z, weights, max_nodes=100))], 0, 0.0
    while waiting:
        node = waiting.pop()
        num_nodes += 1
        total += node.get("value", 0.0)
        waiting += node.get("children", [])
    assert num_nodes == 99 and total == weights.sum()


def test_topics_table_by_hand():
    table = export.topics_table(BY_HAND, np.array([1.0, 2, 3, 4, 5]), ["a", "b", "c", "d", "e"], num_words=2)
    assert list(table) == [
        "Parent_ID",
        "Parent_Name",
        "Topics",
        "Child_Left_ID",
        "Child_Left_Name",
        "Child_Right_ID",
        "Child_Right_Name",
        "Distance",
    ]
    assert table["Parent_ID"] == ["8", "7", "6", "5"]
    assert table["Parent_Name"] == ["e_d", "d_c", "c_b", "d_a"]
    assert table["Topics"] == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [1, 2], [0, 3]]
    assert table["Child_Left_Name"] == ["e", "d_a", "b", "a"]
    assert table["Child_Right_ID"] == ["7", "6", "2", "3"]
    assert table["Distance"] == [9, 3, 2, 1]


def test_condensed_tree_by_hand():
    # Leaf 4 is small and falls out at 9; 5 and 6 part at 3; then 0 and 3 fall apart at 1, while 1 carries on past 2.
    table = export.condensed_tree(BY_HAND, np.array([4.0, 10.0, 4.0, 4.0, 1.0]), min_rows=5)
    rows = sorted(zip(*(table[name].tolist() for name in ("parent", "child", "lambda_val", "child_size")), strict=True))
    assert rows == [
        (5, 4, 1 / 9, 1),
        (5, 6, 1 / 3, 8),
        (5, 7, 1 / 3, 14),
        (6, 0, 1, 4),
        (6, 3, 1, 4),
        (7, 1, np.inf, 10),
        (7, 2, 1 / 2, 4),
    ]


def test_condensed_tree_loses_no_leaf():
    Z = linkage(np.random.default_rng(0).normal(size=(300, 3)), "ward")
    weights = np.random.default_rng(1).integers(1, 9, 300).astype(float)
    table = export.condensed_tree(Z, weights, min_rows=40)
    is_leaf = table["child"] < 300
    assert sorted(table["child"][is_leaf].tolist()) == list(range(300))
    assert (table["child_size"][~is_leaf] >= 40).all()
    for cluster in set(table["child"][~is_leaf].tolist()):
        born = table["child_size"][table["child"] == cluster][0]
        assert table["child_size"][table["parent"] == cluster].sum() == born


def test_a_chain_of_a_hundred_thousand_can_be_written():
    Z, weights = chain(100_000), np.ones(100_000)
    assert newick(Z).count("(") == 99_999
    assert d3(Z, weights).count('"id"') == 4999
    assert sum(1 for _ in export.edges(Z)) == 199_998
    assert len(export.condensed_tree(Z, weights, 10)["parent"]) == 100_000


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match="names must have 5 entries"):
        newick(BY_HAND, ["a"])
    with pytest.raises(ValueError, match="weights must have 5 entries"):
        d3(BY_HAND, np.ones(4))
    with pytest.raises(ValueError, match="20000 leaves are more than 10000"):
        export.topics_table(chain(20_000), np.ones(20_000))
    with pytest.raises(ValueError, match="each node once"):
        newick(np.array([[0, 1, 1.0, 2], [0, 2, 2.0, 2]]))
