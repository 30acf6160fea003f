"""What a person reads at the end of a run, and from `raydc show`: where it stands, a table and the paths.

From the files of the run alone, so from any machine: markers of the stages, and the driver's last heartbeat.
"""

import datetime
from typing import Any

from raydc.config import LeaseConfig
from raydc.data.schema import MANIFEST
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import Holder, holder

_STAGES = ("profile", "neighbors", "fit", "merge", "assign", "evaluate", "report", "publish")
_QUALITY = ("acc", "nmi", "ami", "ari")


def lines(run: RunDir) -> list[str]:
    """Return the state of a run and, as far as it has come, its results."""
    markers = {name: run.marker(name) for name in _STAGES}
    if markers["neighbors"] is None:
        # Not every objective needs this stage.
        del markers["neighbors"]
    text = [f"run         {run.run_id}, {_state(run, markers)}"]
    if not run.lake.exists(run.uri(MANIFEST)):
        text += _standing(run, markers)
    if run.lake.exists(run.uri("metrics.json")):
        text += _results(run.lake.read_json(run.uri("metrics.json")), markers)
    else:
        # The metrics have them among their warnings.
        profile = markers["profile"] or {}
        text += [f"note        {note}" for note in profile.get("metrics", {}).get("notes", [])]
    text.append("")
    text.append("stages      " + ", ".join(_stage(name, marker) for name, marker in markers.items()))
    written = {"labels": "labels", "tree": "tree", "model": "model", "report": "report/index.html"}
    found = [f"{name:12s}{run.uri(path)}" for name, path in written.items() if run.lake.exists(run.uri(path))]
    return text + found


def resume_command(run: RunDir) -> str:
    """Return the command that continues a run from any machine that reaches its folder and its input."""
    return f"raydc resume {run.root}"


def _standing(run: RunDir, markers: dict[str, Any]) -> list[str]:
    """Return who drives the run, what it does or did last, what is left, and how to continue if no one does."""
    found = holder(run.lake, run.root)
    text, alive = [], False
    if found is not None:
        driver, alive = _driver(found)
        text.append(f"driver      {driver}")
        progress = found.beat.progress if found.beat is not None else {}
        if "stage" in progress:
            doing = f"{progress['stage']} since {progress['started']}"
            line = f": {progress['line']}" if "line" in progress else ""
            text.append(f"{'doing' if alive else 'last':12s}{doing}{line}")
    left = [name for name, marker in markers.items() if marker is None or marker["state"] != "done"]
    text.append(f"left        {', '.join(left) or 'nothing'}")
    if not alive:
        text.append(f"continue    {resume_command(run)}")
    return text


def _driver(found: Holder) -> tuple[str, bool]:
    """Return what is known of a driver, and whether it is to be taken for alive."""
    if found.beat is None:
        return f"{found.owner}, has given no sign of life", not found.is_free
    if found.beat.released is not None:
        return f"{found.owner}, let go at {found.beat.time}: {found.beat.released}", False
    if found.is_free:
        return f"{found.owner}, dead; last heartbeat at {found.beat.time}", False
    then = datetime.datetime.strptime(found.beat.time, "%Y-%m-%dT%H:%M:%S%z")
    # Its clock and ours: for the eye only.
    age = max(0, round((datetime.datetime.now(datetime.UTC) - then).total_seconds()))
    if age <= LeaseConfig().stale_seconds:
        return f"{found.owner}, heartbeat {age} s ago", True
    return f"{found.owner}, no heartbeat for {age} s: dead, or cut off", False


def _state(run: RunDir, markers: dict[str, Any]) -> str:
    if run.lake.exists(run.uri(MANIFEST)):
        return "published"
    for name, marker in markers.items():
        if marker is None or marker["state"] != "done":
            return f"{name} {'started, not finished' if marker else 'not started'}"
    return "finished"


def _stage(name: str, marker: dict[str, Any] | None) -> str:
    if marker is None:
        return f"{name} -"
    return f"{name} {marker['seconds']:.1f} s" if marker["state"] == "done" else f"{name} running"


def _results(metrics: dict[str, Any], markers: dict[str, Any]) -> list[str]:
    rows, merge = metrics["rows"], markers["merge"] or {"metrics": {}}
    levels = ", ".join(map(str, merge["metrics"].get("levels", []))) or "none"
    text = [
        f"rows        {rows['input']:,} in = {rows['labels']:,} labels + {rows['rejects']:,} rejects",
        f"leaves      {merge['metrics'].get('leaves', '?')}, levels {levels}",
        "",
    ]
    objective = metrics["fit"]["objective"]
    names = {"raw_kmeans": "k-means on the rows", "autoencoder_kmeans": "autoencoder + k-means", "learned": objective}
    labeled = "quality" in metrics
    columns = [*(_QUALITY if labeled else ()), "silhouette"]
    text.append(f"{'':24s}" + "".join(f"{c.upper() if c in _QUALITY else c:>11s}" for c in columns))
    sampled = 0
    for name, title in names.items():
        if name == "learned" and objective in ("kmeans", "autoencoder"):
            continue
        found = metrics["baselines"].get(name)
        if found:
            sampled = found["rows"]
            text.append(_row(title, found, columns))
    for k in metrics["internal"]["levels"]:
        found = metrics["internal"]["levels"][k] | (metrics["quality"]["levels"][k] if labeled else {})
        text.append(_row(f"  level {k}", found, columns))
    if labeled:
        text.append(f"dendrogram purity {metrics['quality']['dendrogram_purity']:.4f}")
    if sampled < rows["labels"]:
        text.append(f"(methods compared on a sample of {sampled:,} rows; levels on all)")
    found = metrics.get("verdict") or {}
    text += [line for line in (found.get("sentence"), *found.get("details", [])) if line]
    # The verdict is told already; in the list of warnings it stands for those who read nothing else.
    return text + [f"warning: {w}" for w in metrics.get("warnings", []) if w != found.get("sentence")]


def _row(title: str, found: dict[str, Any], columns: list[str]) -> str:
    # A sample may hold no row of a known class where the whole input does.
    return f"{title:24s}" + "".join(f"{found[c]:11.4f}" if c in found else f"{'-':>11s}" for c in columns)
