"""The page of the methods: means and spreads over seeds, each seed's accuracy, what was published."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]

PUBLISHED = {
    "mnist": {
        "raw_kmeans": "ACC .535 (DEC paper)",
        "autoencoder_kmeans": "ACC .818 (DEC paper, table 3); .879, NMI .807, ARI .783 (DEC-keras, 10 runs)",
        "dec": "ACC .843 (DEC paper, best of 9 settings); .912 (.830 - .964), NMI .869, ARI .856 (DEC-keras, 10 runs)",
        "dec_layerwise": "as DEC; ACC .801, NMI .748 (a third-party redo with the paper's schedule)",
        "idec": "ACC .881, NMI .867 (IDEC paper)",
        "dcn": "ACC .83, NMI .81, ARI .75 (DCN paper, by an issue of its code)",
        "vade": "ACC .945 (README of the authors' code, best run)",
    }
}
"""Figures that were read in the paper, the code or an issue of the authors, with where they stand."""

BOUNDS = {"mnist": {"dec": 0.85, "idec": 0.86, "dcn": 0.80, "vade": 0.85}}
"""What the mean accuracy over the seeds is to reach at least."""

NOT_BELOW = {"dcn": "autoencoder_kmeans"}
"""Methods that are to do no worse than another one from which they start."""

NOTES = {
    "mnist": [
        "`sae_kmeans` and `dec_layerwise` take 20 epochs for each pair of layers and 30 for the whole, 110 in all, and "
        "end below 30 of the whole alone. DEC's paper takes 50,000 steps for each pair and 100,000 for the whole at "
        "batches of 256 (183 and 366 epochs), ten times as many: about seventeen hours of a core for five seeds, which "
        "were not spent.",
        "`vade` gets better for as long as it was looked at: mean ACC over the five seeds .842, .844, .863, .874, "
        ".888, .898 and .904 after 1, 10, 20, 30, 40, 50 and 60 epochs (seed 1, the worst, falls from .820 to .750 "
        "before it rises to .828). Its authors train for 300. An earlier set of five, of 40 epochs, had a mean of "
        ".850: which way a seed goes is chance, and five of them leave a standard error of .03. Three fits shared "
        "two cores here, which the seconds of `vade` show.",
    ]
}
"""What is to be said of the figures of a data set."""

_INTRODUCTION = """# Methods over seeds

Written by `python -m benchmarks methods --mnist FOLDER`, which fits by the settings of `jobs/digits.yaml` and
`jobs/mnist.yaml` and what benchmarks/methods.py sets for a method. A seed's methods start from the same pretrained
autoencoder; `sae_kmeans` and `dec_layerwise` from one that was pretrained layer by layer. Seconds are of the fit in one
process, with its pretraining. Published figures come from other settings and other numbers of runs; they say what to
expect, not what is comparable.

`planted` and `digits, unit rows` are written by `python -m benchmarks heads`: a head on frozen rows (temi, icon) beside
spherical k-means and DEC. The planted rows are 50,000 in 384 dimensions, in 1000 clusters whose sizes fall as 1/rank,
with noise of twice the length of a center; every row lies nearest to its own center. Their seconds are of one thread
on a busy machine, with the search of the neighbors where there is one."""


def page(book: Sequence[Entry]) -> str:
    """Return the page of all entries."""
    lines = [_INTRODUCTION, "", _machines(book), ""]
    names = sorted({e["data"] for e in book if "r_min" not in e["data"]})
    for name in names:
        lines += _section(name, [e for e in book if e["data"] == name])
    unequal = [e for e in book if "r_min" in e["data"]]
    if unequal:
        lines += _imbalance(unequal)
    return "\n".join(lines)


def _machines(book: Sequence[Entry]) -> str:
    where = sorted({f"{e['cpu']}, {e['cores']} cores" for e in book if "cpu" in e})
    commits = sorted({e["commit"] for e in book if "commit" in e})
    return f"Made on {'; '.join(where)}; commits {', '.join(commits)} (each entry of methods.json names its own)."


def _section(name: str, runs: Sequence[Entry]) -> list[str]:
    seeds = sorted({e["seed"] for e in runs})
    methods = list(dict.fromkeys(e["method"] for e in runs))
    lines = [
        f"## {name}",
        "",
        "| method | seeds | ACC mean (min - max) | NMI mean (min - max) | ARI mean (min - max) | seconds | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        own = [e for e in runs if e["method"] == method]
        spreads = " | ".join(_spread([e[k] for e in own]) for k in ("acc", "nmi", "ari"))
        seconds = [e["seconds"] for e in own if "seconds" in e]
        duration = f"{statistics.mean(seconds):.0f}" if seconds else ""
        lines.append(f"| {method} | {len(own)} | {spreads} | {duration} | {PUBLISHED.get(name, {}).get(method, '')} |")
    lines += ["", "| ACC | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---" * (1 + len(seeds)) + "|"]
    for method in methods:
        found = {e["seed"]: f"{e['acc']:.4f}" for e in runs if e["method"] == method}
        lines.append(f"| {method} | " + " | ".join(found.get(s, "") for s in seeds) + " |")
    notes = [text for note in NOTES.get(name, []) for text in (*textwrap.wrap(note, 120), "")]
    return [*lines, "", *_bounds(name, runs), *notes]


def _bounds(name: str, runs: Sequence[Entry]) -> list[str]:
    """Return what the means were to reach, and whether they do."""
    means = {m: statistics.mean(e["acc"] for e in runs if e["method"] == m) for m in {e["method"] for e in runs}}
    lines = []
    for method, bound in BOUNDS.get(name, {}).items():
        if method not in means:
            continue
        mean, other = means[method], NOT_BELOW.get(method)
        lines.append(f"- {method} {mean:.4f}, wanted at least {bound:.2f}: {_verdict(mean, bound)}.")
        if other in means:
            lines[-1] += f" {other} {means[other]:.4f}, wanted not above: {_verdict(mean, means[other])}."
    return ["Mean accuracies and what they are to reach:", "", *lines, ""] if lines else []


def _verdict(mean: float, bound: float) -> str:
    return "reached" if mean >= bound else f"missed by {bound - mean:.4f}"


def _imbalance(runs: Sequence[Entry]) -> list[str]:
    names = sorted({e["data"] for e in runs})
    lines = [
        "## Classes of unequal size",
        "",
        "MNIST subsampled by `--imbalance`: r_min of class 0 is kept, all of class 9, linear between.",
        "",
        "| data | method | seeds | ACC mean (min - max) | NMI mean (min - max) | ARI mean (min - max) |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        for method in dict.fromkeys(e["method"] for e in runs if e["data"] == name):
            own = [e for e in runs if (e["data"], e["method"]) == (name, method)]
            spreads = " | ".join(_spread([e[k] for e in own]) for k in ("acc", "nmi", "ari"))
            lines.append(f"| {name} | {method} | {len(own)} | {spreads} |")
    accuracy = {(e["data"], e["seed"], e["method"]): e["acc"] for e in runs}
    gains = [
        acc - accuracy[data, seed, "autoencoder_kmeans"]
        for (data, seed, method), acc in accuracy.items()
        if method == "dec" and (data, seed, "autoencoder_kmeans") in accuracy
    ]
    if gains:
        mean = statistics.mean(gains)
        lines += ["", f"DEC beyond autoencoder_kmeans, mean of {len(gains)} pairs: {mean:+.4f} in ACC, wanted +0.02."]
    return [*lines, ""]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} - {max(values):.4f})"
