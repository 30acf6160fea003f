"""Which color stands for which group."""

import numpy as np

from raydc.report import colors


def test_up_to_ten_leaves_have_a_color_each():
    legend = colors.of_leaves(10, {2: np.repeat([0, 1], 5)})
    assert legend.title == "Leaf"
    assert len(set(legend.of_members())) == 10


def test_more_leaves_take_the_color_of_the_coarsest_level_that_divides_them():
    levels = {1: np.zeros(40, int), 4: np.repeat(np.arange(4), 10), 8: np.repeat(np.arange(8), 5)}
    legend = colors.of_leaves(40, levels)
    assert legend.title == "Level 4"
    assert legend.index.tolist() == levels[4].tolist()


def test_without_a_level_of_ten_groups_or_fewer_the_color_runs_along_the_tree():
    legend = colors.of_leaves(1500, {})
    assert legend.names == []
    assert len(legend.of_members()) == 1500
    assert "runs along the tree" in legend.note


def test_the_rarest_of_many_labels_are_grey_and_names_are_in_natural_order():
    labels = [str(i) for i in range(12) for _ in range(20 - i)] + [None, ""]
    legend = colors.of_labels(labels)
    assert legend.names == [*[str(i) for i in range(9)], "other"]
    assert legend.of_members()[-1] == colors.OTHER
    assert "9 most frequent of 12" in legend.note
    assert colors.of_labels(["10", "9", "a", None]).names == ["9", "10", "a", "no label"]


def test_leaves_take_the_colors_of_the_labels_that_they_match():
    labels = colors.of_labels(["a", "b", "c", "c", None])
    groups = colors.of_leaves(4, {}).taken(np.array([2, 0, 1, 1, 3]))
    matched = colors.matched(groups, labels)
    assert matched.of_members()[:4] == labels.of_members()[:4]
    assert matched.of_members()[4] not in labels.colors
