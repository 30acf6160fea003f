"""Sufficient statistics of labelled rows: additive, so that each slice counts for itself and sums are exact.

Letters: N rows, K groups of one partition (the leaves, or a level of the tree), C classes.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_BINS = 50


@dataclass
class Tally:
    """What every metric of one partition is made from."""

    num_groups: int
    rows_K: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    distance_K: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Sum of distances to the group's centre."""

    squared_K: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Sum of their squares."""

    silhouette_K: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Sum of simplified silhouettes, (b - a) / max(a, b) with a the distance to the own centre and b to the next."""

    classes: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """(K,) rows of each known class in each group."""

    def __post_init__(self) -> None:
        for name, dtype in (("rows_K", np.int64), ("distance_K", float), ("squared_K", float), ("silhouette_K", float)):
            if not len(getattr(self, name)):
                setattr(self, name, np.zeros(self.num_groups, dtype))

    @property
    def num_rows(self) -> int:
        """Rows counted."""
        return int(self.rows_K.sum())

    def add(
        self,
        group_N: npt.NDArray[np.integer[Any]],
        distance_N: npt.NDArray[np.floating[Any]],
        other_N: npt.NDArray[np.floating[Any]],
        classes_N: npt.NDArray[np.str_] | None,
    ) -> None:
        """Add rows.

        Args:
            group_N: (N,) group of each row.
            distance_N: (N,) distance to the centre of the row's group.
            other_N: (N,) distance to the nearest centre of another group.
            classes_N: (N,) known class as text; rows of the class "" are left out of the class counts.
        """
        k = self.num_groups
        a, b = distance_N.astype(np.float64), other_N.astype(np.float64)
        largest = np.maximum(a, b)
        silhouette = np.divide(b - a, largest, out=np.zeros_like(a), where=largest > 0)
        self.rows_K += np.bincount(group_N, minlength=k)
        self.distance_K += np.bincount(group_N, a, minlength=k)
        self.squared_K += np.bincount(group_N, a * a, minlength=k)
        self.silhouette_K += np.bincount(group_N, silhouette, minlength=k)
        if classes_N is None:
            return
        names, of_row = np.unique(classes_N, return_inverse=True)
        table = np.bincount(of_row * k + group_N, minlength=len(names) * k).reshape(len(names), k)
        for name, counts in zip(names.tolist(), table, strict=True):
            if name != "":
                self.classes[name] = self.classes.get(name, 0) + counts

    def merge(self, other: "Tally") -> None:
        """Add the rows of another tally of the same partition."""
        for name in ("rows_K", "distance_K", "squared_K", "silhouette_K"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, counts in other.classes.items():
            self.classes[name] = self.classes.get(name, 0) + counts

    def table(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Return the (K, C) counts of classes in groups and the class names in order."""
        names = sorted(self.classes)
        if not names:
            return np.zeros((self.num_groups, 0), np.int64), []
        return np.stack([self.classes[n] for n in names], axis=1), names

    def to_arrays(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Return plain arrays, named below `prefix`."""
        table, names = self.table()
        body = {
            "rows": self.rows_K,
            "distance": self.distance_K,
            "squared": self.squared_K,
            "silhouette": self.silhouette_K,
            "table": table,
            "classes": np.array(names, dtype=np.str_),
        }
        return {f"{prefix}.{name}": array for name, array in body.items()}

    @classmethod
    def from_arrays(cls, prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> "Tally":
        """Return the tally that `to_arrays` wrote."""
        table, names = arrays[f"{prefix}.table"], arrays[f"{prefix}.classes"].tolist()
        return cls(
            len(arrays[f"{prefix}.rows"]),
            arrays[f"{prefix}.rows"],
            arrays[f"{prefix}.distance"],
            arrays[f"{prefix}.squared"],
            arrays[f"{prefix}.silhouette"],
            {name: table[:, i] for i, name in enumerate(names)},
        )
