"""Parquet footers: rows, row groups, columns and a digest of each file, read without its values.

A run has up to 100,000 files, and nearly all have the same columns. What depends on the columns alone is found once for
all of them and kept once: a footer holds little beside its row groups.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from raydc.errors import DataError
from raydc.storage.lake import Lake, StoredFile

# These say nothing against the file: the slice is tried again, its rows are never quarantined.
NOT_THE_FILE = (ConnectionError, TimeoutError, PermissionError, MemoryError)


# As many bytes of a file's end are read at first: most footers fit.
_TAIL_BYTES = 2**16

_MAGIC = b"PAR1"
# Length of the footer and magic bytes.
_LAST_BYTES = 8

# Each keeps the whole footer of one file alive; more different schemas than this are described again.
_MOST_KEPT = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class FileColumns:
    """The columns of a file; all files that have the same share one object, so it is a key by its identity."""

    schema: pa.Schema
    """Without the file's own metadata, in which every writer may say something else."""

    names: tuple[str, ...]
    fields: Mapping[str, pa.Field]
    flat_leaves: Mapping[str, int]
    """Leaves outside lists, with one value in each row, of each top-level column that holds lists."""

    repeated_leaves: tuple[tuple[int, str], ...]
    """(number of the leaf, top-level column) of each leaf within lists: how many values it has, each file says."""


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a Parquet footer says, or why it could not be read."""

    uri: str
    size: int
    num_rows: int = 0
    row_groups: tuple[tuple[int, int], ...] = ()
    """(rows, uncompressed bytes) of each row group."""

    columns: FileColumns | None = None
    num_values: Mapping[str, int] = field(default_factory=dict)
    """Leaf values of each top-level column that holds lists, counted by the writer."""

    digest: str = ""
    """Hash of the footer's bytes, which hold counts, places, sizes and statistics of every column chunk."""

    problem: str | None = None
    """Why the file cannot be read."""


class ColumnsCache:
    """One FileColumns for each distinct schema, up to a bound on their number. Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[bytes, list[tuple[pq.ParquetSchema, FileColumns]]] = {}
        self._num_new = 0
        self._lock = threading.Lock()
        self.num_described = 0

    def of(self, metadata: pq.FileMetaData) -> FileColumns:
        """Return the columns that a footer describes: the same object for equal ones."""
        # This and Parquet's own schema decide Arrow's.
        stored, noted = metadata.schema, (metadata.metadata or {}).get(b"ARROW:schema", b"")
        with self._lock:
            found = self._find(noted, stored)
        if found is not None:
            return found
        # Writers note more there, as pandas its index: what is left without it may be known.
        schema = stored.to_arrow_schema().remove_metadata()
        key = schema.serialize().to_pybytes()
        with self._lock:
            found = self._find(key, stored)
            if found is None:
                self.num_described += 1
                found = describe_columns(schema, stored)
                self._keep(key, stored, found)
            self._keep(noted, stored, found)
            return found

    def _find(self, key: bytes, stored: pq.ParquetSchema) -> FileColumns | None:
        # Equal Arrow types may lie in leaves of other names.
        return next((columns for other, columns in self._known.get(key, ()) if other.equals(stored)), None)

    def _keep(self, key: bytes, stored: pq.ParquetSchema, columns: FileColumns) -> None:
        self._num_new += 1
        if self._num_new % _MOST_KEPT == 0:
            self._known = {}
        self._known.setdefault(key, []).append((stored, columns))


def describe_columns(schema: pa.Schema, stored: pq.ParquetSchema) -> FileColumns:
    """Return what is known of a file's columns, with the top-level column of every leaf.

    Args:
        schema: as Arrow reads it.
        stored: as Parquet has it.
    """
    fields = {f.name: f for f in schema}
    flat: Counter[str] = Counter()
    repeated = []
    for number in range(len(stored)):
        leaf = stored.column(number)
        name = _owner(leaf.path, fields)
        if leaf.max_repetition_level:
            repeated.append((number, name))
        else:
            flat[name] += 1
    lists = {name for _, name in repeated}
    return FileColumns(
        schema=schema,
        names=tuple(schema.names),
        fields=fields,
        flat_leaves={name: flat[name] for name in lists},
        repeated_leaves=tuple(repeated),
    )


def _owner(path: str, names: Mapping[str, object]) -> str:
    """Return the top-level column of a leaf: a column's own name may have dots, like the path to its values."""
    name = path
    while name not in names:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return path
    return name


def read_footers(lake: Lake, files: Sequence[StoredFile], *, num_threads: int = 16) -> list[Footer]:
    """Return the footer of every file, in order; an unreadable one carries its problem instead of raising.

    Raises:
        DataError: a file could not be reached, which says nothing of what is in it.
    """
    known = ColumnsCache()
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda f: _read_footer(lake, f, known), files))


def _read_footer(lake: Lake, file: StoredFile, known: ColumnsCache) -> Footer:
    try:
        with lake.open_parquet(file.uri) as handle:
            raw = _raw_footer(handle)
        return parse_footer(file, raw, known)
    except NOT_THE_FILE as error:
        raise DataError(f"{file.uri}: {first_line(error)}. Check the network and the access rights.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        return Footer(uri=file.uri, size=file.size, problem=first_line(error))


def _raw_footer(handle: pa.NativeFile) -> bytes:
    """Return the last bytes of a file from where its footer begins; more or less where it is no Parquet file."""
    size = handle.size()
    handle.seek(max(0, size - _TAIL_BYTES))
    tail = handle.read()
    if tail[-len(_MAGIC) :] != _MAGIC:
        # An encrypted footer, or no Parquet: the parser says which.
        return tail
    length = int.from_bytes(tail[-_LAST_BYTES : -len(_MAGIC)], "little") + _LAST_BYTES
    if length > size - len(_MAGIC):
        raise ValueError(f"its footer says that it is {length} bytes long, and the file has {size}: it is damaged")
    if length > len(tail):
        handle.seek(size - length)
        tail = handle.read(length - len(tail)) + tail
    return tail[-length:]


def parse_footer(file: StoredFile, raw: bytes, known: ColumnsCache) -> Footer:
    """Return what the bytes of a footer say; the work grows with the row groups times the columns that hold lists.

    Args:
        file: whose footer it is.
        raw: from where the footer begins to the end of the file.
        known: of the files read so far.

    Raises:
        pyarrow.ArrowException, OSError: they are no whole footer.
    """
    metadata = pq.read_metadata(pa.BufferReader(raw))
    columns = known.of(metadata)
    if len(columns.fields) < len(columns.names):
        twice = sorted(name for name, n in Counter(columns.names).items() if n > 1)
        return Footer(uri=file.uri, size=file.size, problem=f"has more than one column {', '.join(map(repr, twice))}")
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    num_values = {name: leaves * metadata.num_rows for name, leaves in columns.flat_leaves.items()}
    for group in groups:
        for leaf, name in columns.repeated_leaves:
            num_values[name] += group.column(leaf).num_values
    return Footer(
        uri=file.uri,
        size=file.size,
        num_rows=metadata.num_rows,
        row_groups=tuple((group.num_rows, group.total_byte_size) for group in groups),
        columns=columns,
        num_values=num_values,
        digest=hashlib.sha256(b"%d " % file.size + raw).hexdigest()[:16],
    )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
