"""What a sweep shows: the table of criteria by K, the recommendation, and the curves."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raydc.data.records import SweepRecord
from raydc.report.figures import ACCENT, INK, MUTED, STYLE

# (key, head of its column, its panel's title)
_COLUMNS = (
    ("inertia", "inertia", "Inertia, in each K's own space"),
    ("silhouette", "silhouette", "Silhouette (higher is better)"),
    ("davies_bouldin", "DB", "Davies-Bouldin (lower is better)"),
    ("calinski_harabasz", "CH", "Calinski-Harabasz (higher is better)"),
    ("neighbor_agreement", "neighbors", "Neighbor agreement (higher is better)"),
    ("stability", "stability", "Stability: ARI of two halves"),
    ("g", "G", "G = training loss / held-out loss"),
    ("empty", "empty", ""),
    ("acc", "ACC", ""),
    ("nmi", "NMI", "NMI with the known classes (no vote)"),
    ("ari", "ARI", ""),
)
_CRITERION = {
    "silhouette": "silhouette",
    "davies_bouldin": "Davies-Bouldin",
    "calinski_harabasz": "Calinski-Harabasz",
    "neighbor_agreement": "neighbor agreement",
    "stability": "stability",
    "g": "G",
}


def page(body: SweepRecord, *, markdown: bool = False) -> list[str]:
    """Return the table, the votes and the recommendation as lines of text.

    Args:
        body: the content of sweep.json.
        markdown: as a Markdown page instead of plain columns.
    """
    entries, rows, advice = _values(body), body["rows"], body["recommendation"]
    shown = [(key, head) for key, head, _ in _COLUMNS if any(e.get(key) is not None for e in entries)]
    table = [["K", *(head for _, head in shown)]]
    table += [[str(e["k"]), *(_number(key, e.get(key)) for key, _ in shown)] for e in entries]
    about = (
        f"{rows['trained']:,} rows trained on and {rows['held_out']:,} held out, by hash of the row key, of "
        f"{rows['input']:,}; neighbors, stability and known classes on a sample of {rows['sample']:,}. "
        "Silhouette, DB and CH are measured in the pretrained code, the same for every K."
    )
    votes = [f"{v['criterion']}: {v['num_leaves'] or 'abstains'} ({v['reason']})" for v in advice["votes"]]
    drop = advice["drop"]
    fall = f"G falls after K = {drop}." if drop else "G falls nowhere beyond its standard error."
    if not markdown:
        widths = [max(len(line[i]) for line in table) + 2 for i in range(len(table[0]))]
        text = ["".join(f"{cell:>{w}s}" for cell, w in zip(line, widths)) for line in table]
        return [*text, "", about, *votes, fall, advice["sentence"]]
    head, *others = ["| " + " | ".join(line) + " |" for line in table]
    rule = "|" + "---|" * len(table[0])
    listed = [f"- {v}" for v in votes]
    return ["# Sweep of K", "", advice["sentence"], fall, "", *[head, rule, *others], "", about, "", *listed]


def figure(body: SweepRecord) -> bytes:
    """Return the curves of the criteria by K as a PNG; each vote and the recommended K are marked."""
    entries, advice = _values(body), body["recommendation"]
    votes = {v["criterion"]: v["num_leaves"] for v in advice["votes"]}
    panels = [(key, title) for key, _, title in _COLUMNS if title and any(e.get(key) is not None for e in entries)]
    columns = 2
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(9.0, 2.1 * lines + 0.7), layout="constrained")
        FigureCanvasAgg(drawing)
        grid = drawing.subplots(lines, columns, squeeze=False)
        for place, axes in enumerate(grid.ravel()):
            if place >= len(panels):
                axes.set_visible(False)
                continue
            key, title = panels[place]
            _panel(axes, entries, key, title, votes.get(_CRITERION.get(key, "")), advice["num_leaves"])
        chosen = advice["num_leaves"]
        drawing.suptitle(
            f"K = {chosen} recommended (dashed); filled: the vote of a criterion" if chosen else "no K recommended",
            color=INK,
        )
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _values(body: SweepRecord) -> list[Mapping[str, Any]]:
    """Return the entries as mappings of criteria, of which the table shows those that were measured."""
    return [cast(Mapping[str, Any], entry) for entry in body["entries"]]


def _panel(
    axes: Axes, entries: Sequence[Mapping[str, Any]], key: str, title: str, vote: int | None, chosen: int | None
) -> None:
    found = [(e["k"], e[key]) for e in entries if e.get(key) is not None]
    ks, values = zip(*found)
    errors = {"stability": "stability_error", "g": "g_error"}.get(key)
    if errors is not None:
        spread = [2 * e.get(errors, 0.0) for e in entries if e.get(key) is not None]
        axes.errorbar(ks, values, yerr=spread, color=ACCENT, ecolor=MUTED, elinewidth=0.8, capsize=2)
    else:
        axes.plot(ks, values, color=ACCENT)
    axes.plot(ks, values, "o", color=ACCENT, markerfacecolor="white", markersize=4)
    if vote is not None:
        axes.plot([vote], [dict(found)[vote]], "o", color=ACCENT, markersize=7)
    if chosen is not None:
        axes.axvline(chosen, color=MUTED, linestyle="--", linewidth=0.8)
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel("K")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "empty":
        return str(value)
    return f"{value:,.0f}" if key in ("inertia", "calinski_harabasz") and abs(value) >= 1000 else f"{value:.4g}"
