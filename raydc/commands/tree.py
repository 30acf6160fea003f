"""The tree of a finished run, cut at any size or written in other people's formats."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.core.tree import export as tree_export
from raydc.core.tree.order import cut
from raydc.errors import ConfigError, StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a formula: the four signs, also in full width, and blanks that a spreadsheet skips before them."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")

CONDENSED_SHARE = 0.01
"""Share of the rows that makes a cluster of the condensed tree, where min_rows is not given."""


@dataclass(frozen=True)
class SavedTree:
    """What tree/ of a run says, and how its leaves are called."""

    linkage: npt.NDArray[np.float64]
    """(K-1, 4) scipy linkage matrix."""

    rows_K: npt.NDArray[np.float64]
    """(K,) rows of each leaf."""

    names_K: list[str]
    """Each leaf's majority label, with its number where several leaves share it; its number where no label is known."""


def read(run: RunDir) -> SavedTree:
    """Return the tree of a run, whose names are known once it was evaluated.

    Raises:
        StageError: the run has no tree yet.
    """
    if not artifacts.NODES.exists(run):
        raise StageError(f"tree: run {run.run_id!r} has no tree yet; stage merge writes it.")
    linkage = artifacts.LINKAGE.read(run)
    num_leaves = len(linkage) + 1
    rows_K = artifacts.NODES.read(run, ["rows"])["rows"].to_numpy()[:num_leaves]
    labels = [None] * num_leaves
    if artifacts.LEAF_TABLE.exists(run):
        labels = artifacts.LEAF_TABLE.read(run, ["majority_label"])["majority_label"].to_pylist()
    return SavedTree(linkage, rows_K, _names(labels))


def groups(tree: SavedTree, num_groups: int) -> pa.Table:
    """Return leaf, name, rows and group of each leaf, when the tree is cut into exactly num_groups groups.

    Raises:
        ConfigError: the tree cannot be cut so.
    """
    if not 1 <= num_groups <= len(tree.names_K):
        raise ConfigError(f"--cut {num_groups}: the tree has {len(tree.names_K)} leaves. Give a number from 1 to that.")
    leaf = np.arange(len(tree.names_K), dtype=np.int32)
    return pa.table({"leaf": leaf, "name": tree.names_K, "rows": tree.rows_K, "group": cut(tree.linkage, num_groups)})


def write_groups(table: pa.Table, path: Path, *, parquet: bool = False) -> None:
    """Write what `groups` gave, as CSV or as Parquet."""
    if parquet:
        pq.write_table(table, path)
        return
    _write_csv(table.column_names, zip(*(column.to_pylist() for column in table.columns), strict=True), path)


def export(tree: SavedTree, form: str, path: Path, *, min_rows: float | None = None, max_nodes: int = 5000) -> None:
    """Write the tree in a format.

    newick: one line with branch lengths. json: nested, for d3.hierarchy, the top max_nodes nodes. edges: CSV of parent,
    child and length. topics: CSV as BERTopic's hierarchical_topics. condensed: CSV as HDBSCAN's condensed tree.

    Args:
        tree: what `read` gave.
        form: the format.
        path: local file.
        min_rows: condensed: rows that make a cluster; a hundredth of all by default.
        max_nodes: json: nodes that are written.

    Raises:
        ConfigError: the tree is too large for the format.
    """
    Z, rows_K, names_K = tree.linkage, tree.rows_K, tree.names_K
    try:
        if form == "newick":
            with path.open("w", encoding="utf-8") as out:
                tree_export.write_newick(Z, out, names_K)
        elif form == "json":
            with path.open("w", encoding="utf-8") as out:
                tree_export.write_d3_json(Z, rows_K, out, names_K, max_nodes=max_nodes)
        elif form == "edges":
            lines = ((parent, child, data["length"]) for parent, child, data in tree_export.edges(Z))
            _write_csv(["parent", "child", "length"], lines, path)
        elif form == "topics":
            _write_columns(tree_export.topics_table(Z, rows_K, names_K), path)
        elif form == "condensed":
            least = CONDENSED_SHARE * float(rows_K.sum()) if min_rows is None else min_rows
            columns = tree_export.condensed_tree(Z, rows_K, least)
            _write_columns({name: values.tolist() for name, values in columns.items()}, path)
        else:
            raise ValueError("no such format")
    except ValueError as error:
        raise ConfigError(f"--export {form}: {error}.") from error


def _names(labels: Sequence[str | None]) -> list[str]:
    shared = Counter(labels)
    names = []
    for leaf, label in enumerate(labels):
        if label is None or label == "":
            names.append(str(leaf))
        else:
            names.append(label if shared[label] == 1 else f"{label}-{leaf}")
    return names


def _write_columns(columns: dict[str, list[Any]], path: Path) -> None:
    _write_csv(list(columns), zip(*columns.values(), strict=True), path)


def _write_csv(header: Sequence[str], lines: Any, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_as_text(cell) for cell in line] for line in lines)


def _as_text(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe before it.

    Names come from the labels of the data, which may be somebody else's: `=HYPERLINK(...)` would run where the file is
    opened. Numbers stay as they are, in a text too.

    Source: OWASP, "CSV Injection".
    """
    if not isinstance(cell, str) or not cell.lstrip(" ").startswith(_FORMULA):
        return cell
    return cell if _NUMBER.fullmatch(cell) else f"'{cell}"
