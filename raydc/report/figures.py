"""The figures of the report, one function each: data in, the same drawing out as SVG for the page and PNG for a file.

No pyplot and no global state but the style, which is set around each drawing and put back. Colors that depend on the
page's light or dark theme are written into the SVG as CSS variables; text stays text, sharp and in the page's font.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from raydc.core.tree.order import TopOfTree
from raydc.report.colors import Legend
from raydc.report.text import clean

# Each stands for a CSS variable of the page; written as a color that nothing else uses.
INK, MUTED, RULE, PAPER, ACCENT = "#1b1f24", "#5c6570", "#d9dde2", "#fffffe", "#1f6f8b"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper", ACCENT: "--accent"}

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    # A label may contain a dollar sign, or half a formula.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.unicode_minus": True,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
}

_DOTS_PER_INCH = 200
_MOST_NAMES_ON_A_MAP = 12
_MOST_BARS = 60


@dataclass(frozen=True)
class Drawing:
    """A finished figure."""

    name: str
    alt: str
    svg: Markup
    """For the page: no outside reference, ids of its own, theme colors as CSS variables."""

    png: bytes | None = None
    """For a file; a map has none of its own."""


@dataclass(frozen=True)
class Curve:
    """One line of a training figure."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def curves(name: str, alt: str, lines: Sequence[Curve], *, x_label: str = "epoch") -> Drawing:
    """Return curves over one axis; the axis is logarithmic where the values span more than a factor of ten."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.0, 2.5)
        values = np.concatenate([np.asarray(line.y, dtype=np.float64) for line in lines])
        if values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            _plain_log_ticks(axes, values, "{:g}".format)
        else:
            axes.set_ylim(*_padded(values))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for line, color in zip(lines, (ACCENT, "#e76300", "#832db6", "#94a4a2")):
            axes.plot(line.x, line.y, color=color, label=clean(line.name, 30), marker=_marker(line), markersize=3.5)
        if len(lines) > 1:
            axes.legend(loc="best")
        _epoch_axis(axes, x_label)
        return _finish(figure, name, alt)


def changed_share(x: Sequence[float], share: Sequence[float], tolerance: float | None) -> Drawing:
    """Return the share of rows that changed their leaf on a logarithmic axis, and the share at which training stops."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(5.0, 2.5)
        values = np.asarray(share, dtype=np.float64)
        positive = [*values[values > 0], *([tolerance] if tolerance else [])]
        # Nothing changed has no place on a logarithmic axis: it stands, hollow, just below all else.
        floor = min(positive, default=1e-3) / 2
        axes.set_yscale("log")
        axes.plot(x, np.maximum(values, floor), color=ACCENT, zorder=2)
        axes.plot(np.asarray(x)[values > 0], values[values > 0], "o", color=ACCENT, markersize=3.5, zorder=3)
        none = values <= 0
        axes.plot(np.asarray(x)[none], np.full(none.sum(), floor), "o", color=ACCENT, mfc=PAPER, markersize=4, zorder=3)
        if tolerance:
            axes.axhline(tolerance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"stops below {_plain_percent(tolerance)}", (0, tolerance), xycoords=("axes fraction", "data"),
                xytext=(4, 3), textcoords="offset points", ha="left", color=MUTED, fontsize=8.5,
            )  # fmt: skip
        _plain_log_ticks(axes, np.array([floor, *positive]), _plain_percent)
        _epoch_axis(axes, "epoch")
        hollow = " A hollow point means that no row changed." if none.any() else ""
        return _finish(figure, "changed", f"Share of rows that changed their leaf, by epoch.{hollow}")


def leaf_sizes(rows_K: npt.NDArray[np.int64], legend: Legend) -> Drawing:
    """Return the rows of each leaf in tree order, or the sorted curve where there are more than 60, with their mean."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(9.0, 2.7)
        mean = float(rows_K.mean())
        if len(rows_K) <= _MOST_BARS:
            axes.bar(np.arange(len(rows_K)), rows_K, color=legend.of_members(), width=0.78, alpha=0.85)
            axes.set_xlabel("leaf, in the order of the tree")
            axes.xaxis.set_major_locator(MaxNLocator(30, integer=True, steps=[1, 2, 5, 10]))
            axes.set_xlim(-0.7, len(rows_K) - 0.3)
        else:
            rank, ordered = np.arange(1, len(rows_K) + 1), np.sort(rows_K)[::-1]
            axes.fill_between(rank, ordered, step="mid", color=ACCENT, alpha=0.18, linewidth=0)
            axes.step(rank, ordered, where="mid", color=ACCENT)
            axes.set_xlabel("leaf, from the largest to the smallest")
            axes.set_xlim(1, len(ordered))
        axes.axhline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {mean:,.0f}", (1, mean), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", ha="left", va="center", fontsize=8.5,
        )  # fmt: skip
        axes.set_ylim(0, max(float(rows_K.max()), 1.0) * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylabel("rows")
        return _finish(figure, "leaf_sizes", "Rows of each leaf, with their mean.")


def dendrogram(top: TopOfTree, texts: Sequence[str], colors: Sequence[str]) -> Drawing:
    """Return the top of the tree, root at the left, one line of text and one dot for each group.

    Args:
        top: P groups and the merges above them.
        texts: (P,) what stands beside each group.
        colors: (P,) color of each group's dot.
    """
    with matplotlib.rc_context(STYLE):
        num_groups = len(texts)
        figure, axes = _axes(9.0, 0.75 + 0.215 * num_groups)
        place, height = _node_places(top.merges)
        segments = []
        for merge, (left, right) in enumerate(top.merges[:, :2].astype(int).tolist()):
            up = height[num_groups + merge]
            start, end = (height[left], place[left]), (height[right], place[right])
            segments.append([start, (up, place[left]), (up, place[right]), end])
        axes.add_collection(LineCollection(segments, colors=MUTED, linewidths=1.1, capstyle="round"))
        axes.scatter(np.zeros(num_groups), np.arange(num_groups), c=list(colors), s=26, zorder=3, clip_on=False, lw=0)
        tallest = float(height.max()) or 1.0
        axes.set_xlim(tallest * 1.02, -tallest * 0.012)
        axes.set_ylim(num_groups - 0.4, -0.6)
        axes.yaxis.tick_right()
        axes.set_yticks(range(num_groups), [clean(text, 70) for text in texts])
        axes.tick_params(axis="y", length=0, labelcolor=INK, pad=6)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("height of the merge")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _finish(figure, "dendrogram", f"The top of the cluster tree, cut to {num_groups} groups.")


def _node_places(merges: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return where each node of a small tree stands across its height, and that height; groups come first."""
    num_groups = len(merges) + 1
    place, height = np.zeros(2 * num_groups - 1), np.zeros(2 * num_groups - 1)
    place[:num_groups] = np.arange(num_groups)
    for merge, (left, right) in enumerate(merges[:, :2].astype(int).tolist()):
        place[num_groups + merge] = (place[left] + place[right]) / 2
        height[num_groups + merge] = merges[merge, 2]
    return place, height


@dataclass(frozen=True)
class Panel:
    """One map: points, their colors, and what it shows."""

    name: str
    title: str
    points_N2: npt.NDArray[np.float64]
    legend: Legend


def map_panel(panel: Panel) -> Drawing:
    """Return one map for the page, without its legend: the page writes that."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.4, 4.4)
        _draw_map(axes, panel)
        alt = f"Map of {len(panel.points_N2):,} rows, {panel.title}, colored by {panel.legend.title.lower()}."
        return Drawing(panel.name, alt, _svg(figure, panel.name, alt))


def map_sheet(rows: Sequence[Sequence[Panel]]) -> bytes:
    """Return all maps with their legends as one PNG: a row of the sheet for each row given."""
    with matplotlib.rc_context(STYLE):
        most = max(len(row) for row in rows)
        figure = Figure((4.4 * most, 4.9 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), most, squeeze=False)
        for axes_row, row in zip(grid, rows, strict=True):
            for axes, panel in zip(axes_row, row):
                _draw_map(axes, panel)
                axes.set_title(f"{panel.title}, by {panel.legend.title.lower()}", color=INK, fontsize=10)
            for axes in axes_row[len(row) :]:
                axes.set_visible(False)
        return _png(figure)


def _draw_map(axes: Axes, panel: Panel) -> None:
    points, legend = panel.points_N2, panel.legend
    size = float(np.clip(9000 / max(len(points), 1), 5, 40))
    # As pixels inside the SVG: thousands of vector points would make the page heavy.
    axes.scatter(points[:, 0], points[:, 1], c=legend.of_members(), s=size, alpha=0.75, linewidths=0, rasterized=True)
    for name, color in _names_on_map(legend):
        x, y = _middle(points[legend.index == color])
        axes.text(x, y, name, ha="center", va="center", fontsize=9, fontweight="bold", bbox=_paper_box())
    axes.set_aspect("equal")
    axes.set_xlim(-1.06, 1.06)
    axes.set_ylim(-1.06, 1.06)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _names_on_map(legend: Legend) -> list[tuple[str, int]]:
    """Return the names to write into the map, with their color's number; none where they would cover it."""
    used = [(clean(name, 14), i) for i, name in enumerate(legend.names) if (legend.index == i).any()]
    return used if len(used) <= _MOST_NAMES_ON_A_MAP else []


def _middle(points_N2: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the point nearest to the median: a point, so that the name of a torn group stands on one of its parts."""
    center = np.median(points_N2, axis=0)
    x, y = points_N2[((points_N2 - center) ** 2).sum(axis=1).argmin()]
    return float(x), float(y)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _paper_box() -> dict[str, Any]:
    return {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.78, "boxstyle": "round,pad=0.18"}


def _plain_percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _marker(line: Curve) -> str:
    return "o" if len(line.x) <= 30 else ""


def _padded(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.25 * high else low - pad), high + pad


def _epoch_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.03)


def _plain_log_ticks(axes: Axes, values: npt.NDArray[np.float64], write: Callable[[float], str]) -> None:
    """Set ticks at 1, 2, 5 of a decade as plain numbers: matplotlib's own are formulas, which stay unparsed here."""
    low, high = float(values.min()) * 0.8, float(values.max()) * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 3 else (1, 2, 5)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.set_ylim(low, high)
    axes.set_yticks([t for t in ticks if low <= t <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, name: str, alt: str) -> Drawing:
    svg = _svg(figure, name, alt)
    # Everything has its place now; to look for it again would take as long as the drawing.
    figure.set_layout_engine("none")
    return Drawing(name, alt, svg, _png(figure))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A label in a script that the bundled font lacks is drawn as boxes in the PNG; the page has the text itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    buffer = io.StringIO()
    # The salt makes ids the same in every run and different in every figure of a page.
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(
            buffer, format="svg", dpi=_DOTS_PER_INCH, facecolor="none", metadata={"Date": None, "Creator": None}
        )
    return _for_page(buffer.getvalue(), alt)


def _for_page(svg: str, alt: str) -> Markup:
    """Return an SVG document as an element of an HTML page: matplotlib has escaped its texts, we take the frame off."""
    body = svg[svg.index("<svg") :]
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="[0-9. ]+"', head)
    assert box is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, count=1, flags=re.DOTALL)
    # It would apply to the whole page, which has this rule already.
    rest = re.sub(r"<style.*?</style>", "", rest, count=1, flags=re.DOTALL)
    rest = rest.replace(' xlink:href="#', ' href="#').replace('<image xlink:href="data:', '<image href="data:')
    # Groups are numbered alike in every figure; nothing refers to these ids.
    rest = re.sub(r'<g id="[A-Za-z0-9_.]+"(/?)>', r"<g\1>", rest)
    for color, variable in _VARIABLES.items():
        rest = re.sub(rf"(fill|stroke): {color}\b", rf"\1: var({variable})", rest)
    return Markup('<svg role="img" aria-label="{}" {}>').format(escape(alt), Markup(box.group())) + Markup(rest)
