"""The figures: what they hold, and that they can stand in a page."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np

from raydc.core.tree.order import truncate
from raydc.report import colors, figures
from raydc.report.figures import Curve, Panel

PAYLOAD = '"><img src=x onerror=alert(1)> $\\frac{ </svg><script>'


def tree(num_groups):
    """Return a tree that joins one leaf after the other."""
    ids = [0, *range(num_groups, 2 * num_groups - 2)]
    return np.array([[a, t + 1, t + 1.0, t + 2] for t, a in enumerate(ids)], dtype=float)


def test_drawings_are_the_same_bytes_each_time_and_leave_the_style_as_it_was():
    before = dict(matplotlib.rcParams)
    lines = [Curve("loss", [1, 2, 3], [3.0, 2.0, 1.5])]
    first, second = (figures.curves("loss", "Loss.", lines) for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == before


def test_an_svg_refers_to_nothing_outside_and_is_well_formed():
    legend = colors.of_leaves(4, {})
    drawing = figures.leaf_sizes(np.array([5, 3, 0, 9]), legend)
    ET.fromstring(drawing.svg)
    assert "http" not in drawing.svg
    assert "fill: var(--ink)" in drawing.svg
    # References are to ids of the same figure.
    ids = set(re.findall(r'\bid="([^"]+)"', drawing.svg))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawing.svg)) <= ids


def test_two_figures_of_a_page_share_no_id():
    lines = [Curve("loss", [1, 2, 3], [3.0, 2.0, 1.5])]
    ids = [set(re.findall(r'\bid="([^"]+)"', figures.curves(name, "", lines).svg)) for name in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]


def test_text_from_the_data_stays_text():
    drawing = figures.dendrogram(truncate(tree(3), 30), [PAYLOAD, "\u732b", "plain"], ["#123456"] * 3)
    assert "<script" not in drawing.svg
    assert "<img" not in drawing.svg
    texts = "".join(ET.fromstring(drawing.svg).itertext())
    assert PAYLOAD in texts
    assert "\u732b" in texts


def test_a_curve_that_spans_decades_has_a_logarithmic_axis_with_plain_numbers():
    svg = figures.curves("loss", "", [Curve("loss", [1, 2, 3], [100.0, 1.0, 0.01])]).svg
    texts = list(ET.fromstring(svg).itertext())
    assert "0.1" in texts and "10" in texts


def test_an_epoch_without_a_change_is_drawn_on_the_logarithmic_axis():
    drawing = figures.changed_share([1, 2, 3], [0.1, 0.002, 0.0], 1e-3)
    assert "hollow" in drawing.alt
    assert "stops below 0.1 %" in drawing.svg
    assert "hollow" not in figures.changed_share([1], [0.1], None).alt
    figures.changed_share([1, 2], [0.0, 0.0], None)


def test_the_tree_of_two_leaves_and_one_whose_merges_are_all_at_height_zero_are_drawn():
    figures.dendrogram(truncate(tree(2), 30), ["a", "b"], ["#123456"] * 2)
    flat = tree(3)
    flat[:, 2] = 0
    figures.dendrogram(truncate(flat, 30), ["a", "b", "c"], ["#123456"] * 3)


def test_maps_write_the_names_of_few_groups_into_the_map_and_of_many_none():
    points = np.random.default_rng(0).uniform(-1, 1, (40, 2))
    few = colors.of_labels([f"kind {i % 4}" for i in range(40)])
    assert "kind 3" in figures.map_panel(Panel("map", "after refinement", points, few)).svg
    scale = colors.of_leaves(40, {})
    drawing = figures.map_panel(Panel("map", "after refinement", points, scale))
    assert "<text" not in drawing.svg
    assert drawing.alt == "Map of 40 rows, after refinement, colored by leaf."
