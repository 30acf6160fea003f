"""Which rows cannot be clustered: not finite, without a direction, or too large for float32 distances.

One guard for every door: the reader of a run, the labeling of new data and `Model.predict` refuse the same rows. numpy
alone, because the processes that read rows load no torch. Letters: N rows, D width of a row.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_NORM = 2.0**60
"""Largest norm of a row after preprocessing.

float32 ends at 2^128. Two such rows are at most 2^61 apart, so their squared distance, and every term of its
expansion, is at most 2^122. That leaves a factor of 8 for what a network does to the norm of a row.
"""

# A row is divided by its norm in float32: outside of these its square is infinite, or has lost its digits.
_LEAST_SQUARE, _LARGEST_SQUARE = np.float32(1e-30), np.float32(1e38)


@dataclass(frozen=True)
class RowGuard:
    """What a row must be, given how it is preprocessed."""

    blocks: tuple[tuple[int, int], ...]
    """(start, stop) of each embedding column."""

    by_norm: bool = False
    """Each block is divided by its norm (l2), so it must have one that float32 holds."""

    factor: tuple[float, ...] = (1.0,)
    """Factor of each dimension in preprocessing, weights included; or one for all."""

    offset: tuple[float, ...] = ()
    """Subtracted from each dimension before; empty for none."""

    def mark(self, x_ND: npt.NDArray[Any], reasons_N: npt.NDArray[np.str_]) -> None:
        """Write the reason of every bad row that has none yet.

        One pass finds the suspects: NaN, Inf and huge values all spoil a sum of squares. Only these are looked at
        closely.

        Args:
            x_ND: rows of any float type.
            reasons_N: text of at least 16 characters, "" for a good row; changed in place.
        """
        if not len(x_ND):
            return
        if x_ND.dtype == np.float16 and not self.by_norm and _most_norm_in_float16(x_ND) <= self.safe_square**0.5:
            # No float16 row is too large then, and its bits say fastest whether it is finite.
            exponents = (x_ND.view(np.uint16) & 0x7FFF).max(axis=1)
            mark(reasons_N, exponents >= 0x7C00, "not_finite")
            return
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            parts = [_squares(x_ND[:, a:b]) for a, b in self.blocks]
            squares = parts[0] if len(parts) == 1 else np.sum(parts, axis=0, dtype=np.float32)
        suspects = np.flatnonzero(~(squares <= self.safe_square))
        if len(suspects):
            rows = x_ND[suspects].astype(np.float64)
            finite = np.isfinite(rows).all(axis=1)
            _mark_at(reasons_N, suspects[~finite], "not_finite")
        if self.by_norm:
            for (a, b), part in zip(self.blocks, parts, strict=True):
                _mark_norms(x_ND[:, a:b], part, reasons_N)
        elif len(suspects):
            with np.errstate(over="ignore", invalid="ignore"):
                moved = (rows - np.array(self.offset or (0.0,))) * np.array(self.factor)
                norms = np.sqrt(np.einsum("ij,ij->i", moved, moved))
            _mark_at(reasons_N, suspects[~(norms <= MOST_NORM)], "too_large")

    @property
    def safe_square(self) -> np.float32:
        """Squared norm of a raw row up to which it is not too large for certain."""
        if self.by_norm:
            return _LARGEST_SQUARE
        most = MOST_NORM / max(np.abs(self.factor).max(), 1e-30) - float(np.linalg.norm(self.offset or (0.0,)))
        # A hair less, for the rounding of the sum of squares.
        return np.float32(min(max(most, 0.0) ** 2 * 0.999, _LARGEST_SQUARE))


def mark(reasons_N: npt.NDArray[np.str_], flags_N: npt.NDArray[np.bool_], reason: str) -> None:
    """Write a reason to the flagged rows that have none yet."""
    reasons_N[flags_N & (reasons_N == "")] = reason


def _most_norm_in_float16(x_ND: npt.NDArray[Any]) -> float:
    return float(np.finfo(np.float16).max) * math.sqrt(x_ND.shape[1])


def _mark_at(reasons_N: npt.NDArray[np.str_], rows: npt.NDArray[np.int64], reason: str) -> None:
    flags = np.zeros(len(reasons_N), bool)
    flags[rows] = True
    mark(reasons_N, flags, reason)


def _squares(x_ND: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    squares: npt.NDArray[np.float32] = np.einsum("ij,ij->i", x_ND, x_ND, dtype=np.float32, casting="unsafe")
    return squares


def _mark_norms(x_ND: npt.NDArray[Any], squares_N: npt.NDArray[np.float32], reasons_N: npt.NDArray[np.str_]) -> None:
    suspects = np.flatnonzero(~((squares_N >= _LEAST_SQUARE) & (squares_N <= _LARGEST_SQUARE)))
    if not len(suspects):
        return
    small = suspects[squares_N[suspects] < _LEAST_SQUARE]
    _mark_at(reasons_N, small[~x_ND[small].any(axis=1)], "zero_norm")
    _mark_at(reasons_N, small, "norm_underflow")
    _mark_at(reasons_N, np.setdiff1d(suspects, small), "norm_overflow")
