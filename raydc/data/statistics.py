"""What labeling has counted: additive over slices, and stored as arrays, never as Python objects."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raydc.core.metrics.partition_stats import Tally
from raydc.errors import DataError
from raydc.storage.arrays import arrays_of

_TABLES = ("exemplars", "map_rows", "near_rows", "files")

_CUT_ROWS = 200_000
"""Exemplars that wait for one cut."""

# What reading statistics that are damaged, or were never ours, may end in.
_DAMAGE = (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    pa.ArrowException,
)


# Memory of the arrays: the sums of each group, which are zeros in a slice that meets few of them, and all else, which
# seldom shrinks to a tenth.
_BYTES_PER_GROUP = 32
_ROOM_PER_BYTE = 64
_ROOM = 64 * 2**20


@dataclass(kw_only=True)
class Statistics:
    """What labeling has counted; additive over slices."""

    rows: int = 0
    """Rows read, good and bad."""

    labels: int = 0
    rejects: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    """`leaf`, `level_<k>`, and on the sample `learned` and each baseline."""

    exemplars: pa.Table | None = None
    """The nearest rows of each leaf."""

    map_rows: pa.Table | None = None
    """The rows of the report's map."""

    near_rows: pa.Table | None = None
    """key, preprocessed row and the leaf by each method, on the sample among which neighbors are looked up."""

    files: pa.Table | None = None
    """The files of labels and rejects, by raydc.data.label_files."""

    def merge(self, other: "Statistics", num_exemplars: int) -> None:
        """Add the rows of another slice."""
        self.rows += other.rows
        self.labels += other.labels
        self.rejects += other.rejects
        for name, tally in other.tallies.items():
            # Into arrays of its own: those of the other may lie in shared memory that nobody may write to.
            self.tallies.setdefault(name, Tally(num_groups=tally.num_groups)).merge(tally)
        if other.exemplars is not None:
            self.exemplars = nearest_rows(stacked(self.exemplars, other.exemplars), num_exemplars)
        self.map_rows = stacked(self.map_rows, other.map_rows)
        self.near_rows = stacked(self.near_rows, other.near_rows)
        self.files = stacked(self.files, other.files)

    def without_rows(self) -> "Statistics":
        """Return the counts alone."""
        return Statistics(rows=self.rows, labels=self.labels, rejects=self.rejects, tallies=self.tallies)

    def to_bytes(self) -> bytes:
        """Return the statistics as npz, without pickle."""
        arrays: dict[str, Any] = {"counts": np.array([self.rows, self.labels, self.rejects], np.int64)}
        arrays["tallies"] = np.array(list(self.tallies), dtype=np.str_)
        for name, tally in self.tallies.items():
            arrays |= tally.to_arrays(name)
        for name in _TABLES:
            table = getattr(self, name)
            if table is not None:
                arrays[name] = np.frombuffer(_to_ipc(table), np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, num_groups: int | None = None) -> "Statistics":
        """Return what `to_bytes` gave.

        Args:
            data: the bytes.
            num_groups: groups of all partitions together, from the model: no more may be counted, nor more memory be
                taken than they need. None for bytes from a worker that has looked at them so.

        Raises:
            DataError: these are no statistics, or not whole, or those of another model; Python objects in them are
                refused unread.
        """
        try:
            room = None if num_groups is None else _ROOM + _ROOM_PER_BYTE * len(data) + _BYTES_PER_GROUP * num_groups
            arrays = arrays_of(data, room)
            rows, labels, rejects = arrays["counts"].tolist()
            tables = {n: _from_ipc(arrays[n].tobytes()) if n in arrays else None for n in _TABLES}
            tallies = {name: Tally.from_arrays(name, arrays) for name in arrays["tallies"].tolist()}
            counted = sum(tally.num_groups for tally in tallies.values())
            if num_groups is not None and counted > num_groups:
                raise ValueError(f"{counted} groups are counted, the model has {num_groups}")
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"statistics of the labels: damaged ({type(error).__name__}: {reason}). Delete slices/, statistics.npz "
                "and stages/assign.json of the run, and run it again."
            ) from None
        return cls(rows=rows, labels=labels, rejects=rejects, tallies=tallies, **tables)


def summed(items: Iterable[Statistics], num_exemplars: int) -> Statistics:
    """Return the sum of statistics. Their exemplars are cut together: a cut sorts all that are kept."""
    total, waiting, num_waiting = Statistics(), Statistics(), 0
    for item in items:
        waiting.exemplars = stacked(waiting.exemplars, item.exemplars)
        num_waiting += 0 if item.exemplars is None else item.exemplars.num_rows
        total.merge(replace(item, exemplars=None), num_exemplars)
        if num_waiting > _CUT_ROWS:
            total.merge(waiting, num_exemplars)
            waiting, num_waiting = Statistics(), 0
    total.merge(waiting, num_exemplars)
    if total.files is not None:
        # A chunk for each slice would be carried up the tree otherwise.
        total.files = total.files.combine_chunks()
    return total


def nearest_rows(table: pa.Table | None, num: int) -> pa.Table | None:
    """Return the `num` nearest rows of each leaf, by (leaf, distance, key)."""
    if table is None:
        return None
    table = table.sort_by([("leaf", "ascending"), ("distance", "ascending"), ("key", "ascending")])
    leaf = table["leaf"].to_numpy()
    first = np.searchsorted(leaf, leaf, side="left")
    return table.filter(pa.array(np.arange(len(leaf)) - first < num))


def stacked(first: pa.Table | None, second: pa.Table | None) -> pa.Table | None:
    """Return the rows of both tables; a column that one of them lacks is null there."""
    if first is None or second is None:
        return first if second is None else second
    return pa.concat_tables([first, second], promote_options="permissive")


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_ipc(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_all()
