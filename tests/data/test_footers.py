"""Footers: what depends on the columns alone is found once, and the rest equals the plain sum over all chunks."""

import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydc.data import footers
from raydc.data.footers import ColumnsCache, Footer, parse_footer, read_footers
from raydc.storage.lake import Lake, StoredFile
from tests import shards

_TYPES = (
    pa.int64(),
    pa.string(),
    pa.list_(pa.float32()),
    pa.list_(pa.float32(), 3),
    pa.list_(pa.list_(pa.int8())),
    pa.struct([("x", pa.int32()), ("y", pa.list_(pa.int32())), ("w", pa.float64())]),
    pa.map_(pa.string(), pa.int32()),
    pa.dictionary(pa.int32(), pa.string()),
)
_NAMES = ("a", "a.b", "b", "a.", ".a", "list.element", "w", "\u00fc")


def value(type_: pa.DataType, rng: np.random.Generator):
    """Return a random value of a type, None now and then where the type has no fixed size."""
    if rng.random() < 0.1:
        return None
    if pa.types.is_struct(type_):
        return {f.name: value(f.type, rng) for f in type_.fields}
    if pa.types.is_map(type_):
        return [(str(k), k) for k in range(rng.integers(3))]
    if pa.types.is_fixed_size_list(type_):
        return [value(type_.value_type, rng) for _ in range(type_.list_size)]
    if pa.types.is_list(type_):
        return [value(type_.value_type, rng) for _ in range(rng.integers(4))]
    if pa.types.is_string(type_) or pa.types.is_dictionary(type_):
        return str(rng.integers(5))
    return float(rng.integers(5)) if pa.types.is_floating(type_) else int(rng.integers(5))


def random_table(rng: np.random.Generator) -> pa.Table:
    """Return a table of some columns whose names are parts of each other."""
    names = rng.permutation(_NAMES)[: rng.integers(1, len(_NAMES))]
    num_rows = int(rng.integers(0, 30))
    return pa.table(
        {
            str(name): pa.array([value(type_, rng) for _ in range(num_rows)], type_)
            for name in names
            for type_ in [_TYPES[rng.integers(len(_TYPES))]]
        }
    )


def values_by_looking_at_every_chunk(path) -> dict[str, int]:
    """Return the leaf values of each top-level column, found the long way."""
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    found = dict.fromkeys(names, 0)
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        for c in range(group.num_columns):
            leaf = group.column(c).path_in_schema
            found[max((n for n in names if f"{leaf}.".startswith(f"{n}.")), key=len)] += group.column(c).num_values
    return found


@pytest.mark.parametrize("seed", range(25))
def test_a_footer_says_what_a_look_at_every_chunk_says(tmp_path, seed):
    rng = np.random.default_rng(seed)
    table = random_table(rng)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (footer,) = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    expected = values_by_looking_at_every_chunk(tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    repeated = {
        name for name, type_ in zip(table.column_names, table.schema.types, strict=True) if pa.types.is_nested(type_)
    }
    assert footer.problem is None
    assert footer.columns is not None
    assert footer.num_values == {name: expected[name] for name in repeated}
    assert footer.columns.schema.equals(file.schema_arrow, check_metadata=False)
    assert footer.num_rows == table.num_rows == sum(rows for rows, _ in footer.row_groups)
    groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    assert footer.row_groups == tuple((g.num_rows, g.total_byte_size) for g in groups)


def test_files_of_equal_columns_share_one_object_whatever_else_their_writers_note(tmp_path):
    for number in range(6):
        table = shards.rows(shards.vectors(5 + number), **({"more": ["x"] * (5 + number)} if number % 2 else {}))
        table = table.replace_schema_metadata({"pandas": f"index from 0 to {number}"})
        shards.write(tmp_path / f"{number}.parquet", table)
    found = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert [f.problem for f in found] == [None] * 6
    assert len({id(f.columns) for f in found}) == 2
    assert len({id(f.columns) for f in found[::2]}) == 1


def test_equal_types_in_leaves_of_other_names_are_told_apart(tmp_path):
    for name, compliant in (("a", True), ("b", False)):
        table = pa.table({"x": pa.array([[1, 2]], pa.list_(pa.field("item", pa.int64())))})
        pq.write_table(table, tmp_path / f"{name}.parquet", use_compliant_nested_type=compliant)
    first, second = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert first.columns.schema.equals(second.columns.schema)
    assert first.columns is not second.columns
    assert first.num_values == second.num_values == {"x": 2}


def test_more_schemas_than_are_kept_are_described_all_the_same():
    known = ColumnsCache()
    for number in range(600):
        columns = known.of(pq.read_metadata(pa.BufferReader(file_of(pa.table({f"c{number}": [1]})))))
        assert columns.names == (f"c{number}",)
    assert known.num_described == 600


def file_of(table: pa.Table) -> bytes:
    """Return a table as a Parquet file of row groups of 10 rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


def calls_of(what) -> int:
    """Return how many functions our code calls, pyarrow's parser aside: a measure that no other process disturbs."""
    seen: Counter[str] = Counter()

    def count(frame, event, argument) -> None:
        caller = frame.f_back if event == "call" else frame
        seen[event] += caller.f_code.co_filename == footers.__file__

    sys.setprofile(count)
    try:
        what()
    finally:
        sys.setprofile(None)
    return seen["call"] + seen["c_call"]


def calls_of_a_first_and_a_second_file(num_columns: int) -> tuple[int, int]:
    table = pa.table(
        {"embedding": shards.column(shards.vectors(50), "list")} | {f"column.{i}": [1] * 50 for i in range(num_columns)}
    )
    raw, known = file_of(table), ColumnsCache()
    file, found = StoredFile("a.parquet", len(raw)), []

    def read() -> None:
        found.append(parse_footer(file, raw, known))

    calls = calls_of(read), calls_of(read)
    assert [(f.num_rows, f.num_values) for f in found] == [(50, {"embedding": 200})] * 2
    assert known.num_described == 1
    return calls


def test_the_work_is_linear_in_the_columns_once_and_nothing_for_each_file_after_it():
    few, many = (calls_of_a_first_and_a_second_file(n) for n in (50, 400))
    assert many[0] < 8.1 * few[0]
    assert many[1] == few[1]


@pytest.mark.parametrize("columns", [4, 3000])
def test_a_footer_of_any_length_is_read_whole(tmp_path, columns):
    table = pa.table({f"c{i}": ["some text of a value"] * 5 for i in range(columns)})
    pq.write_table(table, tmp_path / "a.parquet")
    (footer,) = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert (footer.problem, footer.num_rows, len(footer.columns.names)) == (None, 5, columns)


def test_a_footer_longer_than_its_file_is_a_problem_of_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"x" * 20 + (2**31).to_bytes(4, "little") + b"PAR1")
    (footer,) = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert footer == Footer(uri=str(path), size=32, problem=footer.problem)
    assert "and the file has 32: it is damaged" in footer.problem
