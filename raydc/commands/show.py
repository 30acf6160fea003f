"""What a person reads at the end of a run, and from `raydc show`: where it stands, a table and the paths.

From the files of the run alone, so from any machine: markers of the stages, and the driver's last heartbeat.
"""

import datetime
from collections.abc import Mapping
from typing import Any

from raydc.config import LeaseConfig
from raydc.config.stages import STAGE_NAMES, StageName
from raydc.data.metrics import Method, Metrics
from raydc.data.records import StageMarker
from raydc.report.results import baseline_of
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import Holder, holder

Markers = dict[StageName, StageMarker | None]

_TOLD = (artifacts.LABELS, artifacts.TREE, artifacts.MODEL, artifacts.PAGE)
_QUALITY = ("acc", "nmi", "ami", "ari")


def lines(run: RunDir) -> list[str]:
    """Return the state of a run and, as far as it has come, its results."""
    markers: Markers = {name: run.marker(name) for name in STAGE_NAMES}
    if markers["neighbors"] is None:
        # Not every objective needs this stage.
        del markers["neighbors"]
    text = [f"run         {run.run_id}, {_state(run, markers)}"]
    if not artifacts.MANIFEST.exists(run):
        text += _standing(run, markers)
    metrics = artifacts.METRICS.read_if_there(run)
    if metrics is not None:
        text += _results(metrics, markers)
    elif markers["profile"] is not None:
        # The metrics have them among their warnings.
        text += [f"note        {note}" for note in markers["profile"].get("metrics", {}).get("notes", [])]
    text.append("")
    text.append("stages      " + ", ".join(_stage(name, marker) for name, marker in markers.items()))
    written = {file.path.partition("/")[0]: file for file in _TOLD}
    found = [f"{name:12s}{file.uri(run)}" for name, file in written.items() if file.exists(run)]
    return text + found


def _standing(run: RunDir, markers: Markers) -> list[str]:
    """Return who drives the run, what it does or did last, what is left, and how to continue if no one does."""
    found = holder(run.lake, run.root)
    text, alive = [], False
    if found is not None:
        driver, alive = _driver(found, _stale_seconds(run))
        text.append(f"driver      {driver}")
        progress = found.beat.progress if found.beat is not None else {}
        if "stage" in progress:
            doing = f"{progress['stage']} since {progress['started']}"
            line = f": {progress['line']}" if "line" in progress else ""
            text.append(f"{'doing' if alive else 'last':12s}{doing}{line}")
    left = [name for name, marker in markers.items() if marker is None or marker["state"] != "done"]
    text.append(f"left        {', '.join(left) or 'nothing'}")
    if not alive:
        text.append(f"continue    {run.resume_command}")
    return text


def _stale_seconds(run: RunDir) -> float:
    """Return after how long without a heartbeat this run's driver is taken for dead; an old run.json may not say it."""
    header = artifacts.RUN.read_if_there(run)
    lease = {} if header is None else header["config"].get("lease", {})
    return float(lease.get("stale_seconds", LeaseConfig().stale_seconds))


def _driver(found: Holder, stale_seconds: float) -> tuple[str, bool]:
    """Return what is known of a driver, and whether it is to be taken for alive."""
    if found.beat is None:
        return f"{found.owner}, has given no sign of life", not found.is_free
    if found.beat.released is not None:
        return f"{found.owner}, let go at {found.beat.time}: {found.beat.released}", False
    if found.is_free:
        return f"{found.owner}, dead; last heartbeat at {found.beat.time}", False
    then = datetime.datetime.strptime(found.beat.time, "%Y-%m-%dT%H:%M:%S%z")
    # Two clocks are compared, so what follows is only shown; the lease itself decides by counters.
    age = max(0, round((datetime.datetime.now(datetime.UTC) - then).total_seconds()))
    if age <= stale_seconds:
        return f"{found.owner}, heartbeat {age} s ago", True
    return f"{found.owner}, no heartbeat for {age} s: dead, or cut off", False


def _state(run: RunDir, markers: Markers) -> str:
    if artifacts.MANIFEST.exists(run):
        return "published"
    for name, marker in markers.items():
        if marker is None or marker["state"] != "done":
            return f"{name} {'started, not finished' if marker else 'not started'}"
    return "finished"


def _stage(name: str, marker: StageMarker | None) -> str:
    if marker is None:
        return f"{name} -"
    return f"{name} {marker['seconds']:.1f} s" if marker["state"] == "done" else f"{name} running"


def _results(metrics: Metrics, markers: Markers) -> list[str]:
    rows, merge = metrics["rows"], markers["merge"]
    tree = {} if merge is None else merge.get("metrics", {})
    levels = ", ".join(map(str, tree.get("levels", []))) or "none"
    columns = [*(_QUALITY if "quality" in metrics else ()), "silhouette"]
    compared, sampled = _compared(metrics, columns)
    text = [
        f"rows        {rows['input']:,} in = {rows['labels']:,} labels + {rows['rejects']:,} rejects",
        f"leaves      {tree.get('leaves', '?')}, levels {levels}",
        "",
        f"{'':24s}" + "".join(f"{c.upper() if c in _QUALITY else c:>11s}" for c in columns),
        *compared,
    ]
    quality = metrics.get("quality")
    for k, internal in metrics["internal"]["levels"].items():
        scores: dict[str, Any] = {**internal, **(quality["levels"][k] if quality else {})}
        text.append(_row(f"  level {k}", scores, columns))
    if quality:
        text.append(f"dendrogram purity {quality['dendrogram_purity']:.4f}")
    if sampled < rows["labels"]:
        text.append(f"(methods compared on a sample of {sampled:,} rows; levels on all)")
    return text + _judged(metrics)


def _compared(metrics: Metrics, columns: list[str]) -> tuple[list[str], int]:
    """Return a line for each method, and on how many rows they are compared."""
    objective = metrics["fit"]["objective"]
    names: dict[Method, str] = {
        "raw_kmeans": "k-means on the rows",
        "autoencoder_kmeans": "autoencoder + k-means",
        "learned": objective,
    }
    if baseline_of(metrics) is not None:
        del names["learned"]
    text, sampled = [], 0
    for name, title in names.items():
        if found := metrics["baselines"].get(name):
            sampled = found["rows"]
            text.append(_row(title, found, columns))
    return text, sampled


def _judged(metrics: Metrics) -> list[str]:
    """Return the verdict and the warnings."""
    found = metrics.get("verdict")
    sentence, details = (found["sentence"], found["details"]) if found else ("", [])
    # The verdict is told already; in the list of warnings it stands for those who read nothing else.
    warnings = [f"warning: {w}" for w in metrics.get("warnings", []) if w != sentence]
    return [line for line in (sentence, *details) if line] + warnings


def _row(title: str, found: Mapping[str, Any], columns: list[str]) -> str:
    # A sample may hold no row of a known class where the whole input does.
    return f"{title:24s}" + "".join(f"{found[c]:11.4f}" if c in found else f"{'-':>11s}" for c in columns)
