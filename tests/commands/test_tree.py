"""`raydc tree`: a finished run's tree, cut anywhere and in other people's formats."""

import csv
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydc.cli import TREE_FORMATS, main
from raydc.commands import tree as trees
from raydc.commands.tree import SavedTree
from raydc.core.tree.order import cut
from raydc.errors import ConfigError, StageError
from raydc.runfolder.folder import RunDir
from raydc.stages import evaluate
from raydc.storage.lake import Lake
from tests.stages.runs import fill, labeled_run


@pytest.fixture
def run(tmp_path):
    """A run that is evaluated: four leaves named corner 0 to corner 3."""
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    evaluate.run(config, run)
    return run


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_cut_names_the_group_of_each_leaf(run, capsys):
    main(["tree", run.root, "--cut", "2"])
    rows = rows_of(capsys.readouterr().out)
    assert [int(r["leaf"]) for r in rows] == [0, 1, 2, 3]
    assert {r["name"] for r in rows} == {f"corner {k}" for k in range(4)}
    assert [int(r["group"]) for r in rows] == cut(trees.read(run).linkage, 2).tolist()
    assert [float(r["rows"]) for r in rows] == [25.0] * 4


def test_a_cut_may_be_a_parquet_file(run, tmp_path, capsys):
    main(["tree", run.root, "--cut", "3", "--output", str(tmp_path / "cut.parquet")])
    assert "cut.parquet" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "cut.parquet")
    assert table.column_names == ["leaf", "name", "rows", "group"]
    assert sorted(set(table["group"].to_pylist())) == [0, 1, 2]


def test_every_format_is_written_whole_to_a_file_as_to_the_terminal(run, tmp_path, capsys):
    for form in TREE_FORMATS:
        main(["tree", run.root, "--export", form])
        shown = capsys.readouterr().out
        main(["tree", run.root, "--export", form, "--output", str(tmp_path / form)])
        assert (tmp_path / form).read_text() == shown
        capsys.readouterr()


def test_what_the_formats_hold(run, tmp_path):
    tree = trees.read(run)
    for form in TREE_FORMATS:
        trees.export(tree, form, tmp_path / form)
    newick = (tmp_path / "newick").read_text()
    assert newick.endswith(";\n") and all(f"'corner {k}':" in newick for k in range(4))
    root = json.loads((tmp_path / "json").read_text())
    assert root["rows"] == 100 and root["num_leaves"] == 4 and len(root["children"]) == 2
    edges = rows_of((tmp_path / "edges").read_text())
    assert len(edges) == 6 and {e["parent"] for e in edges} == {"4", "5", "6"}
    topics = rows_of((tmp_path / "topics").read_text())
    assert topics[0]["Parent_ID"] == "6" and json.loads(topics[0]["Topics"]) == [0, 1, 2, 3]
    condensed = rows_of((tmp_path / "condensed").read_text())
    assert {"parent", "child", "lambda_val", "child_size"} == set(condensed[0])
    assert sum(float(r["child_size"]) for r in condensed if int(r["child"]) < 4) == 100


def test_fewer_nodes_and_larger_clusters_when_asked(run, capsys):
    main(["tree", run.root, "--export", "json", "--max-nodes", "3"])
    root = json.loads(capsys.readouterr().out)
    assert [child.get("collapsed", False) for child in root["children"]].count(True) >= 1
    main(["tree", run.root, "--export", "condensed", "--min-rows", "60"])
    # No split has two sides of 60 rows: one cluster, from which the leaves fall.
    assert {r["parent"] for r in rows_of(capsys.readouterr().out)} == {"4"}


def test_leaves_that_share_a_label_are_told_apart_and_without_labels_numbers_name_them(run, tmp_path):
    leaves = pq.read_table(run.uri("leaves.parquet"))
    for labels, names in (
        (["cat", "dog", "cat", None], ["cat-0", "dog", "cat-2", "3"]),
        ([None] * 4, ["0", "1", "2", "3"]),
    ):
        place = leaves.column_names.index("majority_label")
        changed = leaves.set_column(place, "majority_label", pa.array(labels, pa.string()))
        pq.write_table(changed, run.uri("leaves.parquet"))
        assert trees.read(run).names_K == names
    run.remove("leaves.parquet")
    assert trees.read(run).names_K == ["0", "1", "2", "3"]


def test_a_deep_chain_is_written_without_recursion(tmp_path):
    num = 20_000
    left = np.concatenate([[0], num + np.arange(num - 2)])
    Z = np.column_stack([left, np.arange(1, num), np.arange(1.0, num), np.arange(2, num + 1)]).astype(float)
    tree = SavedTree(Z, np.ones(num), [str(k) for k in range(num)])
    for form in ("newick", "json", "edges", "condensed"):
        trees.export(tree, form, tmp_path / form)
    with pytest.raises(ConfigError, match="--export topics: the topic table lists every leaf of every node; 20000"):
        trees.export(tree, "topics", tmp_path / "topics")


def test_refusals(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["tree", run.root, "--cut", "9"])
    assert "ConfigError: --cut 9: the tree has 4 leaves. Give a number from 1 to that." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tree", run.root])
    assert "one of the arguments --cut --export is required" in capsys.readouterr().err
    with pytest.raises(StageError, match="tree: run 'r2' has no tree yet; stage merge writes it"):
        trees.read(RunDir(Lake(), str(tmp_path / "runs"), "r2"))


def test_names_that_a_spreadsheet_would_run_are_written_as_text(run, tmp_path):
    names = ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", " =1", "\t=1", "\uff1d1", "-1", "+2.5e3", "a=b"]
    tree = trees.read(run)
    table = pa.table({"leaf": range(len(names)), "name": names, "rows": [-1.0] * len(names)})
    trees.write_groups(table, tmp_path / "cut.csv")
    read = rows_of((tmp_path / "cut.csv").read_text())
    assert [r["name"] for r in read[:7]] == [f"'{name}" for name in names[:7]]
    # Numbers and harmless text stay what they are.
    assert [r["name"] for r in read[7:]] == names[7:]
    assert {r["rows"] for r in read} == {"-1.0"}
    renamed = dataclasses.replace(tree, names_K=[f"=leaf {k}" for k in range(len(tree.names_K))])
    trees.export(renamed, "topics", tmp_path / "topics.csv")
    assert "\n=" not in (tmp_path / "topics.csv").read_text() and ",=" not in (tmp_path / "topics.csv").read_text()
