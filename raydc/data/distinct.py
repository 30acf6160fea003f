"""How many different rows there are, as far as it matters: k-means cannot fill more leaves than that."""

from typing import Any

import numpy as np
import numpy.typing as npt

# Odd, from the golden ratio: sums of bits times powers of it, modulo 2^64, differ for different rows but by chance.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class DistinctRows:
    """Counts different rows, and stops once there are more than enough."""

    def __init__(self, enough: int) -> None:
        self._enough = enough
        self._seen: set[int] = set()

    @property
    def num(self) -> int:
        """Different rows so far; any number above `enough` means that many or more."""
        return len(self._seen)

    def add(self, x_ND: npt.NDArray[Any]) -> None:
        """Look at rows of float16 or float32."""
        if self.num <= self._enough:
            self._seen.update(np.unique(_hashes(x_ND)).tolist())


def _hashes(x_ND: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    # -0 and 0 are the same number.
    values = np.ascontiguousarray(x_ND + x_ND.dtype.type(0))
    bits = values.view(np.uint16 if values.itemsize == 2 else np.uint32)
    hashes = np.zeros(len(bits), np.uint64)
    with np.errstate(over="ignore"):
        for column in bits.T:
            hashes = (hashes ^ column.astype(np.uint64)) * _MULTIPLIER
            hashes ^= hashes >> np.uint64(29)
    return hashes
