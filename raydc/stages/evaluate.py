"""evaluate: every metric, from the statistics that assign counted and the tree; no row is read again."""

import logging
from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydc.config import Config
from raydc.config.stages import before
from raydc.core.metrics import scores
from raydc.core.metrics.partition_stats import Tally
from raydc.core.tree.order import central_leaves
from raydc.core.tree.purity import dendrogram_purity
from raydc.data.metrics import External, Internal, InternalOfTree, Measured, Method, Metrics, Quality, Scores
from raydc.data.records import EvaluateMetrics, StageMarker
from raydc.data.schema import level_column
from raydc.data.statistics import Statistics, nearest_rows
from raydc.errors import DataError
from raydc.labeling.label_slice import num_groups
from raydc.model import Model
from raydc.report.verdict import Verdict, verdict
from raydc.runfolder import artifacts
from raydc.runfolder.artifacts import Leaves
from raydc.runfolder.folder import RunDir

log = logging.getLogger(__name__)

_LOW_RECALL = 0.9


def run(config: Config, run: RunDir) -> EvaluateMetrics:
    """Write metrics.json and leaves.parquet, and the medoids into tree/nodes.parquet."""
    model, baselines = artifacts.MODEL.load(run), artifacts.baselines_of(run)
    statistics = artifacts.STATISTICS.read(run, num_groups(model, baselines.values()))
    leaves, linkage = artifacts.LEAVES.read(run), artifacts.LINKAGE.read(run)
    models = {"learned": model, **baselines}
    _check_sizes(run, statistics, models, leaves, linkage)
    measured = _measured(run, statistics, models, leaves, linkage)
    found = verdict(measured)
    body: Metrics = {
        **measured,
        "verdict": found.to_json(),
        "warnings": _warnings(measured, found, run, statistics.tallies["leaf"].rows_K),
    }
    for warning in body["warnings"]:
        log.warning("evaluate: %s", warning)
    artifacts.METRICS.write(run, body)
    artifacts.LEAF_TABLE.write(run, _leaf_table(statistics.tallies["leaf"], model))
    _write_medoids(run, leaves, linkage)
    return cast(EvaluateMetrics, {name: body[name] for name in EvaluateMetrics.__annotations__ if name in body})  # type: ignore[literal-required]


def _check_sizes(
    run: RunDir,
    statistics: Statistics,
    models: Mapping[str, Model],
    leaves: Leaves,
    linkage: npt.NDArray[np.float64],
) -> None:
    """Return if the files of a run, each of which is whole, are of one number of leaves.

    Raises:
        DataError: they are not; all differences in one message.
    """
    model, held = models["learned"], {name: tally.num_groups for name, tally in statistics.tallies.items()}
    expected: dict[str, int] = {"leaf": model.num_leaves} | {level_column(k): k for k in model.levels}
    for name in get_args(Method):
        if name in held:
            expected[name] = models[name].num_leaves if name in models else 0
    problems = [
        f"{artifacts.STATISTICS.path} has {held.get(name, 'no')} groups of {name}, the model {groups}"
        for name, groups in expected.items()
        if held.get(name) != groups
    ]
    others = {artifacts.LEAVES.path: len(leaves.weights_K), artifacts.LINKAGE.path: len(linkage) + 1}
    problems += [
        f"{path} has {found} leaves, the model {model.num_leaves}"
        for path, found in others.items()
        if found != model.num_leaves
    ]
    if problems:
        raise DataError(f"evaluate: {run.root}: {'; '.join(problems)}. Restore the folder, or use a new --run-id.")


def _measured(
    run: RunDir,
    statistics: Statistics,
    models: Mapping[str, Model],
    leaves: Leaves,
    linkage: npt.NDArray[np.float64],
) -> Measured:
    """Return all that was measured, in the order in which metrics.json has it."""
    model, markers = models["learned"], {name: run.marker(name) for name in before("evaluate")}
    found: Measured = {
        "rows": {"input": statistics.rows, "labels": statistics.labels, "rejects": statistics.rejects},
        "repeated_ids": _repeated_ids(markers["profile"]),
        "internal": _internal(statistics, model, leaves),
        "baselines": _baselines(statistics, models),
        "stages": {name: {"seconds": m["seconds"]} for name, m in markers.items() if m and "seconds" in m},
        "fit": run.metrics("fit"),
    }
    if (quality := _quality(statistics, model, linkage)) is not None:
        found["quality"] = quality
    if (agreement := artifacts.AGREEMENT.read_if_there(run)) is not None:
        found["agreement"] = agreement
    if markers["neighbors"] is not None:
        found["neighbors"] = run.metrics("neighbors")
    return cast(Measured, {name: found[name] for name in Measured.__annotations__ if name in found})  # type: ignore[literal-required]


def _repeated_ids(marker: StageMarker | None) -> int | None:
    """Return how many rows repeat the id of another; None where they were not counted."""
    return None if marker is None else marker.get("metrics", {}).get("repeated_ids")


def _quality(statistics: Statistics, model: Model, linkage: npt.NDArray[np.float64]) -> Quality | None:
    table, names = statistics.tallies["leaf"].classes.table()
    if not names:
        return None
    levels = {str(k): _external(statistics.tallies[level_column(k)].classes.table()[0]) for k in model.levels}
    purity = dendrogram_purity(linkage, table) if len(linkage) else float(scores.external(table)["purity"])
    return {"leaf": _external(table), "levels": levels, "dendrogram_purity": purity}


def _external(table_KC: Any) -> External:
    return cast(External, scores.external(table_KC))


def _internal(statistics: Statistics, model: Model, leaves: Leaves) -> InternalOfTree:
    levels = {
        str(k): cast(Internal, scores.internal(statistics.tallies[level_column(k)], leaves.group_centers(groups)))
        for k, groups in model.levels.items()
    }
    own = scores.internal(statistics.tallies["leaf"], model.centers_KL.double().numpy())
    return {"leaf": cast(Internal, own), "levels": levels}


def _baselines(statistics: Statistics, models: Mapping[str, Model]) -> dict[Method, Scores]:
    """Return the metrics of each baseline, and of the model itself (`learned`), on the same sample of rows."""
    found: dict[Method, Scores] = {}
    for name in get_args(Method):
        tally = statistics.tallies.get(name)
        if tally is None or not tally.num_rows:
            continue
        table, classes = tally.classes.table()
        centers = models[name].centers_KL.double().numpy()
        own = {"rows": tally.num_rows, **(scores.external(table) if classes else {}), **scores.internal(tally, centers)}
        found[name] = cast(Scores, own)
    return found


def _warnings(body: Measured, judged: Verdict, run: RunDir, rows_K: npt.NDArray[np.int64]) -> list[str]:
    # What was passed over, or is odd, in the input; a run of an earlier version has no such list.
    warnings = list(run.metrics("profile").get("notes", []))
    if judged.tone in ("same", "worse"):
        warnings.append(judged.sentence)
    warnings += [f"collapse: {sign} (see watch in the settings)" for sign in body["fit"].get("watch", [])]
    searched = body.get("neighbors")
    recall = None if searched is None else searched["recall"]
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


def _write_medoids(run: RunDir, leaves: Leaves, linkage: npt.NDArray[np.float64]) -> None:
    """Add the column medoid_id to nodes.parquet: the id of one row that stands for each node.

    Merge cannot know it: which row is nearest to a leaf is found when rows are assigned. A leaf's medoid is its nearest
    exemplar; a merge takes over the one of its children whose leaf is nearer to its own mean. Null where no row is.
    """
    nearest = nearest_rows(artifacts.EXEMPLARS.read_if_there(run), 1)
    if nearest is None:
        return
    nodes = artifacts.NODES.read(run)
    row_K = np.full(len(leaves.weights_K), -1)
    row_K[nearest["leaf"].to_numpy()] = np.arange(len(nearest))
    leaf_V = central_leaves(linkage, leaves.weights_K, leaves.means_KL, row_K >= 0)
    row_V = np.where(leaf_V >= 0, row_K[leaf_V], -1)
    medoid = nearest["id"].combine_chunks().take(pa.array(row_V, mask=row_V < 0))
    # A second evaluation replaces the column of the first.
    others = [name for name in nodes.column_names if name != "medoid_id"]
    artifacts.NODES.write(run, nodes.select(others).append_column("medoid_id", medoid))


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
