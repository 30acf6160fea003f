"""Any layout, cut into files and row groups anyhow and damaged anywhere: rows in are rows and rejects out."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from raydc.config import parse_config
from raydc.data.reader import read_slice
from raydc.data.sample import profile_input
from raydc.errors import DataError
from raydc.storage.lake import Lake
from tests import shards

DIM = 3
VECTOR = pa.struct(
    [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
)
COLUMNS = {
    "float16": pa.list_(pa.float16(), DIM),
    "float32": pa.list_(pa.float32()),
    "float64": pa.large_list(pa.float64()),
    "fixed": pa.list_(pa.float32(), DIM),
    "int64": pa.list_(pa.int64()),
    "text": pa.string(),
    "vector": VECTOR,
    "parts": None,
    "bytes": pa.binary(),
}

values = st.sampled_from([0, 1, -2, 3, 100, 7])
whole_rows = st.lists(values, min_size=DIM, max_size=DIM)
# None: the row is missing; a shorter or longer list: of wrong length. Never in a fixed layout.
any_rows = st.one_of(whole_rows, whole_rows, whole_rows, st.none(), st.lists(values, max_size=DIM + 1))


@st.composite
def files(draw):
    """Return (layout, rows, row group size) for each of several files."""
    # So that there are rows to cluster, and a width, nearly always.
    found = [("fixed", [[1, 2, 3], [0, 1, 0], [5, 5, 5]], 2)]
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from([k for k in COLUMNS if k not in ("parts", "bytes")]))
        element = st.one_of(whole_rows, st.none()) if kind in ("fixed", "float16") else any_rows
        found.append((kind, draw(st.lists(element, max_size=12)), draw(st.integers(1, 6))))
    return found


def column(kind: str, rows: list) -> pa.Array:
    if kind == "text":
        return pa.array([None if r is None else json.dumps(r) for r in rows], pa.string())
    if kind == "vector":
        made = [None if r is None else {"type": 1, "values": [float(v) for v in r]} for r in rows]
        return pa.array(made, VECTOR)
    if kind == "float16":
        made = [None if r is None else [np.float16(v) for v in r] for r in rows]
        return pa.array(made, COLUMNS[kind])
    return pa.array(rows, COLUMNS[kind])


def write(folder: Path, contents: list) -> dict[int, list[float] | None]:
    """Write the files and return the row of each id, None for a bad one."""
    expected, first = {}, 0
    for number, (kind, rows, group) in enumerate(contents):
        ids = pa.array(range(first, first + len(rows)), pa.int64())
        path = folder / f"{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": ids, "embedding": column(kind, rows)}), path, row_group_size=group)
        for i, row in enumerate(rows):
            expected[first + i] = row if row is not None and len(row) == DIM else None
        first += len(rows)
    return expected


def read(folder: Path, slice_bytes: int, block_rows: int, **section: object) -> tuple[int, dict, dict]:
    """Return how many rows there are, the good ones by id, and the reason of each bad one by (slice, row)."""
    section |= {"path": str(folder), "slice_bytes": slice_bytes}
    settings_of = {
        "input": section,
        "cluster": {"num_leaves": 2},
        "fit": {"objective": "kmeans"},
        "merge": {"levels": []},
    }
    profile = profile_input(parse_config(settings_of), Lake())
    good, bad, keys = {}, {}, []
    for part in profile.slices:
        for batch in read_slice(Lake(), part, profile.spec, block_rows=block_rows):
            good |= dict(zip(batch.ids.to_pylist(), batch.x.astype(np.float32).tolist(), strict=True))
            bad |= {(r["slice"], r["row"]): r for r in batch.rejects.to_pylist()}
            keys += batch.keys.tolist()
    assert len(set(keys)) == len(keys) == len(good)
    return profile.num_rows, good, bad


@settings(max_examples=40, deadline=None)
@given(files(), st.integers(1, 400), st.integers(1, 20))
def test_rows_in_are_labels_and_rejects_with_the_values_that_pyarrow_reads(contents, slice_bytes, block_rows):
    with tempfile.TemporaryDirectory() as name:
        expected = write(Path(name), contents)
        try:
            num, good, bad = read(Path(name), slice_bytes, block_rows, on_bad_rows="quarantine")
        except DataError as error:
            # Refused as a whole: fewer rows than leaves, no usable row, or no row that says how wide one is.
            told = str(error)
            usable = [r for r in expected.values() if r is not None]
            assert len(usable) < 3 or "wide" in told or "expected" in told, told
            return
        except Exception as error:
            assert type(error).__name__ == "ConfigError" and "exceeds the" in str(error)
            return
        assert num == len(expected) == len(good) + len(bad)
        widths = {len(row) for row in good.values()}
        assert len(widths) <= 1
        if widths == {DIM}:
            assert good == {i: row for i, row in expected.items() if row is not None}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(0, 10**6),
    st.sampled_from(["flip", "zero", "cut"]),
    st.integers(1, 2000),
)
def test_no_row_is_lost_in_a_damaged_file(sizes, group, where, how, slice_bytes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = shards.vectors(sum(sizes), dim=DIM)
        first = 0
        for number, size in enumerate(sizes):
            table = shards.rows(x[first : first + size], first_id=first)
            shards.write(folder / f"{number}.parquet", table, row_group_size=group, write_page_checksum=True)
            first += size
        path = folder / "0.parquet"
        body = bytearray(path.read_bytes())
        at = where % len(body)
        if how == "cut":
            body = body[:at]
        else:
            body[at] = body[at] ^ 0x5A if how == "flip" else 0
        path.write_bytes(body)
        try:
            num, good, bad = read(folder, slice_bytes, 7, on_bad_files="quarantine", on_bad_rows="quarantine")
        except Exception as error:
            assert type(error).__name__ in ("DataError", "ConfigError"), repr(error)
            return
        # Either the whole file was left out, which profile tells, or every row of its footer is accounted for.
        assert num == len(good) + len(bad)
        for i, row in good.items():
            if i >= sizes[0]:
                assert row == x[i].tolist()
        assert set(range(sizes[0], len(x))) <= set(good)
