"""Which color stands for which group: the same in the map, the tree and the bars."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
import numpy.typing as npt
import scipy.optimize
from matplotlib.colors import to_hex

from raydc.report.text import clean, plural

# Ten colors that people with color vision deficiencies can tell apart, on white and on near-black.
# Source: Petroff, "Accessible color sequences for data visualization", arXiv:2107.02270.
PALETTE = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
OTHER = "#c9ccd1"


@dataclass(frozen=True, kw_only=True)
class Legend:
    """A color for each member of a set, and what the colors mean."""

    title: str
    names: list[str]
    """One name per color; empty where colors run along a scale."""

    colors: list[str]
    index: npt.NDArray[np.int64]
    """Color of each member."""

    note: str = ""

    def of_members(self) -> list[str]:
        """Return the color of each member."""
        return [self.colors[i] for i in self.index.tolist()]

    def taken(self, members: npt.NDArray[np.integer]) -> "Legend":
        """Return the same legend for a selection, or repetition, of members."""
        return replace(self, index=self.index[members])


def of_leaves(num_leaves: int, levels: dict[int, npt.NDArray[np.int64]]) -> Legend:
    """Return a color for each leaf: its own where ten suffice, else its group's, else its place in the tree.

    Args:
        num_leaves: K.
        levels: (K,) group of each leaf, by the level's number of groups.
    """
    leaf = np.arange(num_leaves)
    if num_leaves <= len(PALETTE):
        names = [str(i) for i in leaf]
        return Legend(title="Leaf", names=names, colors=list(PALETTE[:num_leaves]), index=leaf)
    for size, groups in sorted(levels.items()):
        number = int(groups.max()) + 1
        if 2 <= number <= len(PALETTE):
            note = f"{plural(num_leaves, 'leaf', 'leaves')}, colored by their group at level {size}."
            names = [str(i) for i in range(number)]
            colors = list(PALETTE[:number])
            return Legend(title=f"Level {size}", names=names, colors=colors, index=groups, note=note)
    # Leaf ids follow the tree, so that a scale over the ids gives near leaves near colors.
    scale = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, num_leaves))
    note = f"{plural(num_leaves, 'leaf', 'leaves')}; the color runs along the tree, so like colors are near clusters."
    return Legend(title="Leaf", names=[], colors=[to_hex(c) for c in scale], index=leaf, note=note)


def of_labels(labels: Sequence[str | None]) -> Legend:
    """Return a color for each row by its known class; beyond ten classes the rarest share one."""
    tally = Counter(label for label in labels if label)
    names = sorted(tally, key=lambda name: (-tally[name], name))[: len(PALETTE)]
    if len(tally) > len(PALETTE):
        names = names[: len(PALETTE) - 1]
    names.sort(key=_natural)
    place = {name: i for i, name in enumerate(names)}
    index = np.array([place.get(label, len(names)) if label else len(names) for label in labels], dtype=np.int64)
    colors, shown = list(PALETTE[: len(names)]), [clean(name, 24) for name in names]
    note = ""
    if (index == len(names)).any():
        colors.append(OTHER)
        shown.append("other" if len(tally) > len(names) else "no label")
    if len(tally) > len(names):
        note = f"The {len(names)} most frequent of {len(tally):,} labels in the sample; the rest are grey."
    return Legend(title="Label", names=shown, colors=colors, index=index, note=note)


def _natural(name: str) -> tuple[tuple[int, float, str], ...]:
    """Return a key by which 2 comes before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((0, float(p), p) if p.isdecimal() and p.isascii() else (1, 0.0, p) for p in parts)


def matched(groups: Legend, labels: Legend) -> Legend:
    """Return the groups' legend with the colors of the labels that they match best, one to one, over the same rows."""
    if not groups.names or not len(groups.index):
        return groups
    table = np.zeros((len(groups.colors), len(labels.colors)), dtype=np.int64)
    np.add.at(table, (groups.index, labels.index), 1)
    table[:, [i for i, c in enumerate(labels.colors) if c == OTHER]] = 0
    pairs = zip(*scipy.optimize.linear_sum_assignment(table, maximize=True), strict=True)
    given = {int(g): labels.colors[label] for g, label in pairs if table[g, label] > 0}
    free = iter([c for c in PALETTE if c not in given.values()])
    colors = [given[g] if g in given else next(free) for g in range(len(groups.colors))]
    return replace(groups, colors=colors)
