"""Labels as Delta and Iceberg tables: one commit, done once, whole replacement, and readers that see the same rows."""

import importlib.util
import json
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyiceberg
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake

import raydc
from raydc.config import Config, parse_config
from raydc.config.output import CATALOG_PROPERTIES
from raydc.data import label_files
from raydc.data.schema import labels_schema
from raydc.errors import ConfigError, StageError, StorageUnavailable
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.lease import LeaseLost, acquire
from raydc.stages import publish
from raydc.storage.lake import Lake
from raydc.tables import common, delta, iceberg, register
from raydc.tables.common import LabelFile
from tests.faulty_s3 import FaultyS3
from tests.stages.runs import fill, labeled_run

FORMATS = ("delta", "iceberg")


def labels(first, num=10, levels=(2,), id_type=None):
    """Return label rows with ids from `first`."""
    id_type = id_type or pa.int64()
    schema = labels_schema(id_type, list(levels))
    columns = {field.name: pa.array([i % 3 for i in range(num)], pa.int64()).cast(field.type) for field in schema}
    columns["id"] = pa.array(range(first, first + num)).cast(id_type)
    return pa.table(columns, schema)


class Runs:
    """Runs with label files in a folder laid out for a shared table, and the settings to publish them."""

    def __init__(self, root, form, lake=None):
        self.root, self.form, self.lake = str(root), form, lake or Lake()

    def config(self, mode="replace", **storage) -> Config:
        section = {"delta": {"uri": self.root}} if self.form == "delta" else {"iceberg": {}}
        values = {"input": {"path": "x"}, "output": f"{self.root}/_runs", "storage": storage}
        return parse_config(values | {"publish": {"mode": mode} | section})

    def run(self, run_id) -> RunDir:
        return RunDir(self.lake, f"{self.root}/_runs", run_id)

    def write(self, run_id, **files):
        """Write label files; return them as publish sees them."""
        run, found = self.run(run_id), []
        for name, table in files.items():
            uri = run.uri("labels", f"{name}.parquet")
            with self.lake.staged(uri) as path:
                pq.write_table(table, path)
            digest = str(hash(self.lake.read_bytes(uri)))
            found.append(
                LabelFile(path=f"{name}.parquet", uri=uri, size=self.lake.size(uri), rows=table.num_rows, sha256=digest)
            )
        return found

    def commit(self, run_id, files, mode="replace", schema=None, **storage):
        config = self.config(mode, **storage)
        return register.register(config, self.run(run_id), files, schema or labels(0).schema)[0]

    def table(self):
        """Return what a reader opens."""
        if self.form == "delta":
            return DeltaTable(self.root)
        return iceberg.open_catalog(self.config(), self.run("x")).load_table("raydc.labels")

    def rows(self) -> pa.Table:
        table = self.table()
        found = table.to_pyarrow_table() if self.form == "delta" else table.scan().to_arrow()
        return found.sort_by([("run_id", "ascending"), ("id", "ascending")])

    def ids(self, run_id):
        rows = self.rows()
        return rows.filter(pa.compute.equal(rows["run_id"], run_id))["id"].to_pylist()

    def num_commits(self):
        return self.table().version() if self.form == "delta" else len(self.table().snapshots())


@pytest.fixture(params=FORMATS)
def runs(request, tmp_path):
    return Runs(tmp_path / "table", request.param)


def test_the_label_files_become_a_table_in_one_commit_and_stay_as_they_are(runs):
    files = runs.write("r1", a=labels(0), b=labels(10), none=labels(0, 0))
    before = [(Path(f.uri).read_bytes(), Path(f.uri).stat().st_mtime_ns) for f in files]
    done = runs.commit("r1", files)
    assert done.committed and done.format == runs.form
    assert runs.num_commits() == 1
    assert [(Path(f.uri).read_bytes(), Path(f.uri).stat().st_mtime_ns) for f in files] == before
    rows = runs.rows()
    assert rows["id"].to_pylist() == list(range(20))
    assert set(rows["run_id"].to_pylist()) == {"r1"}
    expected = pa.concat_tables([labels(0), labels(10)])
    for name in expected.column_names:
        assert rows[name].cast(expected[name].type).to_pylist() == expected[name].to_pylist()
    # No second copy of the rows anywhere below the table.
    assert len([p for p in Path(runs.root).rglob("*.parquet") if "metadata" not in p.parts]) == 3


def test_a_second_publish_of_the_same_files_changes_nothing(runs):
    files = runs.write("r1", a=labels(0), b=labels(10))
    first = runs.commit("r1", files)
    for mode in ("replace", "append"):
        again = runs.commit("r1", files, mode)
        assert not again.committed
        assert again.version == first.version
    assert runs.num_commits() == 1
    assert len(runs.rows()) == 20


def test_replace_takes_the_runs_earlier_files_out_in_the_same_commit(runs):
    runs.commit("other", runs.write("other", a=labels(100)))
    runs.commit("r1", runs.write("r1", a=labels(0), b=labels(10)))
    # One file of the same name with other rows, one that is gone, a new one.
    done = runs.commit("r1", runs.write("r1", a=labels(20, 7), c=labels(40)))
    assert done.committed
    assert runs.num_commits() == 3
    assert runs.ids("r1") == [*range(20, 27), *range(40, 50)]
    assert runs.ids("other") == list(range(100, 110))


def test_append_refuses_other_files_of_the_same_run_and_takes_another_run(runs):
    runs.commit("r1", runs.write("r1", a=labels(0)), "append")
    runs.commit("r2", runs.write("r2", a=labels(0)), "append")
    with pytest.raises(StageError, match=r"holds 1 other files of run 'r1'. Set publish.mode=replace"):
        runs.commit("r1", runs.write("r1", b=labels(10)), "append")
    assert runs.ids("r1") == runs.ids("r2") == list(range(10))


def test_a_run_whose_rows_were_deleted_from_the_table_comes_back(runs):
    files = runs.write("r1", a=labels(0))
    runs.commit("r1", files)
    runs.table().delete("run_id = 'r1'")
    assert runs.ids("r1") == []
    assert runs.commit("r1", files).committed
    assert runs.ids("r1") == list(range(10))


def test_names_with_blanks_quotes_and_percent_signs_are_kept(runs):
    files = runs.write("it's r 1", **{"a b%20c": labels(0), "d+e=é": labels(10)})
    runs.commit("it's r 1", files)
    assert runs.ids("it's r 1") == list(range(20))
    runs.commit("it's r 1", runs.write("it's r 1", **{"d+e=é": labels(30)}))
    assert runs.ids("it's r 1") == list(range(30, 40))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"levels": (2, 5)}, "level_5 is not there in the table and int"),
        ({"levels": ()}, "level_2 is int.* in the table and not there in the labels"),
        ({"id_type": pa.string()}, "id is long in the table and string in the labels"),
    ],
)
def test_a_table_of_other_columns_is_refused(runs, changed, message):
    runs.commit("r1", runs.write("r1", a=labels(0)))
    table = labels(0, **changed)
    with pytest.raises(StageError, match=f"has other columns than the labels: {message}"):
        runs.commit("r2", runs.write("r2", a=table), schema=table.schema)
    assert runs.num_commits() == 1


def test_a_delta_table_that_is_not_partitioned_by_run_is_refused(tmp_path):
    runs = Runs(tmp_path / "table", "delta")
    write_deltalake(runs.root, common.with_run_column(labels(0).schema).empty_table())
    with pytest.raises(StageError, match=r"run_id is partitioned by \[\] in the table"):
        runs.commit("r1", runs.write("r1", a=labels(0)))


def test_runs_that_commit_at_the_same_time_all_get_in(runs):
    # The table is made by whoever comes first.
    files = {f"r{n}": runs.write(f"r{n}", a=labels(10 * n)) for n in range(4)}
    barrier = Barrier(len(files))

    def go(run_id):
        barrier.wait()
        return runs.commit(run_id, files[run_id])

    with ThreadPoolExecutor(len(files)) as pool:
        done = list(pool.map(go, files))
    assert all(found.committed for found in done)
    assert sorted(runs.rows()["id"].to_pylist()) == list(range(40))


def test_two_drivers_of_one_run_that_commit_at_the_same_time_add_its_rows_once(runs):
    runs.commit("r0", runs.write("r0", a=labels(100)))
    files = runs.write("r1", a=labels(0))
    barrier = Barrier(3)

    def go(_):
        barrier.wait()
        return runs.commit("r1", files)

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(go, range(3)))
    assert sum(found.committed for found in done) == 1
    assert runs.ids("r1") == list(range(10))


def test_a_commit_that_never_gets_through_gives_up(monkeypatch):
    tries = []

    def busy():
        tries.append(1)
        raise common.Conflict("another was first")

    with pytest.raises(
        StageError, match="the table was changed by others during 8 commits in a row: another was first"
    ):
        common.with_retries("the table", busy, sleep=lambda seconds: None)
    assert len(tries) == common.COMMIT_TRIES


def test_polars_duckdb_and_datafusion_read_the_delta_table(tmp_path):
    runs = Runs(tmp_path / "table", "delta")
    runs.commit("r1", runs.write("r1", a=labels(0), b=labels(10)))
    runs.commit("r2", runs.write("r2", a=labels(0, 5)))
    expected = [("r1", 20, 190), ("r2", 5, 10)]
    # Without pyarrow Polars takes a partition's value from a folder called run_id=..., not from the table.
    scan = pl.scan_delta(runs.root, use_pyarrow=True)
    frame = scan.group_by("run_id").agg(pl.len(), pl.col("id").sum()).sort("run_id").collect()
    assert frame.rows() == expected
    # DuckDB's own delta extension is a download; through Arrow it needs none.
    labels_of_runs = runs.table().to_pyarrow_dataset()
    query = "select run_id, count(*), sum(id)::bigint from labels_of_runs group by run_id order by run_id"
    assert duckdb.sql(query).fetchall() == expected
    assert labels_of_runs.count_rows() == 25
    found = QueryBuilder().register("t", runs.table()).execute("select count(*) as n from t where run_id = 'r2'")
    assert pa.table(found.read_all())["n"].to_pylist() == [5]


def test_polars_and_duckdb_read_the_iceberg_table(tmp_path):
    runs = Runs(tmp_path / "table", "iceberg")
    runs.commit("r1", runs.write("r1", a=labels(0), b=labels(10)))
    runs.commit("r2", runs.write("r2", a=labels(0, 5)))
    expected = [("r1", 20, 190), ("r2", 5, 10)]
    with warnings.catch_warnings():
        # Polars names a faster planner that is not installed.
        warnings.simplefilter("ignore")
        scan = pl.scan_iceberg(runs.table())
        frame = scan.group_by("run_id").agg(pl.len(), pl.col("id").sum()).sort("run_id").collect()
    assert frame.rows() == expected
    # DuckDB's own iceberg extension is a download; through Arrow it needs none.
    connection = runs.table().scan().to_duckdb("labels")
    query = "select run_id, count(*), sum(id)::bigint from labels group by run_id order by run_id"
    assert connection.sql(query).fetchall() == expected
    assert runs.table().scan(row_filter="run_id == 'r2'").to_arrow().num_rows == 5
    assert runs.table().current_snapshot().summary.additional_properties["raydc.run-id"] == "r2"


def test_delta_readers_skip_files_by_their_ids(tmp_path):
    runs = Runs(tmp_path / "table", "delta")
    runs.commit("r1", runs.write("r1", a=labels(0), b=labels(10)))
    (adds,) = [runs.table().get_add_actions(flatten=True)]
    found = {a["path"].rpartition("/")[2]: a for a in pa.table(adds).to_pylist()}
    assert (found["b.parquet"]["min.id"], found["b.parquet"]["max.id"], found["b.parquet"]["num_records"]) == (
        10,
        19,
        10,
    )


def test_a_vacuum_of_the_shared_table_leaves_the_runs_alone(tmp_path):
    runs = Runs(tmp_path / "table", "delta")
    runs.commit("r1", runs.write("r1", a=labels(0), b=labels(10)))
    runs.lake.write_bytes(runs.run("r1").uri("model", "config.json"), b"{}")
    runs.commit("r1", runs.write("r1", a=labels(0)))
    runs.table().vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False, full=True)
    assert runs.lake.exists(runs.run("r1").uri("model", "config.json"))
    assert runs.ids("r1") == list(range(10))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("elsewhere", "are not below it, and Polars and Arrow cannot read a Delta table with files elsewhere"),
        (".", "VACUUM of a Delta table removes every file below it .* set output=.*/_runs, or leave"),
    ],
)
def test_a_delta_table_in_the_wrong_place_is_refused_before_work_starts(tmp_path, uri, message):
    values = {"input": {"path": "x"}, "output": str(tmp_path / "runs")}
    config = parse_config(values | {"publish": {"delta": {"uri": str((tmp_path / uri).resolve())}}})
    with pytest.raises(ConfigError, match=message):
        register.check(config, RunDir(Lake(), config.output, "r1"))


@pytest.mark.parametrize(("form", "package"), [("delta", "deltalake"), ("iceberg", "pyiceberg")])
def test_a_missing_package_is_refused_before_work_starts(tmp_path, monkeypatch, form, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    config = parse_config({"input": {"path": "x"}, "output": str(tmp_path), "publish": {form: {}}})
    with pytest.raises(
        ConfigError, match=rf"publish.{form}: needs the package {package}: pip install 'raydc\[{form}\]'"
    ):
        register.check(config, RunDir(Lake(), config.output, "r1"))


def test_an_embedded_catalog_needs_a_local_output():
    config = parse_config({"input": {"path": "x"}, "output": "s3://b/runs", "publish": {"iceberg": {}}})
    with pytest.raises(ConfigError, match="the embedded catalog is a local file, but output is not local"):
        register.check(config, RunDir(Lake(), config.output, "r1"))


@pytest.mark.parametrize(
    "properties",
    [
        {"s3.secret-access-key": "hidden"},
        {"token": "hidden"},
        {"credential": "a:hidden"},
        {"uri": "postgresql://me:hidden@host/db"},
        {"header.Authorization": "Bearer hidden"},
        {"header.X-Api-Key": "hidden"},
        {"adls.account-key": "hidden"},
        {"adls.connection-string": "hidden"},
        {"hf.token": "hidden"},
        {"anything-new": "hidden"},
    ],
)
def test_catalog_properties_that_may_be_secret_are_refused_with_the_way_to_give_them(properties):
    with pytest.raises(
        ConfigError, match=r"may hold a secret.*PYICEBERG_CATALOG__RAYDC__<KEY>.*pyiceberg.yaml"
    ) as said:
        parse_config({"input": {"path": "x"}, "publish": {"iceberg": {"properties": properties}}})
    assert "hidden" not in str(said.value)
    assert f"{[*properties]}" in str(said.value)
    kept = {"type": "rest", "uri": "https://host:8181", "warehouse": "s3://b/w"}
    assert parse_config({"input": {"path": "x"}, "publish": {"iceberg": {"properties": kept}}})


def test_every_catalog_property_that_is_taken_is_one_of_pyicebergs_and_documented():
    package = Path(pyiceberg.__file__).parent
    source = "".join(p.read_text() for p in package.rglob("*.py"))
    assert [name for name in CATALOG_PROPERTIES if f'"{name}"' not in source] == []
    page = (Path(raydc.__file__).parents[1] / "docs/tables.md").read_text()
    assert [name for name in CATALOG_PROPERTIES if f"`{name}`" not in page] == []


def test_publish_registers_a_run_in_both_and_says_so_in_the_manifest(tmp_path):
    fill(tmp_path / "in", num_bad=3)
    config, run = labeled_run(tmp_path, publish={"delta": {}, "iceberg": {}})
    publish.run(config, run)
    manifest = artifacts.MANIFEST.read(run)
    assert [(t["format"], t["table"]) for t in manifest["tables"]] == [
        ("delta", run.uri("labels")),
        ("iceberg", "raydc.labels"),
    ]
    assert not [f for f in manifest["files"] if "_delta_log" in f["path"]]
    frame = pl.read_delta(run.uri("labels"))
    assert frame.columns == labels(0).column_names
    assert frame.height == DeltaTable(run.uri("labels")).to_pyarrow_dataset().count_rows() == 97
    assert iceberg.open_catalog(config, run).load_table("raydc.labels").scan().count() == 97
    publish.run(config, run)
    assert artifacts.MANIFEST.read(run) == manifest


class NoManifest(Lake):
    """A lake in which whoever is about to write the manifest dies."""

    def create(self, uri, body):
        return 1 / 0 if uri.endswith(artifacts.MANIFEST.path) else super().create(uri, body)


def test_a_publish_that_died_after_the_commit_ends_without_another_one(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path, publish={"delta": {}, "iceberg": {}})
    run.lake = NoManifest()
    with pytest.raises(ZeroDivisionError):
        publish.run(config, run)
    run.lake = Lake()
    assert not run.lake.exists(run.uri(artifacts.MANIFEST.path))
    publish.run(config, run)
    assert run.lake.exists(run.uri(artifacts.MANIFEST.path))
    assert DeltaTable(run.uri("labels")).version() == 1
    table = iceberg.open_catalog(config, run).load_table("raydc.labels")
    assert len(table.snapshots()) == 1 and table.scan().count() == 100


def test_a_driver_that_lost_its_lease_commits_to_no_table(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path, publish={"delta": {}, "iceberg": {}})
    run.fence = acquire(run.lake, run.root, heartbeat_seconds=0.1, stale_seconds=0.3).fence
    with acquire(run.lake, run.root, heartbeat_seconds=0.1, stale_seconds=0.3), pytest.raises(LeaseLost):
        publish.run(config, run)
    assert not DeltaTable.is_deltatable(run.uri("labels"))
    assert not Path(run.root).with_name("_iceberg").exists()


def test_a_table_may_be_added_to_a_finished_run(tmp_path):
    fill(tmp_path / "in")
    config, run = labeled_run(tmp_path)
    publish.run(config, run)
    run.mark_done("publish", config.settings("publish"), 1.0, {})
    more = config.model_copy(
        update={"publish": parse_config({"input": {"path": "x"}, "publish": {"delta": {}}}).publish}
    )
    assert run.is_done("publish", config.settings("publish"), repeatable=True)
    assert not run.is_done("publish", more.settings("publish"), repeatable=True)
    publish.run(more, run)
    assert [t["format"] for t in artifacts.MANIFEST.read(run)["tables"]] == ["delta"]


@pytest.mark.s3
@pytest.mark.parametrize("form", FORMATS)
def test_a_store_that_is_down_ends_the_commit_with_one_clear_error(form, tmp_path, bucket, s3_endpoint):
    runs = Runs(bucket, form, Lake(endpoint_url=s3_endpoint))
    # Files that are there, and a table on a port that nothing listens on.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = runs.config(
        endpoint_url=endpoint, region="us-east-1", max_attempts=2, max_wait_seconds=0, timeout_seconds=5
    )
    if form == "iceberg":
        catalog = {"type": "sql", "uri": f"sqlite:///{tmp_path}/c.db", "warehouse": "s3://bucket/warehouse"}
        section = config.publish.iceberg.model_copy(update={"properties": catalog})
        config = config.model_copy(update={"publish": config.publish.model_copy(update={"iceberg": section})})
    files = runs.write("r1", a=labels(0))
    with pytest.raises(StorageUnavailable, match=rf"storage|Delta table {bucket}") as caught:
        register.register(config, runs.run("r1"), files, labels(0).schema)
    assert "the same command continues" in str(caught.value)


@pytest.mark.s3
def test_answers_that_end_early_neither_stop_a_commit_nor_double_it(bucket, s3_endpoint):
    runs = Runs(bucket, "delta", Lake(endpoint_url=s3_endpoint))
    settings = {"region": "us-east-1", "timeout_seconds": 5}
    with FaultyS3(s3_endpoint) as faulty:
        for number in range(6):
            files = runs.write(f"r{number}", a=labels(10 * number))
            # Delta's client asks no second time after either.
            faulty.burst("cut", requests=number % 3, part="list-type")
            faulty.burst("cut", requests=number % 2, methods=["PUT"])
            first = runs.commit(f"r{number}", files, endpoint_url=faulty.url, **settings)
            again = runs.commit(f"r{number}", files, endpoint_url=faulty.url, **settings)
            assert not again.committed
            assert again.version == first.version
        assert sum("list-type" in seen.path for seen in faulty.seen if seen.fault) == 6
        assert sum(seen.method == "PUT" for seen in faulty.seen if seen.fault) == 3
    where = delta.storage_options(runs.config(endpoint_url=s3_endpoint, region="us-east-1").storage)
    table = DeltaTable(bucket, storage_options=where)
    assert table.version() == 6
    assert sorted(table.to_pyarrow_table()["id"].to_pylist()) == list(range(60))


def test_a_store_that_always_breaks_off_is_said_to_be_unavailable(monkeypatch):
    tries = []

    def broken():
        tries.append(1)
        raise common.AnswerLost("Error getting list response body")

    with pytest.raises(StorageUnavailable, match=r"the table: Error getting list.* command continues"):
        common.with_retries("the table", broken, sleep=lambda seconds: None)
    assert len(tries) == common.COMMIT_TRIES


@pytest.mark.s3
@pytest.mark.parametrize("form", FORMATS)
def test_tables_in_s3_hold_no_credentials(bucket, s3_endpoint, tmp_path, form, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-test")
    lake = Lake(endpoint_url=s3_endpoint)
    runs = Runs(bucket, form, lake)
    files = runs.write("r1", a=labels(0), b=labels(10))
    config = runs.config(endpoint_url=s3_endpoint, region="us-east-1")
    if form == "iceberg":
        catalog = {"type": "sql", "uri": f"sqlite:///{tmp_path}/c.db", "warehouse": f"{bucket}/warehouse"}
        section = config.publish.iceberg.model_copy(update={"properties": catalog})
        config = config.model_copy(update={"publish": config.publish.model_copy(update={"iceberg": section})})
    run = runs.run("r1")
    assert register.register(config, run, files, labels(0).schema)[0].committed
    assert not register.register(config, run, files, labels(0).schema)[0].committed
    if form == "delta":
        found = DeltaTable(bucket, storage_options=delta.storage_options(config.storage)).to_pyarrow_table()
    else:
        found = iceberg.open_catalog(config, run).load_table("raydc.labels").scan().to_arrow()
    assert sorted(found["id"].to_pylist()) == list(range(20))
    bodies = [lake.read_bytes(f.uri) for f in lake.find(bucket) if not f.uri.endswith(".parquet")]
    bodies += [p.read_bytes() for p in tmp_path.iterdir()]
    bodies.append(json.dumps(config.model_dump(mode="json")).encode())
    assert len(bodies) >= 3
    for body in bodies:
        assert b"a-secret-of-the-test" not in body and b"testing" not in body


def test_what_was_noted_of_a_file_makes_the_same_commit_as_its_footer(runs):
    """Ranges of integers, floats and text, of two row groups and of none."""
    wide = labels(0, 20, id_type=pa.string())
    files = runs.write("r1", a=wide, none=labels(0, 0, id_type=pa.string()))
    run = runs.run("r1")
    noted = [
        replace(f, columns=label_files.from_record(label_files.record(f.path, Path(f.uri)).to_pylist()[0]))
        for f in files
    ]
    if runs.form == "delta":
        for file, known in zip(files, noted, strict=True):
            assert delta.file_statistics(run.lake, file) == delta.file_statistics(run.lake, known)
    done = runs.commit("r1", noted, schema=wide.schema)
    assert done.committed and len(runs.rows()) == 20
    if runs.form == "iceberg":
        table = runs.table()
        for file, known in zip(files, noted, strict=True):
            ours, theirs = (iceberg.data_file(table.io, table.metadata, f) for f in (known, file))
            for name in (
                "file_path",
                "file_size_in_bytes",
                "record_count",
                "column_sizes",
                "value_counts",
                "null_value_counts",
                "lower_bounds",
                "upper_bounds",
            ):
                assert getattr(ours, name) == getattr(theirs, name), name
