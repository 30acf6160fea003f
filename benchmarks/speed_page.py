"""The page and the figure of the speed benchmark."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

Entry = dict[str, Any]

WANTED: dict[tuple[str, str | None], dict[str, float]] = {
    ("autoencoder epoch", "ClustPy"): {"ratio": 3.0, "limit_ratio": 1 / 1.10},
    ("DEC epoch", "ClustPy (target of the batch)"): {"ratio": 2.0},
    ("Lloyd iteration", "scikit-learn"): {"ratio": 1.4, "limit_ratio": 1 / 1.10},
    ("Lloyd iteration", "Spark MLlib"): {"ratio": 15.0},
    ("assign, Parquet to Parquet", None): {"limit_ratio": 0.8},
    ("assign, Parquet to Parquet, with the encoder", None): {"limit_ratio": 0.8},
    ("filling a resident shard", None): {"limit_ratio": 0.5},
}
"""What the ratios of a row are to be at least."""

MOST_SECONDS_BEYOND_RAY = 3.0
MOST_DRIVER_MIB = 700.0
MOST_WORKER_MIB_BEYOND_SHARD = 1536.0
MOST_DRIFT = 0.10

_INTRODUCTION = [
    "# Speed beside the peers and the bare machine",
    "",
    "Written by `python -m benchmarks speed` (`--rows NAME ...` runs some of its rows; `make bench` runs all).",
    "Ours is the command with Ray, unless the row says otherwise; the limit is the same arithmetic in one process",
    "without Ray, data in memory. Figures are medians of runs that took turns. A ratio above 1 is in our favor.",
    "Lloyd is the training worker's code in one process, and its limit is faiss.Kmeans.",
    "",
    "![ratios to the peers and to the limit](benchmarks.png)",
    "",
    "| work | size | ours | unit | peer | peer's | ratio | limit | ratio to the limit |",
    "|---|---|---|---|---|---|---|---|---|",
]

_MEMORY = "MiB of memory that a process has for itself, the largest of its kind; `process`: all that it had resident."

_REASONS = """
- An epoch beside the bare loop: in one process without Ray ours takes as long as the loop (autoencoder on MNIST, two
  threads: 6.0 to 6.2 s, the loop 5.6 to 6.1). The same process beside a job whose training worker is stopped takes 6.7
  to 7.9 s: a dozen processes of Ray stand there, and each wakes up a hundred times a second to look for signals, 0.7
  to 1.7 % of a core each, 14 % of one in all. A layer's two threads wait for the one that is interrupted.
- The bare loop beside ClustPy: of the 22 ms of its step the products take 16, at 80 % of the 400 GFLOP/s that this
  processor reaches in bf16; AdamW takes 1.7, and the ways between float32 and bf16 2.0.
- The assign stage: 4.4 s until the first of two actors has its model, of which 2.6 of the processor are what it
  imports; then the baselines on their sample, of which each size has as many rows, and the neighbors, 0.6 s.
- Lloyd: the screening by bf16 needs a processor that multiplies in tiles (AMX); without one it is the search in
  float32 that scikit-learn and FAISS do as well. On two cores of an Intel Xeon with AMX: 1.33 s, FAISS 1.37,
  scikit-learn 1.53.
- Start-up: the processes of Ray Train and Ray Data start one after the other, and import for 1.2 to 3.3 CPU seconds
  each: the controller 3.0, the autoscaling coordinator 1.3, the placement group cleaner 1.5, the synchronization actor
  1.4, the training worker 3.3, the dataset manager 1.6, the split coordinator 1.7, the reader 1.6, the statistics
  actor 1.2. A bare TorchTrainer has no dataset and imports neither FAISS nor raydc. Without the split coordinator, or
  with one environment for all, which lets Ray start processes ahead, it took as long.
- After the last label: the page. Two maps by t-SNE, and seventeen drawings of them and of the rest. The cluster is left
  meanwhile.
- The training worker beyond its shard, of 1.28 million rows: 300 MiB are torch, FAISS and Ray, 610 with pretraining;
  the codes of all rows, 256 numbers in bf16, 625, kept by k-means and then by refinement; the layers of a step of
  4,096 rows 100, and what malloc cannot use again of what these steps free. A sample of 100,000 raw rows takes 293
  before there are codes, one of 200,000 codes 195 until k-means has started.
- The driver: 290 MiB when its modules are loaded; the most when it searches the neighbors of 10,000 rows, and, of many
  rows, when it compares their ids.

Looked at on two cores of an AMD EPYC, Ray 2.60.0, 2026-11-28."""
"""What was found by looking at processes and threads."""


def page(book: Sequence[Entry]) -> str:
    """Return the page of all entries."""
    lines = list(_INTRODUCTION)
    for e in book:
        cells = [e["work"], e["size"], _number(e["ours"]), e["unit"], e["peer_name"] or "", _number(e["peer"])]
        cells += [_number(e["ratio"]), _number(e["limit"]), _number(e["limit_ratio"])]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## What was wanted", "", *verdicts(book)]
    lines += ["", "## Where the rest goes", "", *_REASONS.strip().splitlines()]
    lines += ["", "## Peak memory", "", _MEMORY, ""]
    for e in book:
        peaks = "; ".join(f"{who}: {', '.join(f'{k} {v}' for k, v in p.items())}" for who, p in e["peaks"].items())
        lines.append(f"- {e['work']}, {e['size']}: {peaks}")
    for e in book:
        if "quality" in e:
            lines += ["", f"## {e['work']}, {e['size']}", ""]
        if "seconds_by_stage" in e:
            lines += ["| stage | seconds |", "|---|---|"]
            lines += [f"| {name} | {seconds:.1f} |" for name, seconds in e["seconds_by_stage"].items()]
            lines.append("")
        if "quality" in e:
            lines += _quality(e)
    lines += ["", "## Made", ""]
    lines += [f"- {text}" for text in dict.fromkeys(_made_line(e) for e in book)]
    return "\n".join(lines) + "\n"


def _quality(e: Entry) -> list[str]:
    """Return a table of the partitions of a whole job against the planted clusters, and what is to be said of them."""
    names = {"leaf": "leaves, against 1000 planted clusters"}
    rows = {names.get(n, f"{n.replace('_', ' ')}, against as many above them"): m for n, m in e["quality"].items()}
    titles = {
        "raw_kmeans": "k-means on the rows",
        "autoencoder_kmeans": "k-means on the autoencoder's codes",
        "learned": "the leaves",
    }
    for name, measured in e.get("baselines", {}).items():
        if "nmi" in measured:
            rows[f"{titles.get(name, name)}, on a sample of {measured['rows']:,} rows"] = measured
    lines = ["| partition | ACC | NMI | AMI | ARI | purity |", "|---|---|---|---|---|---|"]
    for name, measured in rows.items():
        numbers = (f"{measured[key]:.3f}" for key in ("acc", "nmi", "ami", "ari", "purity"))
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    lines.append("")
    if e.get("verdict"):
        lines.append(f"- The run's own words: {e['verdict']}")
    for layer in e.get("quality_of_peer", {}).get("layers", []):
        lines.append(
            f"- {e['peer_name']}: {layer['clusters']:,} clusters, {100 * layer['noise']:.1f} % of the rows in none, "
            f"NMI {layer['nmi']:.3f} with the noise as a cluster."
        )
    return lines


def verdicts(book: Sequence[Entry]) -> list[str]:
    """Return a line for each bound: what was wanted, what was measured, reached or missed."""
    lines = []
    for e in book:
        for key, least in WANTED.get((e["work"], e["peer_name"]), {}).items():
            beside = e["peer_name"] if key == "ratio" else "the limit"
            if e[key] is not None:
                lines.append(_verdict(f"{e['work']} beside {beside}", e[key], least, ""))
                if key == "ratio" and e["limit"]:
                    lines[-1] += f" The limit itself is {_number(e['peer'] / e['limit'])} times as fast."
        if e["name"] == "start_up" and e["limit"] is not None:
            beyond = e["ours"] - e["limit"]
            lines.append(
                _verdict(f"start-up, {e['work']}, beyond bare Ray", beyond, MOST_SECONDS_BEYOND_RAY, " s", most=True)
            )
    return lines + _memory(book) + _flatness(book)


def _memory(book: Sequence[Entry]) -> list[str]:
    lines = []
    for e in book:
        peaks = e["peaks"].get("ours", {})
        if "rows" not in e:
            continue
        where = f"{e['rows']:,} rows, {e['work'].removeprefix('the whole job, ')}"
        if "driver" in peaks:
            lines.append(_verdict(f"driver at {where}", peaks["driver"], MOST_DRIVER_MIB, " MiB", most=True))
        if "training worker" in peaks:
            beyond = peaks["training worker"] - e["shard_mib"]
            lines.append(
                _verdict(
                    f"training worker beyond its shard at {where}",
                    beyond,
                    MOST_WORKER_MIB_BEYOND_SHARD,
                    " MiB",
                    most=True,
                )
            )
    return lines


def _flatness(book: Sequence[Entry]) -> list[str]:
    lines = []
    for work in dict.fromkeys(e["work"] for e in book if "per million rows" in e["work"]):
        found = sorted((e["rows"], e["ours"]) for e in book if e["work"] == work)
        lines.append(_drift(work, [seconds for _, seconds in found]))
        # Starting the workers takes its time whatever the number of rows.
        totals = [(rows, rows * seconds) for rows, seconds in found]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(totals)]
        if len(slopes) > 1:
            start = (totals[0][1] - totals[0][0] * slopes[0]) / 1e6
            numbers = " and ".join(_number(slope) for slope in slopes)
            lines.append(f"- {work}: {_number(start)} s whatever the rows, then {numbers} s from one size to the next.")
            lines.append(_drift(f"{work}, from one size to the next", slopes))
    return lines


def _drift(work: str, seconds: Sequence[float]) -> str:
    middle = (max(seconds) + min(seconds)) / 2
    drift = 100 * (max(seconds) / middle - 1)
    return _verdict(f"{work}: largest deviation from the middle", drift, 100 * MOST_DRIFT, " %", most=True)


def _verdict(what: str, found: float, bound: float, unit: str, *, most: bool = False) -> str:
    reached = found <= bound if most else found >= bound
    wanted = f"at {'most' if most else 'least'} {_number(bound)}{unit}"
    return f"- {what}: {_number(found)}{unit}, wanted {wanted}: {'reached' if reached else 'missed'}."


def figure(book: Sequence[Entry]) -> Figure:
    """Return a chart of the ratios, on a logarithmic axis: to the right of 1 is faster than the other side."""
    bars = []
    for e in book:
        for key, beside in (("ratio", e["peer_name"]), ("limit_ratio", "the bare limit")):
            # A row that two peers share has one limit.
            text = f"{e['work']}\nbeside {beside}"
            if e[key] is not None and text not in [b[0] for b in bars]:
                bars.append((text, e[key], key))
    chart = Figure(figsize=(8, 0.9 + 0.42 * max(len(bars), 1)), layout="constrained")
    axes = chart.subplots()
    colors = {"ratio": "#2f6f9f", "limit_ratio": "#a3a3a3"}
    for place, (_, value, key) in enumerate(reversed(bars)):
        axes.barh(place, math.log10(value), color=colors[key], height=0.62)
        side = "left" if value >= 1 else "right"
        axes.annotate(
            f"{value:.2f}" if value < 10 else f"{value:.0f}",
            (math.log10(value), place),
            xytext=(4 if value >= 1 else -4, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(bars)), [text for text, _, _ in reversed(bars)], fontsize=7.5)
    marks = [0.25, 0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks([math.log10(m) for m in marks], [f"{m:g}x" for m in marks], fontsize=8)
    ends = [math.log10(value) for _, value, _ in bars] or [0.0]
    axes.set_xlim(min(-0.35, min(ends) - 0.2), max(0.35, max(ends) + 0.2))
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("How many times as fast as the other side", fontsize=10, loc="left")
    return chart


def _made_line(entry: Entry) -> str:
    m = entry["made"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return f"{entry['name']}: {m['cpu']}, {m['cores']} cores, commit {m['commit']}, {m['date']}, {versions}."


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
