"""The shapes in which embeddings, ids, labels and weights come: each is read rightly, or told with its remedy."""

import datetime
import decimal
import json
import re
import uuid

import numpy as np
import pyarrow as pa
import pytest

from raydc.data.columns import class_names
from raydc.data.distinct import DistinctRows
from raydc.data.ids import readable
from raydc.data.profile import Profile
from raydc.data.reader import RowBatch, read_slice
from raydc.data.sample import profile_input
from raydc.errors import DataError
from raydc.storage.lake import Lake
from tests import shards

Rows = tuple[Profile, list[RowBatch]]


def read(folder, **sections) -> Rows:
    """Return the profile of a folder and all its rows, labels and carried columns, as a run reads them."""
    profile = profile_input(shards.settings(folder, **sections), Lake())
    options = {"with_labels": True, "with_carry": bool(profile.spec.carry_columns)}
    batches = [b for part in profile.slices for b in read_slice(Lake(), part, profile.spec, **options)]
    assert sum(len(b.keys) + len(b.rejects) for b in batches) == profile.num_rows
    return profile, batches


def matrix(batches: list[RowBatch]) -> np.ndarray:
    return np.concatenate([b.x for b in batches]).astype(np.float32)


def ids_of(batches: list[RowBatch]) -> list:
    return [i for b in batches for i in b.ids.to_pylist()]


def reasons(batches: list[RowBatch]) -> dict:
    return {r["row"]: r["reason"] for b in batches for r in b.rejects.to_pylist()}


def refused(folder, **sections) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, **sections)
    return str(caught.value)


QUARANTINE = {"input": {"on_bad_rows": "quarantine"}}
VECTOR = pa.struct(
    [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
)


def spark(x: np.ndarray, sparse: set[int]) -> list[dict]:
    dense = [{"type": 1, "size": None, "indices": None, "values": row.tolist()} for row in x]
    for i in sparse:
        at = np.flatnonzero(x[i])
        dense[i] = {"type": 0, "size": x.shape[1], "indices": at.tolist(), "values": x[i][at].tolist()}
    return dense


# Embeddings.


def test_spark_vectors_are_read_dense_and_sparse(tmp_path):
    x = shards.vectors(20)
    x[::3, 1:3] = 0
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array(spark(x, set(range(0, 20, 3))), VECTOR)))
    shards.write(tmp_path / "b.parquet", shards.rows(pa.array(spark(x, set(range(20))), VECTOR).slice(5), first_id=20))
    profile, batches = read(tmp_path)
    assert (profile.spec.dim, profile.num_rows) == (4, 35)
    assert np.array_equal(matrix(batches), np.concatenate([x, x[5:]]))


def test_spark_vectors_that_fit_nowhere_are_rejected(tmp_path):
    rows = spark(shards.vectors(8), {1, 2, 3})
    rows[1] = {"type": 0, "size": 5, "indices": [0], "values": [1.0]}
    rows[2] = {"type": 0, "size": 4, "indices": [7], "values": [1.0]}
    rows[3] = {"type": 0, "size": 4, "indices": [1, 2], "values": [1.0]}
    rows[4] = {"type": 1, "size": None, "indices": None, "values": [1.0]}
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array([*rows, None], VECTOR)))
    _, batches = read(tmp_path, **QUARANTINE)
    assert reasons(batches) == {
        1: "wrong_length",
        2: "wrong_length",
        3: "wrong_length",
        4: "wrong_length",
        8: "missing",
    }


@pytest.mark.parametrize("form", ["[{}]", "{}", "({})", "{{{}}}", " [ {} ] "])
@pytest.mark.parametrize("separator", [",", ", ", " ", "  ", ";", " ,\n"])
def test_embeddings_as_text_are_read(tmp_path, form, separator):
    x = shards.vectors(12)
    text = pa.array([form.format(separator.join(map(str, row))) for row in x.tolist()])
    shards.write(tmp_path / "a.parquet", shards.rows(text))
    shards.write(tmp_path / "b.parquet", shards.rows(text.dictionary_encode().slice(3, 6), first_id=20))
    assert np.array_equal(matrix(read(tmp_path)[1]), np.concatenate([x, x[3:9]]))


def test_text_that_is_no_row_of_numbers_is_rejected_by_name(tmp_path):
    text = [json.dumps(row) for row in shards.vectors(8).tolist()]
    text[1], text[2], text[3], text[4], text[5] = "[1, 2, x, 4]", "", "[1, 2]", None, "[1, nan, 2, 3]"
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array(text)))
    _, batches = read(tmp_path, **QUARANTINE)
    assert reasons(batches) == {
        1: "not_numbers", 2: "not_numbers", 3: "wrong_length", 4: "missing", 5: "not_finite",
    }  # fmt: skip
    assert "row 1 (id 1) is bad: not_numbers" in refused(tmp_path)
    assert "Its text holds no list of numbers: set it right, or set input.on_bad_rows=quarantine" in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
def test_bytes_are_read_by_the_type_that_is_given(tmp_path, dtype, type_):
    x = shards.vectors(12).round().astype(dtype)
    raw = [row.tobytes() for row in x]
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array([*raw, None, raw[0][:-1], b""], type_)))
    columns = [{"name": "embedding", "dtype": dtype}]
    profile, batches = read(tmp_path, input={"embedding_columns": columns, "on_bad_rows": "quarantine"})
    assert profile.spec.columns[0].dtype == dtype
    assert np.array_equal(matrix(batches), x.astype(np.float32))
    assert reasons(batches) == {12: "missing", 13: "wrong_length", 14: "wrong_length"}


def test_bytes_of_no_known_type_ask_for_one(tmp_path):
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array([b"12345678"] * 5, pa.binary(8))))
    assert "(8 bytes may be 2 x float32, 4 x float16, 1 x float64)" in refused(tmp_path)
    assert "input.embedding_columns={name: embedding, dtype: float32}" in refused(tmp_path)


@pytest.mark.parametrize("type_", [pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.int64(), pa.bool_()])
def test_lists_of_integers_are_numbers(tmp_path, type_):
    x = np.random.default_rng(0).integers(0, 2 if type_ == pa.bool_() else 100, (12, 4))
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array(x.tolist(), pa.list_(pa.int64())).cast(pa.list_(type_))))
    profile, batches = read(tmp_path, cluster={"num_leaves": 2})
    assert np.array_equal(matrix(batches), x)
    assert profile.spec.dtype == ("float16" if type_.bit_width <= 8 else "float32")
    columns = [{"name": "embedding", "scale": 0.25}]
    profile, batches = read(tmp_path, input={"embedding_columns": columns}, cluster={"num_leaves": 2})
    assert np.array_equal(matrix(batches), x * np.float32(0.25))
    assert profile.spec.dtype == "float32"


def test_a_missing_integer_makes_its_row_bad(tmp_path):
    column = pa.array([[1, 2], [3, None], [5, 6], [7, 8], [9, 10]], pa.list_(pa.int8()))
    shards.write(tmp_path / "a.parquet", shards.rows(column))
    assert reasons(read(tmp_path, **QUARANTINE)[1]) == {1: "not_finite"}


def test_bfloat16_in_uint16_is_read_when_asked_for_and_never_guessed(tmp_path):
    x = shards.vectors(12)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    shards.write(tmp_path / "a.parquet", shards.rows(shards.column(bits)))
    columns = [{"name": "embedding", "dtype": "bfloat16"}]
    assert np.array_equal(matrix(read(tmp_path, input={"embedding_columns": columns})[1]), x)
    assert "dtype: bfloat16}, or dtype: uint16" in refused(tmp_path)
    columns = [{"name": "embedding", "dtype": "uint16"}]
    assert np.array_equal(matrix(read(tmp_path, input={"embedding_columns": columns})[1]), bits)
    shards.write(tmp_path / "a.parquet", shards.rows(pa.array([row.tobytes() for row in bits])))
    columns = [{"name": "embedding", "dtype": "bfloat16"}]
    assert np.array_equal(matrix(read(tmp_path, input={"embedding_columns": columns})[1]), x)


@pytest.mark.parametrize("layout", ["fixed_size_list", "list", "bytes"])
@pytest.mark.parametrize("dtype", ["ubinary", "binary"])
def test_packed_bits_are_unpacked_when_asked_for(tmp_path, dtype, layout):
    bits = np.random.default_rng(0).integers(0, 2, (12, 16)).astype(np.uint8)
    packed = np.packbits(bits, axis=1)
    if dtype == "binary":
        packed = (packed.astype(np.int16) - 128).astype(np.int8)
    column = pa.array([r.tobytes() for r in packed]) if layout == "bytes" else shards.column(packed, layout)
    shards.write(tmp_path / "a.parquet", shards.rows(column))
    columns = [{"name": "embedding", "dtype": dtype}]
    profile, batches = read(tmp_path, input={"embedding_columns": columns})
    assert (profile.spec.dim, profile.spec.dtype) == (16, np.float16)
    assert np.array_equal(matrix(batches), bits)
    if layout != "bytes":
        profile, batches = read(tmp_path)
        assert np.array_equal(matrix(batches), packed)
        assert f"Packed bits need dtype: {dtype}" in profile.notes[0]


def wide(x: np.ndarray, prefix: str, order: list[int] | None = None) -> dict:
    return {f"{prefix}{j}": x[:, j] for j in order or range(x.shape[1])}


def test_one_column_for_each_dimension_is_read_by_prefix_in_the_order_of_the_numbers(tmp_path):
    x = shards.vectors(10, dim=12)
    for n, order in enumerate(([*range(12)], [*range(11, -1, -1)])):
        table = pa.table({"id": range(10 * n, 10 * n + 10), "f_x": ["a"] * 10, **wide(x, "f_", order)})
        shards.write(tmp_path / f"{n}.parquet", table)
    profile, batches = read(tmp_path, input={"embedding_columns": {"prefix": "f_"}})
    (column,) = profile.spec.columns
    assert (column.name, column.dim, column.parts[:2], column.parts[-1]) == ("f_*", 12, ("f_0", "f_1"), "f_11")
    assert np.array_equal(matrix(batches), np.concatenate([x, x]))


def test_one_column_for_each_dimension_is_read_by_a_list_of_names(tmp_path):
    x = shards.vectors(10, dim=3)
    x[4, 1] = np.nan
    table = pa.table({"id": range(10), "0": x[:, 0], "1": x[:, 1].astype(np.float64), "2": x[:, 2].astype(np.int64)})
    shards.write(tmp_path / "a.parquet", table)
    whole = x.copy()
    whole[:, 2] = x[:, 2].astype(np.int64)
    for columns in ([0, 1, 2], ["0", "1", "2"], {"columns": ["0", "1", "2"], "name": "v"}):
        profile, batches = read(tmp_path, input={"embedding_columns": columns, "on_bad_rows": "quarantine"})
        assert profile.spec.blocks == [(0, 3, 1.0)]
        assert np.array_equal(matrix(batches), np.delete(whole, 4, axis=0))
        assert reasons(batches) == {4: "not_finite"}


def test_columns_for_dimensions_are_named_in_a_hint_and_judged_in_one_problem(tmp_path):
    x = shards.vectors(10, dim=128)
    shards.write(tmp_path / "a.parquet", pa.table({"id": range(10), **wide(x, "")}))
    text = refused(tmp_path)
    assert (
        "128 columns are called '' and a number: if each is a dimension, set input.embedding_columns={prefix: ''}"
        in text
    )
    assert len(text) < 700
    shards.write(tmp_path / "b.parquet", pa.table({"id": range(10), **wide(x[:, :100], "")}))
    text = refused(tmp_path, input={"embedding_columns": {"prefix": ""}})
    assert "b.parquet: has no column '100' and 27 more (columns: id, 0, 1, " in text
    assert len(text) < 500
    assert "no column is called 'g' and a number" in refused(tmp_path, input={"embedding_columns": {"prefix": "g"}})


def test_shards_of_other_types_hold_the_same_numbers(tmp_path):
    x = shards.vectors(5).round()
    forms = {
        "float32": shards.column(x),
        "float64": shards.column(x.astype(np.float64), "list"),
        "float16": shards.column(x.astype(np.float16)),
        "int64": shards.column(x.astype(np.int64), "list"),
        "text": pa.array([json.dumps(row) for row in x.tolist()]),
        "vector": pa.array(spark(x, {1, 3}), VECTOR),
        "decimal": pa.array([[decimal.Decimal(int(v)) for v in row] for row in x], pa.list_(pa.decimal128(9, 2))),
    }
    for number, column in enumerate(forms.values()):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(column, first_id=5 * number))
    profile, batches = read(tmp_path)
    assert np.array_equal(matrix(batches), np.concatenate([x] * len(forms)))
    assert any("has several element types" in note for note in profile.notes)


def test_a_shard_without_any_embedding_is_all_missing_rows(tmp_path):
    x = shards.vectors(5)
    shards.write(tmp_path / "a.parquet", shards.rows(x))
    shards.write(tmp_path / "b.parquet", shards.rows(pa.nulls(3), first_id=5))
    assert "b.parquet: column 'embedding' holds no value in 3 rows" in refused(tmp_path)
    profile, batches = read(tmp_path, **QUARANTINE)
    assert profile.sample_rejects == {"missing": 3}
    assert np.array_equal(matrix(batches), x)


# Ids.

IDS = {
    "uuid": pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([uuid.UUID(int=i).bytes for i in range(6)], pa.binary(16))
    ),
    "fixed_size_binary[16]": pa.array([uuid.UUID(int=i).bytes for i in range(6)], pa.binary(16)),
    "binary": pa.array([f"{i}".encode() for i in range(6)], pa.binary()),
    "uint64": pa.array([2**64 - 1 - i for i in range(6)], pa.uint64()),
    "decimal128(38, 0)": pa.array([decimal.Decimal(10**30 + i) for i in range(6)], pa.decimal128(38, 0)),
    "date32[day]": pa.array([datetime.date(2024, 1, 1 + i) for i in range(6)]),
    "timestamp[us, tz=UTC]": pa.array([10**15 + i for i in range(6)], pa.timestamp("us", tz="UTC")),
    "int64": pa.array(range(6), pa.int32()),
    "string": pa.array([f"row {i}" for i in range(6)], pa.large_string()),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_every_type_come_back_in_their_own_type(tmp_path, kind):
    ids = IDS[kind]
    shards.write(tmp_path / "a.parquet", shards.rows(shards.vectors(6), id=ids))
    profile, batches = read(tmp_path)
    assert profile.spec.id_type == kind
    assert ids_of(batches) == ids.to_pylist()
    assert {b.ids.type for b in batches} == {profile.spec.arrow_id_type}
    assert len(set(readable(batches[0].ids).to_pylist())) == 6
    assert readable(batches[0].ids).type in (pa.int64(), pa.string())


def test_ids_as_people_read_them():
    assert readable(IDS["uuid"])[1].as_py() == "00000000-0000-0000-0000-000000000001"
    assert readable(IDS["fixed_size_binary[16]"])[1].as_py() == "00000000000000000000000000000001"
    assert readable(IDS["uint64"])[0].as_py() == "18446744073709551615"
    assert readable(IDS["date32[day]"])[0].as_py() == "2024-01-01"
    assert readable(IDS["decimal128(38, 0)"])[1].as_py() == "1000000000000000000000000000001"


def test_integers_that_pandas_stored_as_double_are_the_same_ids(tmp_path):
    x = shards.vectors(3)
    shards.write(tmp_path / "a.parquet", shards.rows(x, id=pa.array([0, 1, 2])))
    shards.write(tmp_path / "b.parquet", shards.rows(x, id=pa.array([3.0, float("nan"), 5.5])))
    shards.write(tmp_path / "c.parquet", shards.rows(x, id=pa.nulls(3)))
    _, batches = read(tmp_path, **QUARANTINE)
    assert ids_of(batches) == [0, 1, 2, 3]
    assert [r["reason"] for b in batches for r in b.rejects.to_pylist()] == ["missing", "bad_id", *["missing"] * 3]


# Labels, weights, carried columns, partitions.


def labels_of(batches: list[RowBatch]) -> list[str]:
    return [name for b in batches for name in class_names(b.labels).tolist()]


@pytest.mark.parametrize("on_bad_files", ["fail", "quarantine"])
def test_a_label_that_is_missing_in_one_shard_costs_no_row(tmp_path, on_bad_files):
    x = shards.vectors(2)
    columns = [
        {"label": pa.array([1, 3])}, {"label": pa.nulls(2)}, {"label": pa.array([3.0, float("nan")])}, {},
        {"label": pa.array(["3", None]).dictionary_encode()}, {"label": pa.array([b"3", b"1"])},
        {"label": pa.array([[3], [1]])}, {"label": pa.array([decimal.Decimal(3), None])},
    ]  # fmt: skip
    for number, others in enumerate(columns):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(x, first_id=2 * number, **others))
    profile, batches = read(tmp_path, input={"label_column": "label", "on_bad_files": on_bad_files})
    assert profile.bad_files == []
    assert labels_of(batches) == ["1", "3", "", "", "3", "", "", "", "3", "", "3", "1", "[3]", "[1]", "3", ""]
    assert any("label column 'label' is not in 1 of 8 files" in note for note in profile.notes)


def test_a_carried_column_of_other_types_is_written_as_text(tmp_path):
    for number, others in enumerate(({"uri": ["a"]}, {"uri": [7]}, {"uri": [[1.5]]}, {}, {"uri": pa.nulls(1)})):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(shards.vectors(1), first_id=number, **others))
    _, batches = read(tmp_path, input={"carry_columns": ["uri"]})
    assert [v for b in batches for v in b.carry["uri"].to_pylist()] == ["a", "7", "[1.5]", None, None]
    assert pa.concat_tables([b.carry for b in batches], promote_options="permissive").num_rows == 5


def test_a_shard_without_weights_weighs_each_row_once(tmp_path):
    x = shards.vectors(2)
    for number, others in enumerate(({"w": [2, 3]}, {"w": pa.nulls(2)}, {}, {"w": pa.array([2.0, None])})):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(x, first_id=2 * number, **others))
    profile, batches = read(tmp_path, input={"weight_column": "w", "on_bad_rows": "quarantine"})
    assert [w for b in batches for w in b.weights.tolist()] == [2, 3, 1, 1, 1, 1, 2]
    assert [r["reason"] for b in batches for r in b.rejects.to_pylist()] == ["bad_weight"]
    assert any("weight column 'w' is not in 1 of 4 files" in note for note in profile.notes)


def test_partition_columns_are_columns_with_their_escapes_decoded(tmp_path):
    for number, kind in enumerate(["cat%2Fno 0", "d%C3%B6g", "__HIVE_DEFAULT_PARTITION__"]):
        folder = tmp_path / f"year=2024/label={kind}"
        shards.write(folder / "part-0.parquet", shards.rows(shards.vectors(2), first_id=2 * number))
    _, batches = read(tmp_path, input={"label_column": "label", "carry_columns": ["year"]})
    found = dict(zip(ids_of(batches), labels_of(batches), strict=True))
    assert found == {0: "cat/no 0", 1: "cat/no 0", 2: "d\u00f6g", 3: "d\u00f6g", 4: "", 5: ""}
    assert {v for b in batches for v in b.carry["year"].to_pylist()} == {"2024"}


# Values that float32 cannot compare, and rows that outweigh all others.


@pytest.mark.parametrize("value", [2e19, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("method", ["none", "scale", "standardize"])
def test_a_huge_value_is_a_bad_row_with_its_own_reason(tmp_path, value, method):
    x = shards.vectors(50)
    x[7], x[40, 3] = value, -value
    shards.write(tmp_path / "a.parquet", shards.rows(x))
    profile, batches = read(tmp_path, preprocess={"method": method}, **QUARANTINE)
    assert reasons(batches) == {7: "too_large", 40: "too_large"}
    assert profile.sample_rejects == {"too_large": 2}
    assert profile.moments.num_rows == 48
    text = refused(tmp_path, preprocess={"method": method})
    assert "row 7 (id 7) is bad: too_large. Bad rows in the sample: 2 too_large. Its norm leaves what float32" in text


def test_what_preprocessing_makes_too_large_is_bad_too(tmp_path):
    x = shards.vectors(50) / 1e6
    x[7, 0] = 1e17
    shards.write(tmp_path / "a.parquet", shards.rows(x))
    assert reasons(read(tmp_path, **QUARANTINE)[1]) == {}
    profile, batches = read(tmp_path, preprocess={"method": "scale"}, **QUARANTINE)
    assert reasons(batches) == {7: "too_large"}
    assert profile.sample_rejects == {"too_large": 1}


@pytest.mark.parametrize("value", [1e6, 1e9, 1e12])
def test_outliers_are_named_and_have_no_say_in_the_scale(tmp_path, value):
    x = shards.vectors(200)
    shards.write(tmp_path / "ordinary/a.parquet", shards.rows(np.delete(x, [7, 40], axis=0)))
    x[7], x[40, 3] = value, -value
    shards.write(tmp_path / "in/a.parquet", shards.rows(x))
    profile, _ = read(tmp_path / "in", preprocess={"method": "scale"})
    ordinary, _ = read(tmp_path / "ordinary", preprocess={"method": "scale"})
    assert profile.moments.mean_square == pytest.approx(ordinary.moments.mean_square)
    (note,) = profile.notes
    assert note.startswith("2 of 200 sampled rows are over 1000 times as long as the median row (norm ")
    assert f"a.parquet row 7 (id 7, norm {2 * value:.3g}); " in note
    assert ordinary.notes == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("num", [1, 5])
def test_fewer_distinct_rows_than_leaves_are_told(tmp_path, num, dtype):
    x = shards.vectors(num)[np.random.default_rng(0).integers(0, num, 200)]
    x[x == 0] = -0.0
    x[:num] = shards.vectors(num)
    shards.write(tmp_path / "a.parquet", shards.rows(x.astype(dtype)))
    (note,) = read(tmp_path, cluster={"num_leaves": 6})[0].notes
    rows = "one distinct row" if num == 1 else "5 distinct rows"
    assert note.startswith(f"the input has {rows}, fewer than cluster.num_leaves=6: at most {num} leaves can differ")
    if num > 1:
        assert read(tmp_path, cluster={"num_leaves": num})[0].notes == []


def test_distinct_rows_are_counted_up_to_what_matters():
    rows = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    count = DistinctRows(10_000)
    for block in (rows[:1000], rows, rows[::-1]):
        count.add(block)
    assert count.num == len(np.unique(rows, axis=0)) == 3000


# Arrays beside Parquet files.


def clip(folder, num_files: int = 3, rows: int = 10, dtype: str = "float16") -> np.ndarray:
    """Write the layout of clip-retrieval: img_emb/img_emb_0.npy beside metadata/metadata_0.parquet."""
    x = shards.vectors(num_files * rows).astype(dtype)
    (folder / "img_emb").mkdir(parents=True)
    for number in range(num_files):
        some = slice(number * rows, (number + 1) * rows)
        np.save(folder / f"img_emb/img_emb_{number}.npy", x[some])
        names = [f"{i:09d}" for i in range(some.start, some.stop)]
        table = pa.table({"image_path": names, "caption": ["a photo"] * rows})
        shards.write(folder / f"metadata/metadata_{number}.parquet", table, row_group_size=4)
    return x


def beside(folder, **others) -> dict:
    columns = [{"npy": f"{folder}/img_emb/img_emb_{{number}}.npy"}]
    return {"input": {"embedding_columns": columns, "id_column": "image_path", "slice_bytes": 100, **others}}


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64", "int8"])
def test_arrays_beside_parquet_files_are_read_as_their_rows(tmp_path, dtype):
    x = clip(tmp_path, dtype=dtype)
    profile, batches = read(tmp_path / "metadata", **beside(tmp_path))
    assert len(profile.slices) > 3
    assert np.array_equal(matrix(batches), x.astype(np.float32))
    assert ids_of(batches) == [f"{i:09d}" for i in range(30)]
    first = profile.fingerprint
    np.save(tmp_path / "img_emb/img_emb_1.npy", x[10:20].astype(np.int32))
    assert "of 4 x int32, expected 4 x" in refused(tmp_path / "metadata", **beside(tmp_path))
    np.save(tmp_path / "img_emb/img_emb_1.npy", x[10:20])
    assert read(tmp_path / "metadata", **beside(tmp_path))[0].fingerprint == first


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("short", "has 10 rows, and .*img_emb_1.npy has 9: they are not the same rows"),
        ("gone", "has no array .*img_emb_1.npy"),
        ("cut", "img_emb_1.npy, which is not whole: "),
        ("fortran", "must hold numbers row by row"),
        ("cube", "whose header is not that of a matrix"),
        ("objects", "must hold numbers row by row"),
        ("text", "which is no .npy file"),
    ],
)
def test_an_array_that_does_not_fit_its_parquet_file_is_told(tmp_path, how, text):
    x = clip(tmp_path)
    path = tmp_path / "img_emb/img_emb_1.npy"
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "text":
        path.write_text("no array")
    else:
        made = {
            "short": x[:9],
            "fortran": np.asfortranarray(x[:10]),
            "cube": x[None, :10],
            "objects": x[:10].astype("O"),
        }
        np.save(path, made[how], allow_pickle=True)
    assert re.search(f"metadata_1.parquet: .*{text}", refused(tmp_path / "metadata", **beside(tmp_path)))
    profile, _ = read(tmp_path / "metadata", **beside(tmp_path, on_bad_files="quarantine"))
    assert profile.num_rows == 20


def test_arrays_that_lie_there_are_told_where_no_column_holds_embeddings(tmp_path):
    clip(tmp_path)
    text = refused(tmp_path, input={"id_column": "image_path"})
    assert "3 .npy files lie there, such as " in text
    assert "set input.embedding_columns={npy: 'FOLDER/NAME_{number}.npy'}" in text
