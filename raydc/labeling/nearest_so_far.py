"""The distance within which a row may be an exemplar, learned from the slices that one process has labeled."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class NearestSoFar:
    """The distances of the nearest rows of each leaf, over the slices that this process has seen.

    Ten exemplars of each leaf of each slice are, in small slices, all rows. A row that is farther than ten others of
    its leaf is none in the whole run, and needs not be kept. Rows as far as the tenth are kept: their keys decide.

    What is left out depends on the process; the exemplars of the run do not. A row among the nearest of the run is
    within every bound that is made of other rows or of itself.

    Letters: N rows, K leaves.
    """

    def __init__(self, num: int) -> None:
        """Begin without a bound; `num` rows of each leaf are kept."""
        self._num = num
        self._best: npt.NDArray[np.float64] | None = None
        self._seen: set[str] = set()

    def may_hold(self, leaf_N: npt.NDArray[np.integer], distance_N: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
        """Return which rows may be exemplars, (N,) bool."""
        if self._best is None or not self._num:
            return np.full(len(leaf_N), self._num > 0)
        return distance_N <= self._best[leaf_N, -1]

    def take(self, name: str, exemplars: pa.Table | None, num_leaves: int) -> None:
        """Learn of the exemplars of a slice whose file is written; a slice counts once, however often it is done.

        Args:
            name: of the slice.
            exemplars: columns leaf and distance, by leaf; None for no rows.
            num_leaves: K.
        """
        if name in self._seen or exemplars is None or not self._num:
            return
        self._seen.add(name)
        leaf = exemplars["leaf"].to_numpy()
        found = np.full((num_leaves, self._num), np.inf)
        found[leaf, np.arange(len(leaf)) - np.searchsorted(leaf, leaf)] = exemplars["distance"].to_numpy()
        best = found if self._best is None else np.concatenate([self._best, found], axis=1)
        self._best = np.sort(best, axis=1)[:, : self._num]
