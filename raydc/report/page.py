"""The page: everything that a run found, as one HTML file that needs nothing else to be read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from raydc.core.tree.order import truncate
from raydc.data.metrics import Epoch, Metrics
from raydc.data.records import Header
from raydc.data.schema import level_column
from raydc.report import colors, figures, results
from raydc.report import text as wording
from raydc.report.colors import Legend
from raydc.report.exemplars import MOST_LEAVES, MOST_ROWS, Card, make_cards, matrix
from raydc.report.figures import Curve, Drawing, Panel
from raydc.report.map import LEAST_ROWS, project_all
from raydc.report.verdict import verdict

_MOST_GROUPS_IN_TREE = 30


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What the page is made from: the content of the run folder."""

    run_id: str
    header: Header
    """run.json."""

    metrics: Metrics
    """metrics.json."""

    seconds: Mapping[str, float]
    """Seconds of each stage, in order."""

    merges: npt.NDArray[np.float64]
    """(K-1, 4) linkage matrix; leaf ids follow the tree's order."""

    levels: Mapping[int, npt.NDArray[np.int64]]
    """(K,) group of each leaf, by the level's number of groups, coarsest first."""

    leaves: pa.Table
    exemplars: pa.Table | None = None
    map_rows: pa.Table | None = None
    image_shape: Sequence[int] | None = None
    tolerance: float | None = None
    """Share of changed rows below which refinement stops."""

    seed: int = 0

    @property
    def num_leaves(self) -> int:
        """Return the number of leaves (K)."""
        return self.leaves.num_rows


@dataclass(frozen=True)
class Page:
    """The finished report."""

    html: str
    figures: dict[str, bytes]
    """PNG of each figure, by name."""

    num_leaves_shown: int


@dataclass(frozen=True, kw_only=True)
class Map:
    """The maps of the row sample: one line of them for each way to color."""

    lines: list[tuple[Legend, list[Drawing]]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    """What each map of a line shows."""

    note: str = ""
    leaf_colors: Legend | None = None
    """(K,) colors of the leaves, matched to those of the labels."""

    sheet: bytes | None = None


@dataclass(frozen=True)
class CardGroup:
    """Leaves of one group of the coarsest level."""

    title: str
    cards: list[Card]


def build(data: RunData) -> Page:
    """Return the page and its figures; the same input gives the same bytes."""
    legend = colors.of_leaves(data.num_leaves, dict(data.levels))
    found_map = draw_map(data, legend)
    legend = found_map.leaf_colors or legend
    rows_K = data.leaves["rows"].to_numpy()
    training = draw_training(data.metrics, data.tolerance)
    sizes = figures.leaf_sizes(rows_K, legend)
    tree = draw_tree(data, legend) if len(data.merges) else None
    grouping = _grouping(data)
    cards = make_cards(
        data.leaves,
        data.exemplars,
        colors=legend.of_members(),
        group_column=level_column(grouping) if grouping else None,
        image_shape=data.image_shape,
    )
    levels = list(data.levels)
    found_verdict = verdict(data.metrics)
    html = _environment().get_template("page.html.j2").render(
        data=data,
        header=data.header,
        metrics=data.metrics,
        objective=results.objective_name(data.metrics),
        summary=results.summary(data.metrics, data.num_leaves, levels),
        verdict=found_verdict,
        facts=results.facts(data.metrics, data.num_leaves, levels, sum(data.seconds.values())),
        results=results.results(data.metrics, data.num_leaves, levels),
        warnings=[wording.clean(w, 600) for w in data.metrics.get("warnings") or [] if w != found_verdict.sentence],
        map=found_map,
        tree=tree,
        sizes=sizes,
        size_facts=_size_facts(rows_K),
        training=training,
        training_facts=_training_facts(data.metrics),
        cards=cards,
        card_groups=_card_groups(cards.cards, grouping, rows_K, data.levels),
        pictured=any(card.picture for card in cards.cards),
        most_rows=MOST_ROWS,
        most_leaves=MOST_LEAVES,
        accounts=results.accounts(data.metrics),
        stages=results.stage_times(data.seconds),
        total=wording.duration(sum(data.seconds.values())),
        settings=yaml.safe_dump(data.header.get("config") or {}, sort_keys=False, allow_unicode=True),
        versions=data.header.get("versions") or {},
    )  # fmt: skip
    drawings = [*training, sizes, *([tree] if tree else [])]
    pngs = {d.name: d.png for d in drawings if d.png} | ({"map": found_map.sheet} if found_map.sheet else {})
    return Page(html, pngs, len(cards.cards))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # For every template: Jinja's own choice by file name would leave `.j2` unescaped.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": wording.count, "duration": wording.duration, "clean": wording.clean}
    return environment


def draw_map(data: RunData, leaf_legend: Legend) -> Map:
    """Return the maps of the row sample before and after refinement, by leaf and, where labels are known, by label."""
    if data.map_rows is None or data.map_rows.num_rows < LEAST_ROWS:
        return Map(note=f"The run kept fewer than {LEAST_ROWS} rows to draw, so there is no map.")
    before, after = matrix(data.map_rows["before"]), matrix(data.map_rows["after"])
    finite = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
    if finite.sum() < LEAST_ROWS:
        return Map(note="The codes of the sampled rows are not finite, so there is no map.")
    rows = data.map_rows.filter(pa.array(finite))
    before, after = before[finite], after[finite]
    refined = before.shape != after.shape or not np.allclose(before, after, rtol=1e-4, atol=1e-6)

    by_leaf = leaf_legend.taken(rows["leaf"].to_numpy())
    legends = [by_leaf]
    labels = rows["label"].to_pylist() if "label" in rows.column_names else []
    if any(labels):
        by_label = colors.of_labels([None if label is None else str(label) for label in labels])
        by_leaf = colors.matched(by_leaf, by_label)
        legends = [by_leaf, by_label]
    points = project_all([before, after] if refined else [before], seed=data.seed)
    titles = ["before refinement", "after refinement"] if refined else ["the clustering space"]
    panels = [
        [Panel(f"map_{way}_{place}", title, p, legend) for place, (title, p) in enumerate(zip(titles, points))]
        for way, legend in enumerate(legends)
    ]
    matched = replace(leaf_legend, colors=by_leaf.colors)
    return Map(
        lines=[(line[0].legend, [figures.map_panel(panel) for panel in line]) for line in panels],
        titles=titles,
        note=_map_note(len(after), refined, len(legends) == 2),
        leaf_colors=matched,
        # Side by side where there is one map for each way to color.
        sheet=figures.map_sheet(panels if refined else [[line[0] for line in panels]]),
    )


def _map_note(num_rows: int, refined: bool, labeled: bool) -> str:
    note = f"t-SNE of a sample of {num_rows:,} rows. "
    if refined:
        note += (
            "Before: the autoencoder's code, as k-means first saw it. After: the same rows in the refined space; this "
            "map is turned onto the one before it. "
        )
    else:
        note += "The space was not refined, so there is one map instead of two. "
    note += "Near points are near in the space; the sizes of islands and the gaps between them mean little."
    return note + (
        " A leaf, or group of leaves, shares its color with the label that it matches best." if labeled else ""
    )


def draw_tree(data: RunData, legend: Legend) -> Drawing:
    """Return the top of the tree, with the rows and the most frequent label of each group."""
    top = truncate(data.merges, _MOST_GROUPS_IN_TREE)
    rows_K = data.leaves["rows"].to_numpy()
    majority = data.leaves["majority_label"].to_pylist() if "majority_label" in data.leaves.column_names else []
    share = data.leaves["majority_share"].to_pylist() if majority else []
    color_K = legend.of_members()
    texts, dots, first = [], [], 0
    for size in top.num_leaves.tolist():
        members = range(first, first + size)
        first += size
        name = f"leaf {members[0]}" if size == 1 else f"leaves {members[0]}\u2013{members[-1]}"
        text = f"{name}  \u00b7  {wording.plural(int(rows_K[members].sum()), 'row')}"
        texts.append(text + _most_frequent([(majority[i], share[i], int(rows_K[i])) for i in members if majority]))
        largest = max(members, key=lambda leaf: rows_K[leaf])
        dots.append(color_K[largest])
    return figures.dendrogram(top, texts, dots)


def _most_frequent(leaves: Sequence[tuple[str | None, float | None, int]]) -> str:
    """Return the label that is most frequent in most rows' leaves, with its share: a lower bound beyond one leaf."""
    held: dict[str, float] = {}
    for label, share, rows in leaves:
        if label is not None and share is not None:
            held[label] = held.get(label, 0.0) + share * rows
    total = sum(rows for *_, rows in leaves)
    if not held or not total:
        return ""
    label = max(held, key=lambda name: (held[name], name))
    share = held[label] / total
    if len(leaves) == 1 or share == 1:
        return f"  \u00b7  {wording.clean(label, 24)} ({wording.percent(share)})"
    # A bound is rounded down, or it would not be one.
    return f"  \u00b7  {wording.clean(label, 24)} (\u2265 {wording.percent(math.floor(100 * share) / 100)})"


def draw_training(metrics: Metrics, tolerance: float | None) -> list[Drawing]:
    """Return the figures of the training history; none for a phase without epochs."""
    history = (metrics.get("fit") or {}).get("history") or []
    pretrain = [e for e in history if e.get("phase") == "pretrain"]
    refine = [e for e in history if e.get("phase") == "refine"]
    drawings = []
    if lines := _curves(pretrain, {"loss": "loss"}):
        drawings.append(figures.curves("pretrain_loss", "Reconstruction loss of the autoencoder, by epoch.", lines))
    both = {
        "loss": "loss",
        "kl": "clustering (KL)",
        "code": "code",
        "distance": "distance to the center",
        "reconstruction": "reconstruction",
    }
    # With one term the loss is that term: one line instead of two that cover each other.
    terms = both if any(e.get("reconstruction") is not None for e in refine) else {"loss": "loss"}
    if lines := _curves(refine, terms):
        drawings.append(figures.curves("refine_loss", "Loss of the refinement, by epoch.", lines))
    for curve in _curves(refine, {"changed": "changed"}):
        drawings.append(figures.changed_share(curve.x, curve.y, tolerance))
    for curve in _curves(refine, {"top_q": "top_q"}):
        alt = "Mean largest soft assignment, by epoch."
        drawings.append(figures.curves("confidence", alt, [curve]))
    return drawings


def _curves(entries: Sequence[Epoch], keys: Mapping[str, str]) -> list[Curve]:
    found = []
    for key, name in keys.items():
        values = [(e["epoch"] + 1, cast(dict[str, float | None], e).get(key)) for e in entries]
        points = [(epoch, value) for epoch, value in values if value is not None and np.isfinite(value)]
        if points:
            found.append(Curve(name, *zip(*points)))
    return found


def _training_facts(metrics: Metrics) -> list[str]:
    fit = metrics.get("fit") or {}
    facts = []
    if fit.get("num_workers"):
        rate = f", {wording.count(fit['rows_per_second'])} rows a second" if fit.get("rows_per_second") else ""
        precision = f" in {fit['precision']}" if fit.get("precision") not in (None, "auto") else ""
        facts.append(f"{wording.plural(fit['num_workers'], 'worker')} on {fit.get('device', 'cpu')}{precision}{rate}.")
    facts += results.space(fit.get("history") or [])
    for entry in fit.get("history") or []:
        if entry.get("phase") == "kmeans" and entry.get("inertia") is not None:
            after = f" after {wording.plural(entry['iterations'], 'iteration')}" if entry.get("iterations") else ""
            facts.append(f"k-means start: inertia {_plain(entry['inertia'])}{after}.")
            if entry.get("alpha") is not None and entry.get("scale") is not None:
                kernel = f"Student-t kernel: alpha {entry['alpha']:.3g}, scale {entry['scale']:.3g}"
                top_q = entry.get("top_q")
                facts.append(kernel + ("." if top_q is None else f", mean largest soft assignment {top_q:.2f}."))
    return facts


def _plain(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _size_facts(rows_K: npt.NDArray[np.int64]) -> str:
    if not len(rows_K):
        return ""
    empty = int((rows_K == 0).sum())
    text = f"Mean {rows_K.mean():,.0f} rows, smallest {rows_K.min():,}, largest {rows_K.max():,}"
    return text + (f"; {wording.plural(empty, 'leaf', 'leaves')} without a row." if empty else ".")


def _grouping(data: RunData) -> int | None:
    """Return the coarsest level under which the leaves are listed, where it divides them."""
    for size, groups in data.levels.items():
        if 1 < int(groups.max()) + 1 < data.num_leaves and level_column(size) in data.leaves.column_names:
            return size
    return None


def _card_groups(
    cards: Sequence[Card],
    level: int | None,
    rows_K: npt.NDArray[np.int64],
    levels: Mapping[int, npt.NDArray[np.int64]],
) -> list[CardGroup]:
    if level is None:
        return [CardGroup("", list(cards))]
    groups = levels[level]
    found = []
    for group in sorted({card.group for card in cards if card.group is not None}):
        members = groups == group
        size = wording.plural(int(members.sum()), "leaf", "leaves")
        title = (
            f"Group {group} of level {level} \u00b7 {size} \u00b7 {wording.plural(int(rows_K[members].sum()), 'row')}"
        )
        found.append(CardGroup(title, [card for card in cards if card.group == group]))
    return found
