"""The labeling of slices, without Ray: rows in = labels + rejects, resume, statistics and exemplars."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raydc.core.metrics import scores
from raydc.core.metrics.partition_stats import Tally
from raydc.data.columns import class_names
from raydc.data.sample import profile_input
from raydc.data.schema import labels_schema, rejects_schema
from raydc.data.slices import Column, InputSpec, Slice
from raydc.data.statistics import Statistics, nearest_rows
from raydc.errors import DataError
from raydc.labeling.label_slice import Labeling, completed, label_slice
from raydc.runfolder import artifacts
from raydc.storage.lake import Lake
from tests import shards
from tests.data.test_shapes import IDS
from tests.data.test_slices import damage_page

SPEC = InputSpec(
    columns=(Column(name="embedding", dim=2, dtype="float32"),),
    id_column="id",
    id_type="int64",
    on_bad_rows="quarantine",
)


def job(output: Path, **changes: Any) -> Labeling:
    fields: dict[str, Any] = {
        "lake": Lake(),
        "output": str(output),
        "spec": SPEC,
        "model": shards.corner_model(),
        "group_centers": shards.group_centers(),
        "block_rows": 16,
    }
    return Labeling(**(fields | changes))


def slices(folder: Path, **changes: Any) -> list[Slice]:
    section = {"on_bad_rows": "quarantine", "on_bad_files": "quarantine"} | changes
    return profile_input(shards.settings(folder, input=section), Lake()).slices


def fill(folder: Path, num: int = 100, num_files: int = 3, **others: Any) -> tuple[np.ndarray, np.ndarray]:
    """Write rows beside the corners into files, an empty one among them; return rows and corners."""
    x, leaf = shards.near_corners(num)
    for number, part in enumerate(np.array_split(np.arange(num), num_files)):
        own = {name: pa.array(np.asarray(values)[part]) for name, values in others.items()}
        shards.write(folder / f"part-{number}.parquet", shards.rows(x[part], int(part[0]), **own), row_group_size=10)
    empty = {name: pa.array(np.asarray(values)[:0]) for name, values in others.items()}
    shards.write(folder / "part-0-empty.parquet", shards.rows(x[:0], **empty))
    return x, leaf


def written(folder: Path, kind: str = "labels") -> pa.Table:
    files = sorted((folder / kind).rglob("*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files])


def spoil(path: Path, rows: dict[int, Any]) -> None:
    """Give some rows of a file another vector."""
    table = pq.read_table(path)
    vectors = table["embedding"].to_pylist()
    for row, value in rows.items():
        vectors[row] = value
    shards.write(path, table.set_column(1, "embedding", pa.array(vectors, pa.list_(pa.float32()))), row_group_size=10)


def test_every_row_gets_a_label_in_the_order_of_the_input(tmp_path):
    x, leaf = fill(tmp_path / "in")
    total = shards.label_all(job(tmp_path / "out"), slices(tmp_path / "in"))
    assert (total.rows, total.labels, total.rejects) == (100, 100, 0)
    table = written(tmp_path / "out")
    assert table.schema == labels_schema(pa.int64(), [2])
    assert table["id"].to_pylist() == list(range(100))
    assert table["leaf"].to_pylist() == leaf.tolist()
    assert table["level_2"].to_pylist() == (leaf // 2).tolist()
    np.testing.assert_allclose(table["distance"], np.linalg.norm(x - shards.CORNERS[leaf], axis=1), rtol=1e-5)
    assert min(table["confidence"].to_pylist()) > 0.5
    assert all(a != b for a, b in zip(table["leaf"].to_pylist(), table["second_leaf"].to_pylist(), strict=True))
    assert not (tmp_path / "out" / "rejects").exists()


def test_each_input_file_has_its_label_file_even_an_empty_one(tmp_path):
    fill(tmp_path / "in")
    shards.label_all(job(tmp_path / "out"), slices(tmp_path / "in"))
    names = sorted(p.name for p in (tmp_path / "out" / "labels").iterdir())
    assert names == ["part-0-empty.parquet", "part-0.parquet", "part-1.parquet", "part-2.parquet"]
    empty = pq.read_table(tmp_path / "out" / "labels" / "part-0-empty.parquet")
    assert (empty.num_rows, empty.schema) == (0, labels_schema(pa.int64(), [2]))
    assert sorted(p.name for p in (tmp_path / "out" / "slices").iterdir()) == [n[:-8] + ".npz" for n in names]


def test_a_split_file_has_one_label_file_for_each_slice(tmp_path):
    fill(tmp_path / "in", num_files=1)
    parts = slices(tmp_path / "in", slice_bytes=1)
    assert len(parts) == 11
    shards.label_all(job(tmp_path / "out"), parts)
    assert written(tmp_path / "out")["id"].to_pylist() == list(range(100))
    names = {p.name for p in (tmp_path / "out" / "labels").iterdir()}
    assert names == {"part-0-empty.parquet", *(f"part-0-{i:05d}.parquet" for i in range(10))}


@pytest.mark.parametrize("num_bad", [0, 1, 37])
def test_rows_in_are_labels_and_rejects(tmp_path, num_bad):
    fill(tmp_path / "in", num_files=2)
    kinds = [None, [1.0], [1.0, 2.0, 3.0], [np.nan, 0.0], [0.0, np.inf]]
    reasons = ["missing", "wrong_length", "wrong_length", "not_finite", "not_finite"]
    rows = np.random.default_rng(0).permutation(100)[:num_bad].tolist()
    for number in range(2):
        own = {row - 50 * number: kinds[i % 5] for i, row in enumerate(rows) if row // 50 == number}
        spoil(tmp_path / "in" / f"part-{number}.parquet", own)
    total = shards.label_all(job(tmp_path / "out"), slices(tmp_path / "in"))
    assert (total.rows, total.labels, total.rejects) == (100, 100 - num_bad, num_bad)
    assert written(tmp_path / "out")["id"].to_pylist() == sorted(set(range(100)) - set(rows))
    assert total.tallies["leaf"].num_rows == total.tallies["level_2"].num_rows == 100 - num_bad
    if not num_bad:
        return
    rejects = written(tmp_path / "out", "rejects")
    assert rejects.schema == rejects_schema(pa.int64())
    expected = {row: reasons[i % 5] for i, row in enumerate(rows)}
    found = {r["id"]: r["reason"] for r in rejects.to_pylist()}
    assert found == expected
    for reject in rejects.to_pylist():
        number = reject["id"] // 50
        assert (reject["slice"], reject["row"]) == (f"part-{number}.parquet", reject["id"] - 50 * number)


def test_a_file_of_bad_rows_only_has_an_empty_label_file(tmp_path):
    fill(tmp_path / "in", num=40, num_files=2)
    spoil(tmp_path / "in" / "part-1.parquet", dict.fromkeys(range(20)))
    total = shards.label_all(job(tmp_path / "out"), slices(tmp_path / "in"))
    assert (total.labels, total.rejects) == (20, 20)
    assert pq.read_table(tmp_path / "out" / "labels" / "part-1.parquet").num_rows == 0


def test_under_fail_a_bad_row_stops_the_slice_and_leaves_nothing_behind(tmp_path):
    fill(tmp_path / "in", num_files=1)
    parts = slices(tmp_path / "in")
    spoil(tmp_path / "in" / "part-0.parquet", {77: [np.nan, 0.0]})
    strict = job(tmp_path / "out", spec=dataclasses.replace(SPEC, on_bad_rows="fail"))
    with pytest.raises(DataError, match=r"part-0.parquet row 77 \(id 77\) is bad: not_finite"):
        label_slice(strict, parts[0] if parts[0].num_rows else parts[1])
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_a_damaged_page_loses_no_row_from_the_count(tmp_path):
    fill(tmp_path / "in", num_files=2)
    damage_page(tmp_path / "in" / "part-0.parquet", 3)
    parts = slices(tmp_path / "in")
    quarantine = job(tmp_path / "out", spec=dataclasses.replace(SPEC, on_bad_files="quarantine"), block_rows=10)
    total = shards.label_all(quarantine, parts)
    assert (total.rows, total.labels, total.rejects) == (100, 90, 10)
    rejects = written(tmp_path / "out", "rejects")
    assert rejects["row"].to_pylist() == list(range(30, 40))
    assert set(rejects["reason"].to_pylist()) == {"unreadable_file"}
    with pytest.raises(DataError, match="cannot be read beyond row 30"):
        shards.label_all(job(tmp_path / "strict", block_rows=10), parts)


def test_a_complete_slice_is_not_done_again(tmp_path):
    fill(tmp_path / "in")
    parts = slices(tmp_path / "in")
    first = shards.label_all(job(tmp_path / "out"), parts)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    again = shards.label_all(job(tmp_path / "out"), parts)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (again.rows, again.labels) == (first.rows, first.labels)
    assert np.array_equal(again.tallies["leaf"].rows_K, first.tallies["leaf"].rows_K)


def test_a_slice_that_was_interrupted_before_its_statistics_is_done_again_whole(tmp_path):
    fill(tmp_path / "in")
    spoil(tmp_path / "in" / "part-1.parquet", {3: None})
    parts = slices(tmp_path / "in")
    shards.label_all(job(tmp_path / "out"), parts)
    whole = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.parquet")}
    (tmp_path / "out" / "slices" / "part-1.npz").unlink()
    (tmp_path / "out" / "labels" / "part-1.parquet").write_bytes(b"half")
    total = shards.label_all(job(tmp_path / "out"), parts)
    assert (total.rows, total.labels, total.rejects) == (100, 99, 1)
    assert {p: p.read_bytes() for p in whole} == whole


def test_damaged_statistics_of_a_complete_slice_are_refused_where_the_slice_is_known(tmp_path):
    fill(tmp_path / "in")
    part = slices(tmp_path / "in")[0]
    label_slice(job(tmp_path / "out"), part)
    Path(artifacts.SLICES.of(part).uri(job(tmp_path / "out").place)).write_bytes(b"no statistics")
    with pytest.raises(DataError, match="statistics of the labels: damaged"):
        completed(job(tmp_path / "out"), part)


def test_the_same_job_writes_the_same_bytes_whatever_the_block_size(tmp_path):
    fill(tmp_path / "in")
    spoil(tmp_path / "in" / "part-1.parquet", {3: None})
    parts = slices(tmp_path / "in")
    for name, block_rows in (("first", 16), ("second", 16), ("third", 1000)):
        shards.label_all(job(tmp_path / name, block_rows=block_rows), parts)
    for path in (tmp_path / "first").rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
    for kind in ("labels", "rejects"):
        assert written(tmp_path / "third", kind).equals(written(tmp_path / "first", kind))


def test_the_order_of_slices_does_not_matter(tmp_path):
    _, leaf = fill(tmp_path / "in", label=np.arange(100) % 3)
    parts = slices(tmp_path / "in")
    labeled = dataclasses.replace(SPEC, label_column="label")
    forth = shards.label_all(job(tmp_path / "forth", spec=labeled), parts)
    back = shards.label_all(job(tmp_path / "back", spec=labeled), reversed(parts))
    tables = [statistics.tallies["leaf"].classes.table()[0].toarray() for statistics in (forth, back)]
    assert np.array_equal(*tables)
    assert forth.exemplars.equals(back.exemplars)
    assert written(tmp_path / "back").equals(written(tmp_path / "forth"))
    assert np.array_equal(forth.tallies["leaf"].rows_K, np.bincount(leaf, minlength=4))


def test_statistics_give_the_metrics_of_the_label_files(tmp_path):
    x, leaf = fill(tmp_path / "in", label=shards.near_corners(100)[1])
    labeled = dataclasses.replace(SPEC, label_column="label")
    total = shards.label_all(job(tmp_path / "out", spec=labeled), slices(tmp_path / "in", label_column="label"))
    assert set(total.tallies) == {"leaf", "level_2"}
    assert scores.external(total.tallies["leaf"].classes.table()[0])["acc"] == 1.0
    assert total.tallies["leaf"].classes.table()[1] == ["0", "1", "2", "3"]
    distances = np.linalg.norm(x[:, None] - shards.CORNERS, axis=2)
    ordered = np.sort(distances, axis=1)
    silhouette = ((ordered[:, 1] - ordered[:, 0]) / ordered[:, 1]).mean()
    assert scores.internal(total.tallies["leaf"])["silhouette"] == pytest.approx(silhouette, rel=1e-5)
    to_groups = np.linalg.norm(x[:, None] - shards.group_centers()[2], axis=2)
    own = to_groups[np.arange(100), leaf // 2]
    np.testing.assert_allclose(total.tallies["level_2"].distance_K, np.bincount(leaf // 2, own, minlength=2), rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, None, 3]), ["1", "", "3"]),
        (pa.array(["a", "", None]), ["a", "", ""]),
        (pa.array(["b", "a", None]).dictionary_encode(), ["b", "a", ""]),
        (pa.array(["b", "a"], pa.large_string()), ["b", "a"]),
        (pa.array([True, False]), ["true", "false"]),
    ],
)
def test_classes_are_text_and_missing_ones_are_empty(labels, expected):
    assert class_names(labels).tolist() == expected
    assert class_names(None) is None


def test_a_very_long_class_takes_no_more_room_than_another_and_stays_a_class_of_its_own(tmp_path):
    # As an array of numpy, 2,000 rows with one label of 3 million characters would take 24 GB.
    names = ["a", "b"] * 998 + ["long" * 750_000, "long" * 750_000 + "!", "x" * 200, "long" * 750_000]
    fill(tmp_path / "in", num=2000, num_files=1, label=np.array(names, dtype=object))
    labeled = dataclasses.replace(SPEC, label_column="label")
    total = shards.label_all(job(tmp_path / "out", spec=labeled, block_rows=2000), slices(tmp_path / "in"))
    table, found = total.tallies["leaf"].classes.table()
    counts = dict(zip(found, table.sum(axis=0).tolist(), strict=True))
    assert max(map(len, found)) == 200
    assert sorted(counts.values()) == [1, 1, 2, 998, 998]
    assert counts["x" * 200] == 1


def test_nested_and_dictionary_encoded_columns_are_carried_and_others_left_alone(tmp_path):
    x, _ = shards.near_corners(40)
    for number, index in enumerate((pa.int8(), pa.int32())):
        rows = range(20 * number, 20 * number + 20)
        nested = pa.array([{"a": [i], "b": {"c": "t" * i}} for i in rows])
        kind = pa.array([f"kind-{i % 3}" for i in rows]).dictionary_encode().cast(pa.dictionary(index, pa.string()))
        text = pa.array(["z" * (1_000_000 if i == 7 else 1) for i in rows])
        table = shards.rows(x[rows.start : rows.stop], rows.start, nested=nested, kind=kind, text=text, other=nested)
        shards.write(tmp_path / "in" / f"{number}.parquet", table)
    spec = dataclasses.replace(SPEC, carry_columns=("nested", "kind", "text"))
    parts = slices(tmp_path / "in", carry_columns=["nested", "kind", "text"])
    total = shards.label_all(job(tmp_path / "out", spec=spec, num_exemplars=40), parts)
    assert total.labels == 40
    pq.write_table(Statistics.from_bytes(total.to_bytes()).exemplars, tmp_path / "exemplars.parquet")
    for row in pq.read_table(tmp_path / "exemplars.parquet").to_pylist():
        i = row["key"]
        assert row["nested"] == {"a": [i], "b": {"c": "t" * i}}
        assert (row["kind"], len(row["text"])) == (f"kind-{i % 3}", 1_000_000 if i == 7 else 1)


def test_rows_of_unknown_class_are_labeled_but_not_counted_as_a_class(tmp_path):
    labels = np.array(["even", None] * 50, dtype=object)
    fill(tmp_path / "in", label=labels)
    labeled = dataclasses.replace(SPEC, label_column="label")
    total = shards.label_all(job(tmp_path / "out", spec=labeled), slices(tmp_path / "in"))
    table, names = total.tallies["leaf"].classes.table()
    assert (names, int(table.sum())) == (["even"], 50)
    assert total.tallies["leaf"].num_rows == 100


def test_the_nearest_rows_of_each_leaf_are_kept_with_what_they_carry(tmp_path):
    uris = np.array([f"s3://bucket/{i}" for i in range(100)])
    x, leaf = fill(tmp_path / "in", uri=uris)
    carrying = dataclasses.replace(SPEC, carry_columns=("uri", "id"))
    total = shards.label_all(
        job(tmp_path / "out", spec=carrying, num_exemplars=3, keep_vectors=True, block_rows=7), slices(tmp_path / "in")
    )
    kept = total.exemplars.to_pylist()
    distances = np.linalg.norm(x - shards.CORNERS[leaf], axis=1)
    for k in range(4):
        rows = np.flatnonzero(leaf == k)
        nearest = rows[np.argsort(distances[rows], kind="stable")][:3].tolist()
        assert [e["key"] for e in kept if e["leaf"] == k] == nearest
    for e in kept:
        assert (e["id"], e["uri"]) == (e["key"], uris[e["key"]])
        assert e["embedding"] == x[e["key"]].tolist()


def test_equal_distances_are_kept_by_key():
    table = pa.table({"leaf": [1, 0, 0, 0, 1], "distance": [2.0, 1.0, 1.0, 0.5, 2.0], "key": [9, 4, 3, 8, 2]})
    assert nearest_rows(table, 2)["key"].to_pylist() == [8, 3, 2, 9]
    assert nearest_rows(None, 2) is None


def test_a_sample_is_compared_with_the_baselines(tmp_path):
    fill(tmp_path / "in", num=400)
    parts = slices(tmp_path / "in")
    shifted = shards.corner_model(centers_KL=torch.tensor([[0.0, 5.0], [10.0, 5.0]]), levels={})
    sampled = {"baselines": {"raw_kmeans": shifted}, "baseline_fraction": 0.5, "map_fraction": 0.1, "seed": 3}
    sampled |= {"neighbor_fraction": 0.3}
    total = shards.label_all(job(tmp_path / "out", **sampled), parts)
    learned, raw = total.tallies["learned"], total.tallies["raw_kmeans"]
    assert learned.num_rows == raw.num_rows == pytest.approx(200, abs=40)
    assert len(raw.rows_K) == 2
    drawn = total.map_rows.to_pydict()
    assert len(drawn["key"]) == pytest.approx(40, abs=20)
    table = written(tmp_path / "out").to_pydict()
    assert [table["leaf"][k] for k in drawn["key"]] == drawn["leaf"]
    assert drawn["id"] == drawn["key"]
    near = total.near_rows.sort_by("key").to_pydict()
    assert len(near["key"]) == pytest.approx(120, abs=40) and set(drawn["key"]) <= set(near["key"])
    x = shards.near_corners(400)[0]
    np.testing.assert_array_equal(np.array(near["x"], np.float32), x[near["key"]])
    assert near["learned"] == [table["leaf"][k] for k in near["key"]]
    assert near["raw_kmeans"] == (x[near["key"], 0] > 5).astype(int).tolist()
    again = shards.label_all(job(tmp_path / "again", block_rows=1000, **sampled), list(reversed(parts)))
    assert again.tallies["learned"].num_rows == learned.num_rows
    assert sorted(again.map_rows["key"].to_pylist()) == sorted(drawn["key"])


def test_statistics_are_whole_after_their_way_through_bytes(tmp_path):
    fill(tmp_path / "in", label=np.arange(100) % 3)
    labeled = dataclasses.replace(SPEC, label_column="label")
    total = shards.label_all(
        job(tmp_path / "out", spec=labeled, baseline_fraction=0.5, map_fraction=0.5, neighbor_fraction=0.5),
        slices(tmp_path / "in"),
    )
    back = Statistics.from_bytes(total.to_bytes())
    assert (back.rows, back.labels, back.rejects) == (total.rows, total.labels, total.rejects)
    assert back.exemplars.equals(total.exemplars)
    assert back.map_rows.equals(total.map_rows) and back.near_rows.equals(total.near_rows)
    assert list(back.tallies) == list(total.tallies)
    for name, tally in total.tallies.items():
        assert isinstance(back.tallies[name], Tally)
        tables = [one.classes.table()[0].toarray() for one in (back.tallies[name], tally)]
        assert np.array_equal(*tables)
        assert np.array_equal(back.tallies[name].silhouette_K, tally.silhouette_K)
    nothing = Statistics.from_bytes(Statistics().to_bytes())
    assert (nothing.rows, nothing.tallies, nothing.exemplars) == (0, {}, None)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["fixed_size_list", "large_list", "fixed_size_binary"])
def test_every_layout_gives_the_same_labels(tmp_path, caplog, layout, dtype):
    x, leaf = shards.near_corners(60)
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(shards.column(x.astype(dtype), layout)))
    spec = dataclasses.replace(SPEC, columns=(Column(name="embedding", dim=2, dtype=dtype),))
    with caplog.at_level(logging.ERROR):
        columns = [{"name": "embedding", "dtype": dtype if layout == "fixed_size_binary" else None}]
        shards.label_all(job(tmp_path / "out", spec=spec), slices(tmp_path / "in", embedding_columns=columns))
    assert written(tmp_path / "out")["leaf"].to_pylist() == leaf.tolist()


def test_ids_may_be_dictionary_encoded_strings(tmp_path):
    x, _ = shards.near_corners(20)
    ids = pa.array([f"row-{i}" for i in range(20)]).dictionary_encode()
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(x, id=ids))
    spec = dataclasses.replace(SPEC, id_type="string")
    shards.label_all(job(tmp_path / "out", spec=spec), slices(tmp_path / "in"))
    table = written(tmp_path / "out")
    assert table.schema.field("id").type == pa.string()
    assert table["id"].to_pylist() == ids.to_pylist()


@pytest.mark.parametrize("kind", IDS)
def test_labels_are_joined_back_to_the_input_by_ids_of_any_type(tmp_path, kind):
    duckdb = pytest.importorskip("duckdb")
    x, leaf = shards.near_corners(6)
    x[4, 0] = np.nan
    shards.write(tmp_path / "in" / "a.parquet", shards.rows(x, id=IDS[kind], corner=leaf))
    spec = dataclasses.replace(SPEC, id_type=kind)
    total = shards.label_all(job(tmp_path / "out", spec=spec), slices(tmp_path / "in"))
    assert written(tmp_path / "out")["id"].to_pylist() == [i for n, i in enumerate(IDS[kind].to_pylist()) if n != 4]
    assert written(tmp_path / "out", "rejects")["id"].to_pylist() == [IDS[kind][4].as_py()]
    assert total.exemplars.schema.field("id").type in (pa.int64(), pa.string())
    joined = duckdb.sql(
        f"SELECT corner, leaf FROM '{tmp_path}/in/*.parquet' JOIN '{tmp_path}/out/labels/*.parquet' USING (id)"
    ).fetchall()
    assert sorted(joined) == sorted((c, c) for n, c in enumerate(leaf.tolist()) if n != 4)
