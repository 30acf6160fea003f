"""Sufficient statistics of labeled rows: additive, so that each slice counts for itself and sums are exact.

Letters: N rows, K groups of one partition (the leaves, or a level of the tree).
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raydc.core.metrics.contingency import Contingency

_SUMS = ("rows", "distance", "squared", "silhouette")
"""Names of the sums that are kept for each group."""


@dataclass(kw_only=True)
class Tally:
    """What every metric of one partition is made from."""

    num_groups: int
    rows_K: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    distance_K: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Sum of distances to the group's center."""

    squared_K: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Sum of their squares."""

    silhouette_K: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Sum of simplified silhouettes, (b - a) / max(a, b) with a the distance to the own center and b to the next."""

    classes: Contingency = field(init=False)
    """Rows of each known class in each group."""

    def __post_init__(self) -> None:
        self.classes = Contingency(self.num_groups)
        for name in _SUMS:
            if not len(getattr(self, f"{name}_K")):
                setattr(self, f"{name}_K", np.zeros(self.num_groups, np.int64 if name == "rows" else np.float64))

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
            distance_N: (N,) distance to the center of the row's group.
            other_N: (N,) distance to the nearest center of another group.
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
        if classes_N is not None:
            self.classes.add(group_N, classes_N)

    def merge(self, other: "Tally") -> None:
        """Add the rows of another tally of the same partition."""
        for name in _SUMS:
            setattr(self, f"{name}_K", getattr(self, f"{name}_K") + getattr(other, f"{name}_K"))
        self.classes.merge(other.classes)

    def to_arrays(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """Return plain arrays, named below `prefix`."""
        body = {name: getattr(self, f"{name}_K") for name in _SUMS} | {
            # As text, not as an array of it: there each name takes the room of the longest.
            "classes": np.frombuffer(json.dumps(self.classes.names).encode(), np.uint8),
            "class_pairs": self.classes.pair_P,
            "class_rows": self.classes.rows_P,
        }
        return {f"{prefix}.{name}": array for name, array in body.items()}

    @classmethod
    def from_arrays(cls, prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> "Tally":
        """Return the tally that `to_arrays` wrote.

        Raises:
            LookupError: an array is missing.
            ValueError: the arrays are not those of one tally.
        """
        rows, distance, squared, silhouette = (arrays[f"{prefix}.{name}"] for name in _SUMS)
        tally = cls(num_groups=len(rows), rows_K=rows, distance_K=distance, squared_K=squared, silhouette_K=silhouette)
        names, pairs, counts = (arrays[f"{prefix}.{name}"] for name in ("classes", "class_pairs", "class_rows"))
        # Earlier versions wrote an array of text.
        classes = names.tolist() if names.dtype.kind == "U" else json.loads(names.tobytes())
        if not isinstance(classes, list):
            raise ValueError(f"{prefix}: its classes are no list of names")
        if any(a.shape != rows.shape or a.ndim != 1 for a in (rows, distance, squared, silhouette)):
            raise ValueError(f"{prefix}: its sums are of different numbers of groups")
        most = len(classes) * len(rows)
        if pairs.shape != counts.shape or pairs.ndim != 1 or np.any((pairs < 0) | (pairs >= most)):
            raise ValueError(f"{prefix}: counts of classes that it does not have")
        # A copy, since merging adds in place.
        tally.classes = Contingency(len(rows), classes, pairs, counts.copy())
        return tally
