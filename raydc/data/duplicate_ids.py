"""Ids that stand in the input more than once: every id is looked at, none is held on the driver.

The ids of a slice are turned into keys of 128 bits and cut into parts by key, so that equal ids meet in the same part,
wherever they lie. Counting a part needs only its keys: 16 bytes and a row number for each of its rows.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.data.columns import shown
from raydc.data.ids import ids_from_arrow
from raydc.data.slices import InputSpec, Slice
from raydc.storage.lake import Lake

log = logging.getLogger(__name__)

# Rows whose keys one task sorts: about 200 MB.
ROWS_PER_PART = 4_000_000

_KEYS = np.dtype([("high", np.uint64), ("low", np.uint64), ("row", np.int64)])


@dataclass(frozen=True)
class Repeats:
    """What is known of the repeated ids of some rows."""

    rows: int
    """Rows whose id stands in another row as well, less one for each such id."""

    examples: tuple[tuple[int, int], ...]
    """Pairs of row keys of one id, the first ones by key."""


def id_keys(ids: pa.Array, first_row: int) -> npt.NDArray[np.void]:
    """Return the keys of ids that are not null, with their rows.

    An integer is its own key, and so are a date and a timestamp. Any other id's is its BLAKE2b of 128 bits: that two of
    a billion share one has a chance of about 1e-21.

    Args:
        ids: n ids of one of the types that raydc.data.ids names.
        first_row: row key of the first one.
    """
    keys = np.zeros(len(ids), _KEYS)
    keys["row"] = first_row + np.arange(len(ids))
    valid = np.asarray(ids.is_valid())
    kept, there = keys[valid], ids.drop_null()
    if pa.types.is_integer(ids.type) or pa.types.is_temporal(ids.type):
        whole = there.to_numpy(zero_copy_only=False)
        # Spread over the parts: ids often rise from zero.
        kept["low"] = whole.astype(np.int64).view(np.uint64)
        kept["high"] = _mixed(kept["low"])
        return kept
    if isinstance(there, pa.ExtensionArray):
        there = there.storage
    if pa.types.is_decimal(there.type):
        there = there.cast(pa.string())
    digests = [hashlib.blake2b(i, digest_size=16).digest() for i in there.cast(pa.binary()).to_pylist()]
    halves = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    kept["high"], kept["low"] = halves[:, 0], halves[:, 1]
    return kept


def slice_keys(lake: Lake, part: Slice, spec: InputSpec) -> npt.NDArray[np.void]:
    """Return the keys of the ids of a slice, read from its id column alone.

    Ids that cannot be read are passed over: the rows of such a slice are judged by the reader of all its columns.
    """
    found = [no_keys()]
    row = part.first_key
    try:
        with lake.open_parquet(part.uri) as handle:
            batches = pq.ParquetFile(handle).iter_batches(
                65536, row_groups=list(part.row_groups), columns=[spec.id_column], use_threads=False
            )
            for batch in batches:
                ids, _ = ids_from_arrow(pa.chunked_array([batch.column(0)]), spec.arrow_id_type)
                found.append(id_keys(ids, row))
                row += len(batch)
    except (ConnectionError, TimeoutError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as error:
        log.warning("ids of %s beyond row %d are not compared: %s", part.uri, row - part.first_key, error)
    return np.concatenate(found)


def no_keys() -> npt.NDArray[np.void]:
    """Return the keys of no id."""
    return np.empty(0, _KEYS)


def by_part(keys: npt.NDArray[np.void], num_parts: int) -> list[npt.NDArray[np.void]]:
    """Return the keys of each part; equal ids are in the same one."""
    part = keys["high"] % np.uint64(num_parts)
    return [keys[part == p] for p in range(num_parts)]


def count(keys: npt.NDArray[np.void], *, num_examples: int = 5) -> Repeats:
    """Return the repeats among keys."""
    keys = keys[np.lexsort((keys["row"], keys["low"], keys["high"]))]
    same = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    at = np.flatnonzero(same)
    pairs = sorted(zip(keys["row"][at].tolist(), keys["row"][at + 1].tolist(), strict=True), key=lambda p: p[1])
    return Repeats(len(at), tuple(pairs[:num_examples]))


def total(parts: Sequence[Repeats], *, num_examples: int = 5) -> Repeats:
    """Return the repeats of all parts together."""
    pairs = sorted((pair for p in parts for pair in p.examples), key=lambda p: p[1])
    return Repeats(sum(p.rows for p in parts), tuple(pairs[:num_examples]))


def describe(lake: Lake, slices: Sequence[Slice], spec: InputSpec, found: Repeats) -> list[str]:
    """Return one line for each example: the id, and the file and row of both places."""
    lines = []
    for first, second in found.examples:
        places = [_place(slices, row) for row in (first, second)]
        text = shown(_id_at(lake, *places[0], spec))
        lines.append(f"id {text} in " + " and ".join(f"{s.uri} row {s.first_row + at}" for s, at in places))
    return lines


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # A multiplication by the odd number next to 2^64 / golden ratio, and its upper bits brought down.
    with np.errstate(over="ignore"):
        mixed = values * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(32))


def _place(slices: Sequence[Slice], key: int) -> tuple[Slice, int]:
    firsts = [s.first_key for s in slices]
    number = int(np.searchsorted(firsts, key, side="right")) - 1
    return slices[number], key - slices[number].first_key


def _id_at(lake: Lake, part: Slice, at: int, spec: InputSpec) -> Any:
    with lake.open_parquet(part.uri) as handle:
        column = pq.ParquetFile(handle).read_row_groups(list(part.row_groups), columns=[spec.id_column]).column(0)
    return ids_from_arrow(column.slice(at, 1), spec.arrow_id_type)[0][0].as_py()
