"""How many rows of each known class are in each group: counts that add, of the pairs that occur alone.

Letters: K groups, C classes, P pairs of a class and a group, N rows.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


def _none() -> npt.NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass
class Contingency:
    """The counts. A table of all pairs takes K x C numbers, and where both are many almost all of them are zero."""

    num_groups: int
    names: list[str] = field(default_factory=list)
    """(C,) classes in the order in which they were met."""

    pair_P: npt.NDArray[np.int64] = field(default_factory=_none)
    """class x K + group, ascending."""

    rows_P: npt.NDArray[np.int64] = field(default_factory=_none)

    def __post_init__(self) -> None:
        self._index = {name: i for i, name in enumerate(self.names)}

    def add(self, group_N: npt.NDArray[np.integer[Any]], class_N: npt.NDArray[np.str_]) -> None:
        """Count rows.

        Args:
            group_N: (N,) group of each row.
            class_N: (N,) known class as text; rows of the class "" are left out.
        """
        known = class_N != ""
        names, of_row = np.unique(class_N[known], return_inverse=True)
        pairs = self._indices(names.tolist())[of_row] * self.num_groups + group_N[known]
        self._add(*np.unique(pairs, return_counts=True))

    def merge(self, other: "Contingency") -> None:
        """Add the rows of another count of the same groups."""
        pairs = self._indices(other.names)[other.pair_P // self.num_groups] * self.num_groups
        pairs += other.pair_P % self.num_groups
        order = np.argsort(pairs)
        self._add(pairs[order], other.rows_P[order])

    def table(self) -> tuple[Any, list[str]]:
        """Return the (K, C) counts as a scipy.sparse.csr_array of int64, and the class names in order."""
        import scipy.sparse  # Only the end of a run asks for it.

        order = np.argsort(np.array(self.names, dtype=np.str_), kind="stable")
        column = np.empty_like(order)
        column[order] = np.arange(len(order))
        of_class, group = np.divmod(self.pair_P, self.num_groups)
        shape = (self.num_groups, len(order))
        table = scipy.sparse.csr_array((self.rows_P, (group, column[of_class])), shape=shape)
        return table, [self.names[i] for i in order.tolist()]

    def _indices(self, names: list[str]) -> npt.NDArray[np.int64]:
        for name in names:
            if name not in self._index:
                self._index[name] = len(self.names)
                self.names.append(name)
        return np.array([self._index[name] for name in names], np.int64)

    def _add(self, pair_M: npt.NDArray[np.int64], rows_M: npt.NDArray[np.int64]) -> None:
        place = np.searchsorted(self.pair_P, pair_M)
        known = place < len(self.pair_P)
        known[known] = self.pair_P[place[known]] == pair_M[known]
        self.rows_P[place[known]] += rows_M[known]
        if not known.all():
            self.pair_P = np.insert(self.pair_P, place[~known], pair_M[~known])
            self.rows_P = np.insert(self.rows_P, place[~known], rows_M[~known])
