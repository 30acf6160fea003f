"""evaluate: every metric, from the statistics that assign counted and the tree; no row is read again."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.core.metrics import scores
from raydc.core.metrics.partition_stats import Tally
from raydc.core.tree.order import central_leaves, dendrogram_purity
from raydc.data.schema import level_column
from raydc.labeling.label_slice import Statistics, nearest_rows
from raydc.model import Model
from raydc.report.verdict import verdict
from raydc.runfolder.folder import RunDir
from raydc.stages import merge

log = logging.getLogger(__name__)

_LOW_RECALL = 0.9


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write metrics.json and leaves.parquet, and the medoids into tree/nodes.parquet."""
    statistics = Statistics.from_bytes(run.lake.read_bytes(run.uri("statistics.npz")))
    model = Model.load(run.uri("model"), run.lake)
    leaves = merge.leaf_statistics(run)
    linkage = merge.read_linkage(run)
    markers = {name: run.marker(name) for name in ("profile", "neighbors", "fit", "merge", "assign")}
    fit = run.metrics("fit")
    quality = _quality(statistics, model, linkage)
    found = run.uri("agreement.json")
    agreement = run.lake.read_json(found) if run.lake.exists(found) else None
    body: dict[str, Any] = {
        "rows": {"input": statistics.rows, "labels": statistics.labels, "rejects": statistics.rejects},
        **({"quality": quality} if quality else {}),
        "repeated_ids": _repeated_ids(markers["profile"]),
        "internal": _internal(statistics, model, leaves),
        "baselines": _baselines(statistics, run),
        **({"agreement": agreement} if agreement else {}),
        "stages": {name: {"seconds": m["seconds"]} for name, m in markers.items() if m and "seconds" in m},
        "fit": fit,
    }
    if markers["neighbors"]:
        body["neighbors"] = markers["neighbors"]["metrics"]
    body["verdict"] = verdict(body).to_json()
    body["warnings"] = _warnings(body, run, statistics.tallies["leaf"].rows_K)
    for warning in body["warnings"]:
        log.warning("evaluate: %s", warning)
    run.lake.write_json(run.uri("metrics.json"), body)
    with run.lake.staged(run.uri("leaves.parquet")) as path:
        pq.write_table(_leaf_table(statistics.tallies["leaf"], model), path)
    _write_medoids(run, leaves, linkage)
    kept = ("rows", "quality", "internal", "baselines", "agreement", "verdict", "warnings")
    return {name: body[name] for name in kept if name in body}


def _repeated_ids(marker: dict[str, Any] | None) -> int | None:
    """Return how many rows repeat the id of another; None where they were not counted."""
    return ((marker or {}).get("metrics") or {}).get("repeated_ids")


def _quality(statistics: Statistics, model: Model, linkage: npt.NDArray[np.float64]) -> dict[str, Any] | None:
    table, names = statistics.tallies["leaf"].classes.table()
    if not names:
        return None
    levels = {str(k): scores.external(statistics.tallies[level_column(k)].classes.table()[0]) for k in model.levels}
    purity = dendrogram_purity(linkage, table) if len(linkage) else float(scores.external(table)["purity"])
    return {"leaf": scores.external(table), "levels": levels, "dendrogram_purity": purity}


def _internal(statistics: Statistics, model: Model, leaves: dict[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    levels = {
        str(k): scores.internal(statistics.tallies[level_column(k)], merge.group_centers(groups, leaves))
        for k, groups in model.levels.items()
    }
    own = scores.internal(statistics.tallies["leaf"], model.centers_KL.double().numpy())
    return {"leaf": own, "levels": levels}


def _baselines(statistics: Statistics, run: RunDir) -> dict[str, Any]:
    """Return the metrics of each baseline, and of the model itself (`learned`), on the same sample of rows."""
    found: dict[str, Any] = {}
    for name in ("raw_kmeans", "autoencoder_kmeans", "learned"):
        tally = statistics.tallies.get(name)
        if tally is None or not tally.num_rows:
            continue
        table, classes = tally.classes.table()
        uri = run.uri("model") if name == "learned" else run.uri("fit", "baselines", name)
        centers = Model.load(uri, run.lake).centers_KL.double().numpy()
        found[name] = {"rows": tally.num_rows, **(scores.external(table) if classes else {})}
        found[name] |= scores.internal(tally, centers)
    return found


def _warnings(body: dict[str, Any], run: RunDir, rows_K: npt.NDArray[np.int64]) -> list[str]:
    # What was passed over, or is odd, in the input; a run of an earlier version has no such list.
    warnings = list(run.metrics("profile").get("notes", []))
    if body["verdict"]["tone"] in ("same", "worse"):
        warnings.append(body["verdict"]["sentence"])
    warnings += [f"collapse: {sign} (see watch in the settings)" for sign in body["fit"].get("watch", [])]
    recall = body.get("neighbors", {}).get("recall")
    if recall is not None and recall < _LOW_RECALL:
        warnings.append(
            f"the approximate search found {recall:.3f} of the nearest neighbors; raise neighbors.num_probes"
        )
    left_out = run.metrics("merge")["left_out"]
    if left_out:
        warnings.append(f"{left_out} leaves hold no row and were left out of the model")
    single = int((rows_K == 1).sum())
    if single:
        warnings.append(
            f"{single} of {len(rows_K)} leaves hold a single row: outliers, or more leaves than the rows fill. Look at "
            "their rows in exemplars.parquet; leave outliers out, or lower cluster.num_leaves"
        )
    bad_files = run.metrics("profile")["bad_files"]
    if bad_files:
        known = [b["rows"] for b in bad_files if b["rows"] is not None]
        unknown = f", those of {len(bad_files) - len(known)} unknown" if len(known) < len(bad_files) else ""
        rows = f"{sum(known):,} rows{unknown}"
        warnings.append(f"{len(bad_files)} input files ({rows}) were left out (input.on_bad_files=quarantine)")
    if body["repeated_ids"]:
        warnings.append(f"{body['repeated_ids']} rows repeat the id of another row")
    if body["rows"]["rejects"]:
        warnings.append(f"{body['rows']['rejects']} rows were quarantined in rejects/")
    return warnings


def _write_medoids(run: RunDir, leaves: dict[str, npt.NDArray[np.float64]], linkage: npt.NDArray[np.float64]) -> None:
    """Add the column medoid_id to nodes.parquet: the id of one row that stands for each node.

    Merge cannot know it: which row is nearest to a leaf is found when rows are assigned. A leaf's medoid is its nearest
    exemplar; a merge takes over the one of its children whose leaf is nearer to its own mean. Null where no row is.
    """
    if not run.lake.exists(run.uri("exemplars.parquet")):
        return
    with run.lake.open_parquet(run.uri("exemplars.parquet")) as handle:
        nearest = nearest_rows(pq.read_table(handle), 1)
    assert nearest is not None
    with run.lake.open_parquet(run.uri("tree", "nodes.parquet")) as handle:
        nodes = pq.read_table(handle)
    row_K = np.full(len(leaves["weights"]), -1)
    row_K[nearest["leaf"].to_numpy()] = np.arange(len(nearest))
    leaf_V = central_leaves(linkage, leaves["weights"], leaves["means"], row_K >= 0)
    row_V = np.where(leaf_V >= 0, row_K[leaf_V], -1)
    medoid = nearest["id"].combine_chunks().take(pa.array(row_V, mask=row_V < 0))
    # A second evaluation replaces the column of the first.
    others = [name for name in nodes.column_names if name != "medoid_id"]
    with run.lake.staged(run.uri("tree", "nodes.parquet")) as path:
        pq.write_table(nodes.select(others).append_column("medoid_id", medoid), path)


def _leaf_table(tally: Tally, model: Model) -> pa.Table:
    table, names = tally.classes.table()
    rows = tally.rows_K
    some = np.maximum(rows, 1)
    k = tally.num_groups
    majority: list[str | None] = [None] * k
    share: list[float | None] = [None] * k
    if names:
        best, most = table.argmax(axis=1), table.max(axis=1).toarray()
        # A leaf none of whose rows has a known class has no majority.
        majority = [names[b] if n else None for b, n in zip(best.tolist(), most.tolist(), strict=True)]
        share = [n / all_rows if n else None for n, all_rows in zip(most.tolist(), rows.tolist(), strict=True)]
    return pa.table(
        {
            "leaf": np.arange(k, dtype=np.int32),
            "rows": rows,
            "mean_distance": tally.distance_K / some,
            "silhouette": tally.silhouette_K / some,
            "majority_label": pa.array(majority, pa.string()),
            "majority_share": pa.array(share, pa.float64()),
            **{level_column(size): groups for size, groups in model.levels.items()},
        }
    )
