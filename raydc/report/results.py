"""What a run found, in plain words and in tables: the results, where the rows and the time went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from raydc.core.objectives.table import OBJECTIVES
from raydc.data.metrics import Baseline, Epoch, Measured, Scores
from raydc.report.text import count, duration, plural, score


@dataclass(frozen=True)
class Column:
    """A metric of the results table."""

    key: str
    name: str
    meaning: str
    comparable: bool = False
    """Whether methods may be ranked by it: the higher the better, and measured alike in every space."""


COLUMNS = (
    Column("acc", "ACC", "share of rows whose group, matched one to one with the classes, is the right one", True),
    Column("nmi", "NMI", "normalized mutual information of groups and classes", True),
    Column("ami", "AMI", "mutual information, adjusted for chance", True),
    Column("ari", "ARI", "adjusted Rand index", True),
    Column("purity", "Purity", "share of rows of their group's most frequent class", True),
    Column("silhouette", "Silhouette", "simplified silhouette, in the method's own space"),
    Column("davies_bouldin", "Davies\u2013Bouldin", "lower is better, in the method's own space"),
    Column("size_max_over_mean", "Largest / mean", "rows of the largest group over the mean"),
)


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One line of the results table."""

    name: str
    groups: str
    rows: str
    cells: list[str]
    best: list[bool]
    """Whether the cell is the best of its block, for columns by which methods may be ranked."""

    main: bool = False
    """The line of the run's own labels."""


@dataclass(frozen=True)
class ResultBlock:
    """Lines that may be compared with one another."""

    title: str
    lines: list[ResultRow]


@dataclass(frozen=True)
class Results:
    """The results table: columns for which at least one number exists."""

    columns: list[Column]
    blocks: list[ResultBlock]


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage."""

    name: str
    text: str
    share: float


@dataclass(frozen=True)
class Accounts:
    """Where the input rows went."""

    input: int
    labels: int
    rejects: int

    @property
    def balanced(self) -> bool:
        """Return whether no row was lost or doubled."""
        return self.input == self.labels + self.rejects


def objective_name(metrics: Measured) -> str:
    """Return the name of the run's objective as people write it."""
    name = objective(metrics)
    return OBJECTIVES[name].title if name in OBJECTIVES else name.upper()


def leaf_scores(metrics: Measured, level: int | None = None) -> Scores:
    """Return the metrics of the run's labels over all rows, at the leaves or at a level."""
    found: dict[str, Any] = {}
    for section in (metrics.get("quality"), metrics.get("internal")):
        if section:
            own = section.get("leaf") if level is None else (section.get("levels") or {}).get(str(level))
            found |= own or {}
    return cast(Scores, found)


def results(metrics: Measured, num_leaves: int, levels: Sequence[int]) -> Results:
    """Return the results table.

    Args:
        metrics: the content of metrics.json.
        num_leaves: leaves of the tree.
        levels: level sizes, coarsest first.
    """
    baselines = metrics.get("baselines") or {}
    labels = int(metrics["rows"]["labels"])
    leaf = leaf_scores(metrics)
    learned = baselines.get("learned")
    measured = [b["rows"] for b in baselines.values() if b and "rows" in b]
    sampled = bool(measured) and min(measured) < labels
    leaf_line = _Line(name=objective_name(metrics), groups=num_leaves, rows=labels, scores=leaf, main=True)

    titles: dict[Baseline, str] = {
        "raw_kmeans": "k-means on the raw rows",
        "autoencoder_kmeans": "Autoencoder + k-means",
    }
    compared: list[_Line] = [
        _Line(name=name, groups=num_leaves, rows=found.get("rows"), scores=found)
        for key, name in titles.items()
        if (found := baselines.get(key)) and not _repeats(metrics, key)
    ]
    if sampled and learned:
        compared.append(
            _Line(name=objective_name(metrics), groups=num_leaves, rows=learned.get("rows"), scores=learned)
        )
    tree = [_Line(name=f"Level {k}", groups=k, rows=labels, scores=leaf_scores(metrics, k)) for k in levels]
    separate = sampled and bool(compared)
    every = (compared if separate else [*compared, leaf_line], [leaf_line, *tree[::-1]] if separate else tree[::-1])

    columns = [c for c in COLUMNS if any(has(line.scores, c.key) for block in every for line in block)]
    first = "Compared on the same sample of rows" if separate and learned else "Leaves"
    second = "All rows" if separate else "Levels of the tree"
    blocks = [ResultBlock(t, _lines(b, columns)) for t, b in zip((first, second), every, strict=True) if b]
    return Results(columns, blocks)


def _repeats(metrics: Measured, baseline: Baseline) -> bool:
    """Return whether the run's own result is this baseline, which would then stand in the table twice."""
    return baseline_of(metrics) == baseline


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One line of the table before it is text."""

    name: str
    groups: int
    rows: int | None
    scores: Scores
    main: bool = False


def _lines(block: Sequence[_Line], columns: list[Column]) -> list[ResultRow]:
    top: dict[str, str] = {}
    alike = len({line.groups for line in block}) == 1
    for column in columns:
        found = [line.scores[column.key] for line in block if has(line.scores, column.key)]  # type: ignore[literal-required]
        if column.comparable and alike and len(found) > 1:
            top[column.key] = score(max(found))
    lines = []
    for line in block:
        cells = [score(cast(dict[str, Any], line.scores).get(c.key)) for c in columns]
        best = [c.key in top and cell == top[c.key] for c, cell in zip(columns, cells, strict=True)]
        lines.append(
            ResultRow(
                name=line.name,
                groups=count(line.groups),
                rows=count(line.rows),
                cells=cells,
                best=best,
                main=line.main,
            )
        )
    return lines


def accounts(metrics: Measured) -> Accounts:
    """Return where the input rows went."""
    rows = metrics["rows"]
    return Accounts(int(rows["input"]), int(rows["labels"]), int(rows["rejects"]))


def stage_times(seconds: Mapping[str, float]) -> list[StageTime]:
    """Return the stages in the order given, each with its share of the longest."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [StageTime(name, duration(value), value / longest) for name, value in seconds.items()]


def facts(metrics: Measured, num_leaves: int, levels: Sequence[int], seconds: float) -> list[tuple[str, str]]:
    """Return the headline numbers, as (name, value)."""
    leaf = leaf_scores(metrics)
    shown = [("NMI", leaf.get("nmi")), ("ACC", leaf.get("acc"))]
    if not has(leaf, "nmi"):
        shown = [("Silhouette", leaf.get("silhouette"))]
    return [
        ("Rows labeled", count(metrics["rows"]["labels"])),
        ("Leaves", count(num_leaves)),
        ("Levels", ", ".join(str(k) for k in levels) or "none"),
        *[(name, score(value)) for name, value in shown if value is not None],
        *([("Time", duration(seconds))] if seconds else []),
    ]


def summary(metrics: Measured, num_leaves: int, levels: Sequence[int]) -> str:
    """Return one sentence: how many rows are in how many leaves and levels."""
    rows = plural(int(metrics["rows"]["labels"]), "row")
    text = f"{rows} in {plural(num_leaves, 'leaf', 'leaves')}"
    if not levels:
        return f"{text}, without coarser levels."
    sizes = " and ".join([", ".join(str(k) for k in levels[:-1]), str(levels[-1])] if levels[1:] else [str(levels[0])])
    return f"{text}, which the tree groups into {sizes}."


def space(history: Sequence[Epoch]) -> list[str]:
    """Return how many directions the learned space has in effect, after pretraining and at the end, as sentences."""
    found = [e for e in history if e.get("effective_rank") is not None]
    if not found:
        return []
    before = [e["effective_rank"] for e in found if e["phase"] == "pretrain"]
    last = found[-1]["effective_rank"]
    if found[-1]["phase"] == "pretrain" or not before:
        return [f"Effective rank of the code: {last:.1f}."]
    return [f"Effective rank of the code: {before[-1]:.1f} after pretraining, {last:.1f} at the end."]


def objective(metrics: Measured) -> str:
    """Return the run's objective."""
    return str((metrics.get("fit") or {}).get("objective", "dec"))


def baseline_of(metrics: Measured) -> Baseline | None:
    """Return the name of the baseline that the run's objective is itself; None where it is none of them."""
    found = OBJECTIVES.get(objective(metrics))
    return None if found is None else found.baseline


def has(scores: Mapping[str, Any], key: str) -> bool:
    """Return whether a metric was measured."""
    return scores.get(key) is not None
