"""Slices: every layout of the input, bad rows told apart, and a plan that names each row once."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydc.core.models.preprocess import Preprocess
from raydc.data.columns import vectors_from_arrow
from raydc.data.footers import Footer, read_footers
from raydc.data.ids import ids_from_arrow
from raydc.data.layouts import Layout, embedding_layout
from raydc.data.reader import read_slice
from raydc.data.slices import Column, InputSpec, Slice, plan_slices
from raydc.errors import DataError
from raydc.storage.lake import Lake
from tests import shards

LAYOUTS = ["fixed_size_list", "list", "large_list", "fixed_size_binary", "fixed_shape_tensor", "ray_tensor"]
DTYPES = ["float16", "float32", "float64"]


def spec(dtype: str = "float32", dim: int = 4, **changes: object) -> InputSpec:
    return InputSpec(
        **(
            {"columns": (Column(name="embedding", dim=dim, dtype=dtype),), "id_column": "id", "id_type": "int64"}
            | changes
        )
    )


def plan(folder, slice_bytes: int = 2**30) -> list[Slice]:
    return plan_slices(read_footers(Lake(), Lake().list_parquet(str(folder))), slice_bytes)


def read(folder, what: InputSpec, **options) -> list:
    return [b for part in plan(folder) for b in read_slice(Lake(), part, what, **options)]


def vectors_of(column: pa.ChunkedArray, dim: int = 2, dtype: str = "float32") -> tuple[list, list[str]]:
    reasons = np.full(len(column), "", dtype="U16")
    x = vectors_from_arrow(column, dim, dtype, reasons)
    assert x.dtype == dtype
    return x.tolist(), reasons.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_the_same_matrix(tmp_path, layout, dtype):
    x = shards.vectors(21).astype(dtype)
    table = shards.rows(shards.column(x, layout))
    shards.write(tmp_path / "a.parquet", table, row_group_size=8)
    found = embedding_layout(pq.read_schema(tmp_path / "a.parquet").field("embedding").type, None, dtype)
    assert isinstance(found, Layout)
    assert found.dtype == dtype
    assert found.dim == (None if layout in ("list", "large_list") else 4)
    batches = read(tmp_path, spec(dtype), block_rows=5)
    assert {b.x.dtype for b in batches} == {np.dtype("float16" if dtype == "float16" else "float32")}
    assert max(len(b.x) for b in batches) == 5
    assert np.array_equal(np.concatenate([b.x for b in batches]), x.astype(np.float32))
    assert np.concatenate([b.keys for b in batches]).tolist() == list(range(21))
    assert [i for b in batches for i in b.ids.to_pylist()] == list(range(21))
    assert sum(len(b.rejects) for b in batches) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sliced_and_chunked_columns_are_read_from_where_they_begin(layout):
    x = shards.vectors(12)
    array = shards.column(x, layout)
    column = pa.chunked_array([array.slice(1, 4), array.slice(7, 0), array.slice(8, 3)])
    reasons = np.full(7, "", dtype="U16")
    assert np.array_equal(vectors_from_arrow(column, 4, "float32", reasons), x[[1, 2, 3, 4, 8, 9, 10]])
    assert np.array_equal(vectors_from_arrow(column.slice(2, 4), 4, "float32", reasons[:4]), x[[3, 4, 8, 9]])
    assert vectors_from_arrow(column.slice(0, 0), 4, "float32", reasons[:0]).shape == (0, 4)
    assert vectors_from_arrow(pa.chunked_array([], array.type), 4, "float32", reasons[:0]).shape == (0, 4)


@pytest.mark.parametrize("layout", ["fixed_size_list", "list", "large_list", "fixed_size_binary"])
def test_one_chunk_of_regular_rows_is_not_copied(layout):
    array = shards.column(shards.vectors(6), layout)
    x = vectors_from_arrow(pa.chunked_array([array]), 4, "float32", np.full(6, "", dtype="U16"))
    values = array.buffers()[-1] if layout != "fixed_size_binary" else array.buffers()[1]
    assert x.ctypes.data == values.address


def test_a_ray_tensor_is_read_where_ray_was_never_imported(tmp_path):
    x = shards.vectors(10)
    shards.write(tmp_path / "a.parquet", shards.rows(shards.column(x, "ray_tensor")))
    script = f"""
import sys
from raydc.storage.lake import Lake
from tests.data.test_slices import plan, read, spec
import pyarrow.parquet as pq
field = pq.read_schema({str(tmp_path / "a.parquet")!r}).field("embedding")
assert b"ray.data.arrow_tensor" in field.metadata[b"ARROW:extension:name"], field.metadata
(batch,) = read({str(tmp_path)!r}, spec())
assert "ray" not in sys.modules
print(batch.x.tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(x.tolist())


@pytest.mark.parametrize(
    ("type_", "dtype", "text"),
    [
        (pa.list_(pa.list_(pa.float32())), None, "holds lists of list<item: float>"),
        (pa.date32(), None, "is date32[day], expected a list, fixed_size_list, tensor, Spark vector, text or bytes"),
        (pa.list_(pa.uint16()), None, "These may be integers or the bits of bfloat16: set input.embedding_columns"),
        (
            pa.list_(pa.string()),
            None,
            "holds lists of string, expected numbers. To convert, DuckDB: COPY (SELECT * REPL",
        ),
        (pa.map_(pa.string(), pa.float32()), None, "REPLACE (map_values(COLUMN)::FLOAT[] AS COLUMN)"),
        (pa.struct([("x", pa.float32())]), None, "REPLACE ([COLUMN.x, ...]::FLOAT[] AS COLUMN)"),
        (pa.binary(), None, "is binary; set its element type with input.embedding_columns[].dtype"),
        (pa.binary(16), None, "is fixed_size_binary; set its element type with input.embedding_columns"),
        (pa.binary(6), "float32", "has 6 bytes per row, not a multiple of float32's 4"),
    ],
)
def test_a_type_that_holds_no_embeddings_is_told_so(type_, dtype, text):
    found = embedding_layout(type_, None, dtype)
    assert isinstance(found, str)
    assert text in found


@pytest.mark.parametrize("type_", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)])
def test_null_rows_are_missing_and_null_values_not_finite(type_):
    column = pa.chunked_array([pa.array([[9, 9], [1, 2], None, [3, None]], type_)]).slice(1)
    x, reasons = vectors_of(column)
    assert reasons == ["", "missing", ""]
    assert x[:2] == [[1, 2], [0, 0]]
    assert x[2][0] == 3
    assert np.isnan(x[2][1])


def test_null_rows_of_bytes_are_missing():
    column = pa.chunked_array([pa.array([np.float32([1, 2]).tobytes(), None], pa.binary(8))])
    x, reasons = vectors_of(column)
    assert reasons == ["", "missing"]
    assert x[0] == [1, 2]


def test_rows_of_another_length_are_told_apart_from_missing_ones():
    x, reasons = vectors_of(
        pa.chunked_array([pa.array([[1, 2], [], None, [3], [4, 5, 6], [7, 8]], pa.list_(pa.float32()))])
    )
    assert reasons == ["", "wrong_length", "missing", "wrong_length", "wrong_length", ""]
    assert x == [[1, 2], [0, 0], [0, 0], [0, 0], [0, 0], [7, 8]]


def bad_rows(folder, x: np.ndarray | pa.Array, what: InputSpec, **others) -> dict[int, str]:
    """Return the reason of each rejected row, and check the rows that were kept."""
    shards.write(folder / "a.parquet", shards.rows(x, first_id=100, **others))
    batches = read(folder, dataclasses.replace(what, on_bad_rows="quarantine"), block_rows=3)
    reasons = {r["row"]: r["reason"] for b in batches for r in b.rejects.to_pylist()}
    assert {r["slice"] for b in batches for r in b.rejects.to_pylist()} <= {"a.parquet"}
    keys = [k for b in batches for k in b.keys.tolist()]
    assert sorted([*keys, *reasons]) == list(range(len(x)))
    assert keys == sorted(keys)
    return reasons


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_not_finite(tmp_path, layout, dtype):
    x = shards.vectors(8).astype(dtype)
    x[1, 2], x[4, 0], x[6, 3] = np.nan, np.inf, -np.inf
    x[7, :2] = [np.inf, -np.inf]
    found = bad_rows(tmp_path, shards.column(x, layout), spec(dtype))
    assert found == dict.fromkeys([1, 4, 6, 7], "not_finite")


def test_float64_beyond_the_range_of_float32_is_not_finite(tmp_path):
    x = shards.vectors(6).astype(np.float64)
    x[1, 0], x[3, 2] = 1e39, -1e300
    x[4] = [3e38, 3e38, -3e38, 3e38]
    x[5] = [1e-300, 0, 0, 1]
    assert bad_rows(tmp_path, x, spec("float64")) == {1: "not_finite", 3: "not_finite", 4: "too_large"}


def test_float64_beyond_the_range_of_float32_is_found_in_each_of_several_columns(tmp_path):
    x = shards.vectors(4).astype(np.float64)
    x[2, 1] = 1e39
    both = spec(columns=(Column(name="text", dim=4, dtype="float64"), Column(name="embedding", dim=4, dtype="float32")))
    assert bad_rows(tmp_path, shards.vectors(4), both, text=shards.column(x)) == {2: "not_finite"}


def test_a_row_of_zeros_is_bad_only_where_its_direction_counts(tmp_path):
    x = shards.vectors(5) + 100
    x[3] = 0
    assert bad_rows(tmp_path, x, spec()) == {}
    assert bad_rows(tmp_path, x, spec(refuse_zero_norm=True)) == {3: "zero_norm"}


def test_zeros_in_one_of_several_columns_are_bad_under_l2(tmp_path):
    x, text = shards.vectors(4) + 100, shards.vectors(4) + 100
    x[0], text[2] = 0, 0
    columns = (Column(name="embedding", dim=4, dtype="float32"), Column(name="text", dim=4, dtype="float32"))
    found = bad_rows(tmp_path, x, spec(columns=columns, refuse_zero_norm=True), text=shards.column(text))
    assert found == {0: "zero_norm", 2: "zero_norm"}


@pytest.mark.parametrize("type_", [pa.float32(), pa.float64(), pa.int64(), pa.float16()])
def test_weights_must_be_positive_numbers(tmp_path, type_):
    values = [1, 0, -1, None, 2]
    if not pa.types.is_integer(type_):
        values = [np.float16(v) if v is not None else None for v in [*values, np.inf, np.nan]]
    x = shards.vectors(len(values))
    found = bad_rows(tmp_path, x, spec(weight_column="w"), w=pa.array(values, type_))
    assert found == dict.fromkeys(sorted(set(range(len(values))) - {0, 4}), "bad_weight")


def test_weights_beyond_float32_are_bad(tmp_path):
    found = bad_rows(tmp_path, shards.vectors(3), spec(weight_column="w"), w=pa.array([1e300, 1e-300, 0.5]))
    assert found == {0: "bad_weight", 1: "bad_weight"}


def test_weights_come_with_their_rows(tmp_path):
    x = shards.vectors(4)
    x[1, 0] = np.nan
    shards.write(tmp_path / "a.parquet", shards.rows(x, w=pa.array([1, 2, 3, 4])))
    (batch,) = read(tmp_path, spec(weight_column="w", on_bad_rows="quarantine"))
    assert batch.weights.tolist() == [1, 3, 4]
    assert batch.weights.dtype == np.float32


def test_a_row_without_id_is_missing(tmp_path):
    found = bad_rows(tmp_path, shards.vectors(3), spec(id_type="string"), id=pa.array(["a", None, "c"]))
    assert found == {1: "missing"}


@pytest.mark.parametrize(
    ("ids", "kind", "expected"),
    [
        (pa.array([3, -1], pa.int64()), "int64", [3, -1]),
        (pa.array([3, 2**31 - 1], pa.int32()), "int64", [3, 2**31 - 1]),
        (pa.array([3, 4], pa.uint8()), "int64", [3, 4]),
        (pa.array(["b", "a"]), "string", ["b", "a"]),
        (pa.array(["b", "a"], pa.large_string()), "string", ["b", "a"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), "string", ["b", "a", "b"]),
        (pa.array(["b", None, "b"], pa.large_string()).dictionary_encode(), "string", ["b", None, "b"]),
        (pa.array([7, 8, 7], pa.int32()).dictionary_encode(), "int64", [7, 8, 7]),
    ],
)
def test_ids_of_every_type_become_int64_or_string(ids, kind, expected):
    what = spec(id_type=kind)
    for column in (pa.chunked_array([ids]), pa.chunked_array([ids.slice(0, 1), ids.slice(1)])):
        found, _ = ids_from_arrow(column, what.arrow_id_type)
        assert isinstance(found, pa.Array)
        assert found.type == what.arrow_id_type
        assert found.to_pylist() == expected
    assert ids_from_arrow(pa.chunked_array([], ids.type), what.arrow_id_type)[0].to_pylist() == []


def test_several_columns_stand_side_by_side(tmp_path):
    image, text = shards.vectors(9, dim=3), shards.vectors(9, dim=2, seed=1).astype(np.float16)
    table = shards.rows(image, text=shards.column(text, "list"))
    shards.write(tmp_path / "a.parquet", table, row_group_size=4)
    both = spec(
        columns=(
            Column(name="text", dim=2, dtype="float16", weight=0.5),
            Column(name="embedding", dim=3, dtype="float32", weight=2.0),
        )
    )
    assert (both.dim, both.dtype) == (5, np.float32)
    assert both.blocks == [(0, 2, 0.5), (2, 5, 2.0)]
    x = np.concatenate([b.x for b in read(tmp_path, both, block_rows=4)])
    assert np.array_equal(x, np.hstack([text, image]))


def test_labels_and_carried_columns_come_on_demand_with_the_good_rows(tmp_path):
    x = shards.vectors(4)
    x[2, 0] = np.nan
    others = {"label": pa.array(["a", None, "b", "c"]), "uri": ["u0", "u1", "u2", "u3"], "n": [0, 1, 2, 3]}
    shards.write(tmp_path / "a.parquet", shards.rows(x, **others))
    what = spec(label_column="label", carry_columns=("uri", "n", "id"), on_bad_rows="quarantine")
    (plain,) = read(tmp_path, what)
    assert plain.labels is None
    assert plain.carry is None
    (batch,) = read(tmp_path, what, with_labels=True, with_carry=True)
    assert batch.labels.to_pylist() == ["a", None, "c"]
    assert batch.carry.to_pydict() == {"uri": ["u0", "u1", "u3"], "n": [0, 1, 3], "id": [0, 1, 3]}


def test_under_fail_the_first_bad_row_is_named(tmp_path):
    x = shards.vectors(20)
    x[13, 0] = x[15, 0] = np.nan
    shards.write(tmp_path / "a.parquet", shards.rows(x, first_id=500), row_group_size=6)
    parts = plan(tmp_path, slice_bytes=1)
    with pytest.raises(DataError) as caught:
        list(read_slice(Lake(), parts[2], spec(), block_rows=4))
    assert str(caught.value) == (
        f"{tmp_path}/a.parquet row 13 (id 513) is bad: not_finite. Fix the export, or set input.on_bad_rows=quarantine."
    )


def test_the_first_reason_of_a_row_is_the_one_that_is_told(tmp_path):
    column = pa.array([[1, 2], None, [np.nan], [np.nan, 1]], pa.list_(pa.float32()))
    found = bad_rows(tmp_path, column, spec(dim=2, weight_column="w"), w=pa.array([-1.0, -1.0, -1.0, -1.0]))
    assert found == {0: "bad_weight", 1: "missing", 2: "wrong_length", 3: "not_finite"}


def test_large_files_are_split_between_row_groups_with_contiguous_keys(tmp_path):
    for name, num in (("a.parquet", 25), ("b/a.parquet", 0), ("b/c.parquet", 7), ("d.parquet", 10)):
        table = shards.rows(shards.vectors(num, dim=64))
        shards.write(tmp_path / name, table, row_group_size=5, use_dictionary=False, compression="none")
    parts = plan(tmp_path, slice_bytes=3000)
    assert [(p.name, p.row_groups, p.first_row, p.first_key, p.num_rows) for p in parts] == [
        ("a-00000.parquet", (0, 1), 0, 0, 10),
        ("a-00001.parquet", (2, 3), 10, 10, 10),
        ("a-00002.parquet", (4,), 20, 20, 5),
        ("b/a.parquet", (0,), 0, 25, 0),
        ("b/c.parquet", (0, 1), 0, 25, 7),
        ("d.parquet", (0, 1), 0, 32, 10),
    ]
    assert [p.index for p in parts] == list(range(6))
    batches = [b for p in parts for b in read_slice(Lake(), p, spec(dim=64), block_rows=3)]
    assert np.concatenate([b.keys for b in batches]).tolist() == list(range(42))


def test_nested_folders_may_hold_equal_names(tmp_path):
    for name in ("x/part-0.parquet", "y/part-0.parquet", "y/z/part-0.parquet"):
        shards.write(tmp_path / name, shards.rows(shards.vectors(1)))
    assert [p.name for p in plan(tmp_path)] == ["x/part-0.parquet", "y/part-0.parquet", "y/z/part-0.parquet"]
    assert [p.name for p in plan(tmp_path / "y" / "z")] == ["part-0.parquet"]


def footers(*uris: str, row_groups: int = 1) -> list[Footer]:
    return [Footer(uri=u, size=100, num_rows=row_groups, row_groups=((1, 100),) * row_groups) for u in uris]


def test_the_parts_of_a_file_never_take_the_name_of_another():
    files = [
        *footers("/in/a-00000.parquet"),
        *footers("/in/a.parquet", row_groups=2),
        *footers("/in/a-part-00001.parquet"),
    ]
    names = [s.name for s in plan_slices(files, 100)]
    assert len(set(names)) == 4
    assert {"a-00000.parquet", "a-part-00001.parquet"} <= set(names)


def test_names_are_unique_and_end_in_parquet_whatever_the_input_is_called():
    assert [s.name for s in plan_slices(footers("/in/a", "/in/a.parquet", "/in/b.pq"), 100)] == [
        "a.parquet",
        "a.parquet.parquet",
        "b.pq.parquet",
    ]
    assert [s.name for s in plan_slices(footers("/data/a.parquet", "s3://b/a.parquet", "s3://c/a.parquet"), 100)] == [
        "data/a.parquet",
        "s3/b/a.parquet",
        "s3/c/a.parquet",
    ]
    assert plan_slices([], 100) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=6), min_size=1, max_size=5),
    st.integers(1, 120),
)
def test_a_plan_holds_every_row_group_once_and_in_order(files, slice_bytes):
    made = [
        Footer(uri=f"/in/{i}.parquet", size=1, num_rows=sum(r for r, _ in g), row_groups=tuple(g))
        for i, g in enumerate(files)
    ]
    parts = plan_slices(made, slice_bytes)
    for footer in made:
        own = [p for p in parts if p.uri == footer.uri]
        assert [g for p in own for g in p.row_groups] == list(range(len(footer.row_groups)))
        assert [p.first_row for p in own] == np.cumsum([0, *(p.num_rows for p in own)])[:-1].tolist()
        for p in own:
            assert p.num_bytes <= slice_bytes or len(p.row_groups) == 1
    assert [p.first_key for p in parts] == np.cumsum([0, *(p.num_rows for p in parts)])[:-1].tolist()
    assert sum(p.num_rows for p in parts) == sum(f.num_rows for f in made)
    assert len({p.name for p in parts}) == len(parts)


def test_footers_are_read_in_order_with_their_counts(tmp_path):
    for number in range(30):
        shards.write(tmp_path / f"{number:02d}.parquet", shards.rows(shards.column(shards.vectors(number), "list")))
    found = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert [f.num_rows for f in found] == list(range(30))
    assert [f.num_values["embedding"] for f in found] == [4 * n for n in range(30)]
    assert [f.problem for f in found] == [None] * 30


def test_a_column_name_may_have_dots(tmp_path):
    x = shards.vectors(5)
    columns = {
        "id": list(range(5)),
        "image.embedding": shards.column(x, "list"),
        "image": [1.0] * 5,
        "image.e": [2] * 5,
    }
    shards.write(tmp_path / "a.parquet", pa.table(columns))
    (footer,) = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert footer.num_values == {"image.embedding": 20}
    (batch,) = read(tmp_path, spec(columns=(Column(name="image.embedding", dim=4, dtype="float32"),)))
    assert np.array_equal(batch.x, x)


def test_a_changed_value_changes_the_digest_of_a_footer(tmp_path):
    def digest_of(table: pa.Table) -> str:
        shards.write(tmp_path / "a.parquet", table)
        return read_footers(Lake(), Lake().list_parquet(str(tmp_path)))[0].digest

    first = digest_of(shards.rows(shards.vectors(5)))
    assert digest_of(shards.rows(shards.vectors(5))) == first
    assert digest_of(shards.rows(shards.vectors(5), first_id=1)) != first
    assert digest_of(shards.rows(shards.vectors(6))) != first


def damaged(path, how: str) -> None:
    body = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(body[: len(body) // 2])
    elif how == "wrong magic":
        path.write_bytes(body[:-4] + b"PAR2")
    elif how == "garbage":
        path.write_bytes(os.urandom(100))


@pytest.mark.parametrize("how", ["empty", "truncated", "wrong magic", "garbage", "gone"])
def test_an_unreadable_file_carries_its_problem(tmp_path, how):
    path = tmp_path / "a.parquet"
    shards.write(path, shards.rows(shards.vectors(50)))
    listed = Lake().list_parquet(str(tmp_path))
    path.unlink() if how == "gone" else damaged(path, how)
    (footer,) = read_footers(Lake(), listed)
    assert footer.problem
    assert "\n" not in footer.problem
    assert (footer.num_rows, footer.columns) == (0, None)


def damage_page(path, group: int, column: int = 1) -> None:
    """Overwrite the data of one column of one row group; the footer stays whole."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with open(path, "r+b") as handle:
        handle.seek(start)
        handle.write(b"\xff" * chunk.total_compressed_size)


@pytest.mark.parametrize("group", [0, 2])
def test_a_damaged_page_under_a_good_footer_is_refused_or_quarantined(tmp_path, group):
    path = tmp_path / "a.parquet"
    shards.write(path, shards.rows(shards.vectors(40)), row_group_size=10)
    damage_page(path, group)
    assert plan(tmp_path)[0].num_rows == 40
    with pytest.raises(DataError, match=f"a.parquet cannot be read beyond row {10 * group}: .*on_bad_files=quarantine"):
        read(tmp_path, spec(), block_rows=10)
    batches = read(tmp_path, spec(on_bad_files="quarantine"), block_rows=10)
    lost = list(range(10 * group, 10 * group + 10))
    assert [k for b in batches for k in b.keys.tolist()] == sorted(set(range(40)) - set(lost))
    rejects = pa.concat_tables([b.rejects for b in batches])
    assert rejects["row"].to_pylist() == lost
    assert set(rejects["reason"].to_pylist()) == {"unreadable_file"}
    # The ids lie in pages of their own, which are whole.
    assert rejects["id"].to_pylist() == lost


@pytest.mark.parametrize("block_rows", [3, 7, 10, 64])
@pytest.mark.parametrize("slice_bytes", [1, 2**30])
def test_damage_in_the_middle_costs_its_row_group_whatever_the_blocks(tmp_path, block_rows, slice_bytes):
    path = tmp_path / "a.parquet"
    shards.write(path, shards.rows(shards.vectors(50), first_id=100), row_group_size=10)
    damage_page(path, 1)
    damage_page(path, 3, column=0)
    what = spec(on_bad_files="quarantine")
    parts = plan(tmp_path, slice_bytes)
    batches = [b for p in parts for b in read_slice(Lake(), p, what, block_rows=block_rows)]
    found = {int(k): (i, x) for b in batches for k, i, x in zip(b.keys, b.ids.to_pylist(), b.x.tolist())}
    rejects = pa.concat_tables([b.rejects for b in batches]).to_pylist()
    lost = {r["row"]: r["id"] for r in rejects}
    assert lost == {r: r + 100 for r in range(10, 20)} | dict.fromkeys(range(30, 40))
    assert found == {k: (k + 100, shards.vectors(50)[k].tolist()) for k in range(50) if k not in lost}
    assert len(rejects) == len(lost)


@pytest.mark.parametrize("how", ["gone", "truncated", "empty"])
def test_a_file_that_is_lost_after_the_plan_loses_all_its_rows_aloud(tmp_path, how):
    path = tmp_path / "a.parquet"
    shards.write(path, shards.rows(shards.vectors(40)), row_group_size=10)
    (part,) = plan(tmp_path)
    path.unlink() if how == "gone" else damaged(path, how)
    with pytest.raises(DataError, match="a.parquet cannot be read beyond row 0"):
        list(read_slice(Lake(), part, spec()))
    batches = list(read_slice(Lake(), part, spec(on_bad_files="quarantine")))
    assert sum(len(b.keys) for b in batches) == 0
    rejects = pa.concat_tables([b.rejects for b in batches])
    assert rejects["row"].to_pylist() == list(range(40))
    assert rejects["id"].null_count == 40


def test_a_flipped_bit_is_found_where_the_writer_left_checksums(tmp_path):
    path = tmp_path / "a.parquet"
    table = shards.rows(shards.vectors(40))
    shards.write(path, table, compression="none", use_dictionary=False, write_page_checksum=True)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    with open(path, "r+b") as handle:
        handle.seek(chunk.data_page_offset + chunk.total_compressed_size - 8)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 1]))
    assert not pq.read_table(path).equals(table)
    with pytest.raises(DataError, match="cannot be read beyond row 0.*CRC"):
        read(tmp_path, spec())


def test_a_column_that_stands_twice_is_told(tmp_path):
    x = shards.column(shards.vectors(3))
    table = pa.Table.from_arrays([pa.array([1, 2, 3]), x, pa.array([4, 5, 6])], names=["id", "embedding", "id"])
    shards.write(tmp_path / "a.parquet", table)
    (footer,) = read_footers(Lake(), Lake().list_parquet(str(tmp_path)))
    assert footer.problem == "has more than one column 'id'"


def test_bytes_of_a_dictionary_are_read_as_any_others(tmp_path):
    x = shards.vectors(6)[[0, 1, 0, 2, 1, 0]]
    column = shards.column(x, "fixed_size_binary").dictionary_encode()
    shards.write(tmp_path / "a.parquet", shards.rows(column), row_group_size=4)
    # Parquet gives the values back; it has no other dictionaries of embeddings.
    stored = pq.read_schema(tmp_path / "a.parquet").field("embedding").type
    assert embedding_layout(stored, None, "float32") == Layout("fixed_size_binary", "float32", 4)
    assert np.array_equal(np.concatenate([b.x for b in read(tmp_path, spec(), block_rows=4)]), x)


def test_norms_that_float32_cannot_hold_are_bad_where_the_direction_counts(tmp_path):
    x = shards.vectors(7).astype(np.float32) + 100
    x[1], x[2], x[3], x[4], x[5] = 1e19, 3e38, 1e-20, 0, [1e-20, 1, 0, 0]
    assert bad_rows(tmp_path, x, spec()) == {1: "too_large", 2: "too_large"}
    found = bad_rows(tmp_path, x, spec(refuse_zero_norm=True))
    assert found == {1: "norm_overflow", 2: "norm_overflow", 3: "norm_underflow", 4: "zero_norm"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_pass_under_l2_come_out_with_norm_one(tmp_path, dtype):
    tiny, huge = (1e-3, 6e4) if dtype == "float16" else (1e-12, 1e18)
    x = np.array([[tiny, 0, 0, tiny], [huge, huge, 0, huge], [1, 2, 3, 4]], dtype)
    assert bad_rows(tmp_path, x, spec(dtype, refuse_zero_norm=True)) == {}
    (batch,) = read(tmp_path, spec(dtype, refuse_zero_norm=True))
    norms = Preprocess("l2", [(0, 4, 1.0)])(torch.from_numpy(batch.x.copy())).double().norm(dim=1)
    assert torch.allclose(norms, torch.ones(3, dtype=torch.float64), atol=1e-5)


def test_ids_that_are_no_text_are_bad_and_never_written_on(tmp_path):
    parts = [b"good", b"\xff\xfe", b"caf\xc3\xa9", None, b"cut \xc3"]
    raw = pa.array(parts, pa.binary())
    ids = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    x = shards.vectors(5)
    shards.write(tmp_path / "a.parquet", shards.rows(x, id=ids))
    batches = read(tmp_path, spec(id_type="string", on_bad_rows="quarantine"), block_rows=2)
    assert [i for b in batches for i in b.ids.to_pylist()] == ["good", "caf\u00e9"]
    rejects = [r for b in batches for r in b.rejects.to_pylist()]
    assert {r["row"]: (r["reason"], r["id"]) for r in rejects} == {
        1: ("bad_id", None),
        3: ("missing", None),
        4: ("bad_id", None),
    }
    with pytest.raises(DataError, match=r"row 1 \(id None\) is bad: bad_id"):
        read(tmp_path, spec(id_type="string"))


def test_very_long_ids_are_kept_and_shown_by_their_beginning(tmp_path):
    ids = ["a" * 3_000_000, "b", "c" * 1_000_000]
    x = shards.vectors(3)
    shards.write(tmp_path / "a.parquet", shards.rows(x, id=pa.array(ids, pa.large_string())))
    (batch,) = read(tmp_path, spec(id_type="string"))
    assert batch.ids.to_pylist() == ids
    x[0, 0] = np.nan
    shards.write(tmp_path / "a.parquet", shards.rows(x, id=ids))
    with pytest.raises(DataError, match=r"\(id 'aaaa.*\.\.\. \(3000002 characters\)\) is bad") as caught:
        read(tmp_path, spec(id_type="string"))
    assert len(str(caught.value)) < 500


def test_no_name_of_an_object_leads_out_of_the_run_folder():
    made = footers("s3://b/in/../../x.parquet", "s3://b/in/./y.parquet", "s3://b/in/z/../../../../etc/a.parquet")
    for part in plan_slices(made, 100):
        assert not {".", ".."} & set(part.name.split("/"))


def test_a_file_that_is_cut_short_after_its_footer_was_read_is_not_lost_in_silence(tmp_path):
    path = tmp_path / "a.parquet"
    shards.write(path, shards.rows(shards.vectors(40)), row_group_size=10)
    parts = plan(tmp_path)
    damaged(path, "truncated")
    with pytest.raises(DataError, match="cannot be read beyond row 0: "):
        list(read_slice(Lake(), parts[0], spec()))
    (batch,) = read_slice(Lake(), parts[0], spec(on_bad_files="quarantine", weight_column="w"))
    assert len(batch.rejects) == 40


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, PermissionError, MemoryError])
def test_a_fault_of_the_way_to_the_file_never_quarantines_it(tmp_path, monkeypatch, error):
    shards.write(tmp_path / "a.parquet", shards.rows(shards.vectors(4)))
    lake, listed, parts = Lake(), Lake().list_parquet(str(tmp_path)), plan(tmp_path)

    def refuse(uri: str):
        raise error("on purpose")

    monkeypatch.setattr(lake, "open_parquet", refuse)
    with pytest.raises(error, match="on purpose"):
        list(read_slice(lake, parts[0], spec(on_bad_files="quarantine")))
    with pytest.raises(DataError, match="a.parquet: on purpose. Check the network and the access rights"):
        read_footers(lake, listed)


def test_an_empty_file_is_a_slice_without_batches(tmp_path):
    for number, layout in enumerate(["fixed_size_list", "list", "fixed_size_binary", "fixed_shape_tensor"]):
        whole = shards.rows(shards.column(shards.vectors(2), layout))
        shards.write(tmp_path / f"{number}.parquet", whole.slice(0, 0))
        pq.ParquetWriter(tmp_path / f"{number}-no-groups.parquet", whole.schema).close()
    parts = plan(tmp_path)
    assert len(parts) == 8
    assert {p.num_rows for p in parts} == {0}
    assert read(tmp_path, spec()) == []
