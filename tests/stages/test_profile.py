"""profile: what it finds out, and everything it refuses before a worker starts."""

import logging
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydc.config import parse_config
from raydc.data.profile import Profile
from raydc.data.sample import profile_input
from raydc.data.slices import Column
from raydc.errors import ConfigError, DataError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.stages import profile as profiling
from raydc.storage.lake import Lake
from tests import shards
from tests.data.test_slices import LAYOUTS, damage_page, damaged


def fill(folder, num_files: int = 3, rows: int = 10, **others) -> None:
    """Write `num_files` good files of `rows` rows."""
    for number in range(num_files):
        table = shards.rows(shards.vectors(rows, seed=number), first_id=number * rows, **others)
        shards.write(folder / f"part-{number:05d}.parquet", table)


def found(folder, **sections) -> Profile:
    return profile_input(shards.settings(folder, **sections), Lake())


def refusal(folder, kind: type[Exception] = DataError, **sections) -> str:
    with pytest.raises(kind) as caught:
        found(folder, **sections)
    return str(caught.value)


def test_a_profile_knows_rows_widths_types_and_moments(tmp_path):
    fill(tmp_path)
    profile = found(tmp_path)
    assert profile.num_rows == 30
    assert profile.spec.columns == (Column(name="embedding", dim=4, dtype="float32", weight=1.0),)
    assert (profile.spec.id_type, profile.spec.dim) == ("int64", 4)
    assert [s.num_rows for s in profile.slices] == [10, 10, 10]
    assert profile.num_bytes > 30 * 16
    x = np.concatenate([shards.vectors(10, seed=n) for n in range(3)]).astype(np.float64)
    assert profile.moments.num_rows == 30
    np.testing.assert_allclose(profile.moments.mean_D, x.mean(axis=0))
    np.testing.assert_allclose(profile.moments.variance_D, x.var(axis=0))


def test_a_profile_is_whole_after_its_way_through_the_run_folder(tmp_path):
    fill(tmp_path / "in", label=[0] * 10, uri=["u"] * 10)
    config = shards.settings(tmp_path / "in", input={"label_column": "label", "carry_columns": ["uri"]})
    run = RunDir(Lake(), str(tmp_path / "runs"), "r1")
    metrics = profiling.run(config, run)
    back, first = artifacts.PROFILE.read(run), profile_input(config, Lake())
    assert (back.spec, back.slices, back.fingerprint) == (first.spec, first.slices, first.fingerprint)
    assert np.array_equal(back.moments.m2_D, first.moments.m2_D)
    assert (metrics["rows"], metrics["slices"], metrics["dim"], metrics["sampled_rows"]) == (30, 3, 4, 30)
    assert metrics["bad_files"] == []
    assert metrics["sample_rejects"] == {}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_profiled(tmp_path, layout, dtype):
    x = shards.vectors(12).astype(dtype)
    shards.write(tmp_path / "a.parquet", shards.rows(shards.column(x, layout)))
    shards.write(tmp_path / "b.parquet", shards.rows(shards.column(x, layout)).slice(0, 0))
    columns = [{"name": "embedding", "dtype": dtype if layout == "fixed_size_binary" else None}]
    profile = found(tmp_path, input={"embedding_columns": columns})
    assert profile.spec.columns == (Column(name="embedding", dim=4, dtype=dtype),)
    assert profile.num_rows == profile.moments.num_rows == 12


def test_layouts_may_differ_between_files_where_the_numbers_do_not(tmp_path):
    for number, layout in enumerate(["fixed_size_list", "list", "large_list", "fixed_shape_tensor"]):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(shards.column(shards.vectors(5), layout)))
    assert found(tmp_path).moments.num_rows == 20


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (pa.array(range(4), pa.int64()), "int64"),
        (pa.array(range(4), pa.int32()), "int64"),
        (pa.array(list("abcd")), "string"),
        (pa.array(list("abcd")).dictionary_encode(), "string"),
        (pa.array(list("abcd"), pa.large_string()), "string"),
    ],
)
def test_ids_may_be_integers_or_strings(tmp_path, ids, kind):
    shards.write(tmp_path / "a.parquet", shards.rows(shards.vectors(4), id=ids))
    assert found(tmp_path).spec.id_type == kind


def test_several_weighted_columns_become_one_row(tmp_path):
    fill(tmp_path, text=shards.column(shards.vectors(10, dim=3), "list"))
    columns = [{"name": "embedding", "weight": 2}, {"name": "text", "weight": 0.5}]
    profile = found(tmp_path, input={"embedding_columns": columns}, preprocess={"method": "l2"})
    assert profile.spec.blocks == [(0, 4, 2.0), (4, 7, 0.5)]
    assert profile.spec.refuse_zero_norm
    assert profile.moments.mean_D.shape == (7,)


def test_float64_is_rounded_aloud(tmp_path, caplog):
    shards.write(tmp_path / "a.parquet", shards.rows(shards.vectors(4).astype(np.float64)))
    found(tmp_path)
    assert "float64 embeddings are rounded to float32" in caplog.text


def test_a_sample_reads_only_what_it_needs(tmp_path):
    fill(tmp_path, num_files=5, rows=100)
    profile = found(tmp_path, input={"sample_rows": 50})
    assert profile.num_rows == 500
    assert 50 <= profile.moments.num_rows <= 55
    again = found(tmp_path, input={"sample_rows": 50})
    assert np.array_equal(again.moments.mean_D, profile.moments.mean_D)


def test_the_fingerprint_follows_the_data(tmp_path):
    fill(tmp_path)
    first = found(tmp_path).fingerprint
    assert found(tmp_path).fingerprint == first
    assert found(tmp_path, input={"sample_rows": 5}).fingerprint == first
    shards.write(tmp_path / "part-00002.parquet", shards.rows(shards.vectors(10, seed=9), first_id=20))
    second = found(tmp_path).fingerprint
    assert second != first
    shards.write(tmp_path / "part-00003.parquet", shards.rows(shards.vectors(1)))
    assert found(tmp_path).fingerprint not in (first, second)


def test_preprocessing_takes_its_statistics_from_the_sample(tmp_path):
    fill(tmp_path)
    config = shards.settings(tmp_path, preprocess={"method": "standardize"})
    profile = profile_input(config, Lake())
    np.testing.assert_allclose(profile.preprocess(config).mean_D, profile.moments.mean_D, rtol=1e-6)


def test_scale_of_rows_that_are_all_zero_is_refused(tmp_path):
    shards.write(tmp_path / "a.parquet", shards.rows(np.zeros((8, 4), np.float32)))
    config = shards.settings(tmp_path, preprocess={"method": "scale"})
    with pytest.raises(DataError, match="profile: preprocess.method=scale: every row of the sample is zero"):
        profile_input(config, Lake()).preprocess(config)


# What is refused, by its text.


def test_no_files_are_refused(tmp_path):
    assert f"input.path={tmp_path}: no Parquet file there" in refusal(tmp_path)


def test_files_without_any_row_are_refused(tmp_path):
    fill(tmp_path, rows=0)
    assert refusal(tmp_path) == f"profile: input.path={tmp_path}: no rows in 3 files"


def test_more_leaves_than_rows_are_refused(tmp_path):
    fill(tmp_path)
    text = refusal(tmp_path, ConfigError, cluster={"num_leaves": 31})
    assert text == (
        "cluster.num_leaves=31 exceeds the 30 rows of the input. Lower num_leaves, or point input.path at more data."
    )
    assert found(tmp_path, cluster={"num_leaves": 30}).num_rows == 30


def test_an_image_shape_of_another_size_is_refused(tmp_path):
    fill(tmp_path)
    text = refusal(tmp_path, ConfigError, input={"image_shape": [2, 3]})
    assert text == "input.image_shape=[2, 3] does not hold 4 values."
    assert found(tmp_path, input={"image_shape": [2, 2]}).num_rows == 30


def test_a_missing_column_is_refused_with_those_that_exist(tmp_path):
    fill(tmp_path, num_files=1)
    text = refusal(tmp_path, input={"embedding_columns": "vector", "id_column": "key", "label_column": "class"})
    assert "column 'vector': no file holds usable embeddings in it" in text
    assert "has no column 'vector' (columns: id, embedding)" in text
    assert "has no column 'key' for the id (columns: id, embedding)" in text
    assert "has no column 'class' in any file (columns: id, embedding)" in text


def test_a_column_that_is_missing_in_one_file_names_the_file(tmp_path):
    fill(tmp_path)
    path = tmp_path / "part-00001.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["id", "vector"]), path)
    assert refusal(tmp_path) == (
        f"profile: {path}: has no column 'embedding' (columns: id, vector). "
        "Fix the export, or set input.on_bad_files=quarantine"
    )


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array(["a"] * 5), "column 'embedding' holds text without any numbers in "),
        (pa.array([[["a"]]] * 5), "column 'embedding' holds lists of list<element: string>, expected numbers"),
        (pa.array([b"12345678"] * 5, pa.binary(8)), "is fixed_size_binary; set its element type"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(tmp_path, column, text):
    shards.write(tmp_path / "a.parquet", shards.rows(column))
    assert text in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "section", "text"),
    [
        ({"id": pa.array([1.0] * 10)}, {}, "id column 'id' is double, expected integers, text, a UUID, bytes"),
        ({"id": pa.array([[1]] * 10)}, {}, "SELECT * REPLACE (id::VARCHAR AS id) FROM 'IN/*.parquet'"),
        ({"y": [[1.0]] * 10}, {"label_column": "y"}, "label column 'y' is list<element: double>, expected numbers or"),
        ({"y": ["a"] * 10}, {"weight_column": "y"}, "weight column 'y' is string, expected numbers"),
    ],
)
def test_id_label_and_weight_of_the_wrong_type_are_refused(tmp_path, changes, section, text):
    fill(tmp_path, **changes)
    assert text in refusal(tmp_path, input=section)


def forty_first(folder, table: pa.Table, **options) -> str:
    """Write 40 good files and this one after them; Ray samples 16 files for the schema and would not see it."""
    fill(folder, num_files=40, rows=2, label=[0, 1], uri=["a", "b"])
    path = folder / "part-00040.parquet"
    shards.write(path, table, **options)
    return str(path)


OTHERS = {"label": [0, 1], "uri": ["a", "b"]}
USED = {"label_column": "label", "carry_columns": ["uri"]}


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (shards.rows(shards.vectors(2, dim=5), **OTHERS), "column 'embedding' holds 5 x float32, expected 4 x float32"),
        (
            shards.rows(shards.column(shards.vectors(2, dim=3), "list"), **OTHERS),
            "column 'embedding' holds 3 x float32, expected 4 x float32",
        ),
        (
            shards.rows(shards.column(shards.vectors(2).astype(np.int8)), **OTHERS),
            "column 'embedding' holds int8, and most files do not",
        ),
        (shards.rows(pa.array([["a"], ["b"]]), **OTHERS), "column 'embedding' holds lists of string, expected numbers"),
        (shards.rows(shards.vectors(2), id=["a", "b"], **OTHERS), "id column 'id' is string, expected int64"),
    ],
)
def test_a_change_in_the_41st_file_is_refused_or_its_file_left_out(tmp_path, caplog, table, text):
    path = forty_first(tmp_path, table)
    refused = refusal(tmp_path, input=USED)
    assert refused == f"profile: {path}: {text}{refused[len(f'profile: {path}: {text}') :]}"
    assert refused.endswith(". Fix the export, or set input.on_bad_files=quarantine")
    profile = found(tmp_path, input=USED | {"on_bad_files": "quarantine"})
    assert profile.num_rows == 80
    (bad,) = profile.bad_files
    assert (bad["uri"], bad["rows"]) == (path, 2)
    assert text in bad["problem"]
    assert f"left out {path} (2 rows)" in caplog.text


def test_a_list_in_the_40th_file_whose_rows_differ_is_refused_with_advice(tmp_path):
    path = forty_first(tmp_path, shards.rows(pa.array([[1, 2, 3, 4], [5.0]], pa.list_(pa.float32())), **OTHERS))
    assert f"{path}: column 'embedding' has rows of different lengths, or missing ones (5 values in 2 rows)" in refusal(
        tmp_path
    )
    assert "Set input.on_bad_rows=quarantine to leave the wrong ones out" in refusal(tmp_path)
    profile = found(tmp_path, input={"on_bad_rows": "quarantine"})
    assert profile.num_rows == 82
    assert profile.sample_rejects == {"wrong_length": 1}


@pytest.mark.parametrize("how", ["truncated", "wrong magic", "empty", "garbage"])
def test_an_unreadable_file_is_refused_or_left_out(tmp_path, how):
    fill(tmp_path)
    path = tmp_path / "part-00001.parquet"
    damaged(path, how)
    text = refusal(tmp_path)
    assert text.startswith(f"profile: {path}: cannot be read: ")
    assert text.endswith("set input.on_bad_files=quarantine")
    profile = found(tmp_path, input={"on_bad_files": "quarantine"})
    assert profile.num_rows == 20
    assert [(b["uri"], b["rows"]) for b in profile.bad_files] == [(str(path), None)]


def test_when_no_file_is_good_each_says_why_even_under_quarantine(tmp_path):
    fill(tmp_path, num_files=2)
    damaged(tmp_path / "part-00000.parquet", "truncated")
    shards.write(tmp_path / "part-00001.parquet", shards.rows(shards.vectors(4)).rename_columns(["key", "embedding"]))
    shards.write(tmp_path / "part-00002.parquet", shards.rows(shards.vectors(0)))
    text = refusal(tmp_path, input={"on_bad_files": "quarantine"})
    assert "part-00000.parquet: cannot be read: " in text
    assert "part-00001.parquet: has no column 'id' for the id (columns: key, embedding)" in text


def test_a_damaged_page_is_refused_or_counted_in_the_sample(tmp_path):
    fill(tmp_path)
    damage_page(tmp_path / "part-00001.parquet", 0)
    assert re.search("profile: .*part-00001.parquet cannot be read beyond row 0", refusal(tmp_path))
    profile = found(tmp_path, input={"on_bad_files": "quarantine"})
    assert profile.sample_rejects == {"unreadable_file": 10}
    assert profile.moments.num_rows == 20
    assert profile.num_rows == 30


def test_bad_rows_under_fail_are_counted_and_the_first_is_named(tmp_path):
    fill(tmp_path)
    x = shards.vectors(10)
    x[3, 0], x[7, 1] = np.nan, np.inf
    path = shards.write(tmp_path / "part-00001.parquet", shards.rows(x, first_id=100))
    assert refusal(tmp_path) == (
        f"profile: {path} row 3 (id 103) is bad: not_finite. Bad rows in the sample: 2 not_finite. "
        "Fix the export, or set input.on_bad_rows=quarantine"
    )


def test_bad_rows_under_quarantine_stay_out_of_the_moments(tmp_path, caplog):
    fill(tmp_path)
    x = shards.vectors(10)
    x[3, 0] = np.nan
    shards.write(tmp_path / "part-00001.parquet", shards.rows(x))
    with caplog.at_level(logging.WARNING):
        profile = found(tmp_path, input={"on_bad_rows": "quarantine"})
    assert profile.sample_rejects == {"not_finite": 1}
    assert profile.moments.num_rows == 29
    assert np.isfinite(profile.moments.mean_D).all()
    assert "bad rows in the sample, to be quarantined: {'not_finite': 1}" in caplog.text


def test_zero_norm_is_refused_under_l2_only(tmp_path):
    x = shards.vectors(10) + 100
    x[4] = 0
    shards.write(tmp_path / "a.parquet", shards.rows(x))
    assert found(tmp_path).moments.num_rows == 10
    assert "row 4 (id 4) is bad: zero_norm" in refusal(tmp_path, preprocess={"method": "l2"})


def test_a_sample_without_a_usable_row_is_refused(tmp_path):
    shards.write(tmp_path / "a.parquet", shards.rows(np.full((6, 4), np.nan, np.float32)))
    assert refusal(tmp_path, input={"on_bad_rows": "quarantine"}) == (
        f"profile: input.path={tmp_path}: no usable row in the sample (6 not_finite). Fix the export"
    )


def test_rows_whose_mean_length_is_whole_by_chance_do_not_hide_the_true_one(tmp_path):
    # 13 rows of 14 values but for a missing one: 12 x 14 + 1 = 13 x 13.
    column = pa.array([None, *shards.vectors(12, dim=14).tolist()], pa.list_(pa.float32()))
    shards.write(tmp_path / "a.parquet", shards.rows(column))
    alone = found(tmp_path, input={"on_bad_rows": "quarantine"})
    assert (alone.spec.dim, alone.sample_rejects) == (14, {"missing": 1})
    assert "has rows of different lengths, or missing ones (169 values in 13 rows)" in refusal(tmp_path)
    for name in ("b", "c"):
        shards.write(tmp_path / f"{name}.parquet", shards.rows(shards.column(shards.vectors(3, dim=14), "list")))
    together = found(tmp_path, input={"on_bad_rows": "quarantine"})
    assert (together.spec.dim, together.num_rows, together.sample_rejects) == (14, 19, {"missing": 1})


def test_a_file_whose_rows_are_all_missing_is_no_bad_file(tmp_path):
    fill(tmp_path, num_files=2)
    shards.write(tmp_path / "z.parquet", shards.rows(pa.nulls(5, pa.list_(pa.float32()))))
    profile = found(tmp_path, input={"on_bad_rows": "quarantine"})
    assert profile.sample_rejects == {"missing": 5}
    assert profile.num_rows == 25


def test_empty_files_of_another_width_do_not_decide_the_width(tmp_path):
    for number in range(3):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(shards.vectors(0, dim=9)))
    shards.write(
        tmp_path / "full.parquet", shards.rows(pa.array([[1, 2], [3, 4], [5, 6], [7.0]], pa.list_(pa.float32())))
    )
    assert found(tmp_path, cluster={"num_leaves": 2}, input={"on_bad_rows": "quarantine"}).spec.dim == 2


def test_all_problems_are_told_in_one_message(tmp_path):
    fill(tmp_path, num_files=6)
    damaged(tmp_path / "part-00001.parquet", "truncated")
    shards.write(tmp_path / "part-00002.parquet", shards.rows(shards.vectors(10, dim=5)))
    shards.write(tmp_path / "part-00003.parquet", shards.rows(shards.vectors(10), id=["a"] * 10))
    lines = refusal(tmp_path, cluster={"num_leaves": 500}, input={"image_shape": [3, 3]}).splitlines()
    assert lines[0] == "profile: 5 problems"
    assert "part-00001.parquet: cannot be read" in lines[1]
    assert "part-00002.parquet: column 'embedding' holds 5 x float32, expected 4 x float32" in lines[2]
    assert "part-00003.parquet: id column 'id' is string, expected int64" in lines[3]
    assert "cluster.num_leaves=500 exceeds the 30 rows of the input" in lines[4]
    assert "input.image_shape=[3, 3] does not hold 4 values" in lines[5]
    assert len(lines) == 6


def test_a_file_with_several_problems_is_told_once(tmp_path):
    fill(tmp_path)
    shards.write(tmp_path / "part-00001.parquet", shards.rows(shards.vectors(10, dim=5), id=["a"] * 10))
    assert (
        "part-00001.parquet: column 'embedding' holds 5 x float32, expected 4 x float32; id column 'id' is"
        in refusal(tmp_path)
    )


def test_a_long_list_of_problems_is_cut_with_its_count(tmp_path):
    fill(tmp_path, num_files=40, rows=3)
    for path in sorted(tmp_path.iterdir())[:33]:
        damaged(path, "truncated")
    lines = refusal(tmp_path).splitlines()
    assert lines[0] == "profile: 33 problems"
    assert len(lines) == 22
    assert lines[-1] == "  and 13 more"


def test_carried_columns_that_fit_into_one_table_may_differ(tmp_path):
    for number, type_ in enumerate([pa.int64(), pa.int32(), pa.null()]):
        n = pa.array([None] * 5, type_)
        shards.write(tmp_path / f"{number}.parquet", shards.rows(shards.vectors(5), n=n))
    assert found(tmp_path, input={"carry_columns": ["n"]}).num_rows == 15


def test_labels_of_several_types_are_accepted(tmp_path):
    labels = [pa.array([1, 2]), pa.array(["a", "b"]), pa.array(["a", "a"]).dictionary_encode(), pa.array([True, False])]
    for number, label in enumerate(labels):
        shards.write(tmp_path / f"{number}.parquet", shards.rows(shards.vectors(2), label=label))
    assert found(tmp_path, input={"label_column": "label"}).num_rows == 8


def test_a_list_of_paths_is_one_input(tmp_path):
    fill(tmp_path / "x")
    fill(tmp_path / "y")
    config = parse_config(
        {
            "input": {"path": [f"{tmp_path}/x/*-00000.parquet", f"{tmp_path}/y"]},
            "cluster": {"num_leaves": 4},
            "fit": {"objective": "kmeans"},
        }
    )
    profile = profile_input(config, Lake())
    assert [s.name for s in profile.slices] == ["x/part-00000.parquet", *(f"y/part-{i:05d}.parquet" for i in range(3))]


def test_embeddings_under_another_name_are_to_be_named(tmp_path):
    rows = shards.rows(shards.vectors(8)).rename_columns({"embedding": "features"})
    shards.write(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"columns: id, features\).* Name the columns .* in input.embedding_columns"):
        profile_input(shards.settings(tmp_path), Lake())
