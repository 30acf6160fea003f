"""Label files in an Iceberg table (package pyiceberg): one snapshot, with the run's id in its summary.

What pyiceberg reads and writes in S3 goes through our own door (raydc.storage.lake): with its retries, and without the
checksums that stores other than AWS's refuse.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, TableAlreadyExistsError
from pyiceberg.expressions import EqualTo
from pyiceberg.io import FileIO
from pyiceberg.io.pyarrow import (
    DataFileStatistics,
    MetricModeTypes,
    PyArrowFileIO,
    StatsAggregator,
    compute_statistics_plan,
    parquet_file_to_data_file,
)
from pyiceberg.manifest import DATA_FILE_TYPE, DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table, TableProperties
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.transforms import IdentityTransform
from pyiceberg.typedef import Record
from pyiceberg.types import FloatType, IcebergType, IntegerType, LongType, NestedField, StringType

from raydc.config import Config
from raydc.data.label_files import ColumnFacts
from raydc.data.schema import RUN_COLUMN
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake
from raydc.tables.common import (
    Conflict,
    LabelFile,
    Registered,
    check_schema,
    content_version,
    refuse_append,
    with_retries,
    with_run_column,
)

RUN_PROPERTY = "raydc.run-id"
CONTENT_PROPERTY = "raydc.content-version"

_TYPES: dict[pa.DataType, IcebergType] = {
    pa.int32(): IntegerType(),
    pa.int64(): LongType(),
    pa.float32(): FloatType(),
    pa.string(): StringType(),
    pa.large_string(): StringType(),
}
# A property of this process's client: the settings of the storage that pyiceberg has no name for.
_PATIENCE = "raydc.storage"
_PHYSICAL = {IntegerType: "INT32", LongType: "INT64", FloatType: "FLOAT", StringType: "BYTE_ARRAY"}
_PATIENT = {"anonymous", "max_attempts", "max_wait_seconds", "timeout_seconds"}
_PARTITION = next(i for i, field in enumerate(DATA_FILE_TYPE[2].fields) if field.name == "partition")


def commit(config: Config, run: RunDir, files: Sequence[LabelFile], schema: pa.Schema) -> Registered:
    """Make the table hold exactly these files of the run, in one snapshot.

    The snapshot's summary names the run and the content version. A commit that meets another is not sent again as it
    was, but after another look at the table: the other may have been ours.

    Raises:
        StageError: the table has other columns or other files of this run (append), or is too busy.
    """
    section = config.publish.iceberg
    assert section is not None
    name = f"the Iceberg table {section.identifier}"

    def attempt() -> Registered:
        try:
            catalog = open_catalog(config, run)
            return _commit_once(catalog, section.identifier, name, run.run_id, files, schema, config.publish.mode)
        except (CommitFailedException, TableAlreadyExistsError) as error:
            raise Conflict(str(error)) from error
        except Exception as error:
            # A SQL catalog makes its own tables when it is first opened, and SQLite has one writer. Not imported: other
            # catalogs work without SQLAlchemy.
            if type(error).__name__ in ("OperationalError", "IntegrityError"):
                raise Conflict(str(error).splitlines()[0]) from error
            raise

    return with_retries(name, attempt)


def open_catalog(config: Config, run: RunDir) -> Catalog:
    """Return the catalog of the settings; without any, one in a SQLite file beside the runs."""
    section = config.publish.iceberg
    assert section is not None
    properties = dict(section.properties)
    if not properties:
        folder = Path(run.root).parent / "_iceberg"
        folder.mkdir(parents=True, exist_ok=True)
        properties = {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/warehouse"}
    storage = {
        "s3.endpoint": config.storage.endpoint_url,
        "s3.region": config.storage.region,
        "client.profile-name": config.storage.profile,
        "py-io-impl": f"{LakeIO.__module__}.{LakeIO.__name__}",
        _PATIENCE: config.storage.model_dump_json(include=_PATIENT),
    }
    # The settings of the storage go to this process's client only; a catalog does not write them into the table.
    return load_catalog(section.catalog, **{k: v for k, v in storage.items() if v} | properties)


class LakeIO(PyArrowFileIO):
    """pyiceberg's files; those in S3 through our own door, unless the catalog has ways of its own, such as keys."""

    def _initialize_s3_fs(self, netloc: str | None) -> pyarrow.fs.FileSystem:
        if any(name.startswith("s3.") and name not in ("s3.endpoint", "s3.region") for name in self.properties):
            return super()._initialize_s3_fs(netloc)
        lake = Lake(
            endpoint_url=self.properties.get("s3.endpoint"),
            region=self.properties.get("s3.region"),
            profile=self.properties.get("client.profile-name"),
            **json.loads(self.properties[_PATIENCE]),
        )
        return lake.arrow_file_system(f"s3://{netloc}")[0]


def _commit_once(
    catalog: Catalog,
    identifier: str,
    name: str,
    run_id: str,
    files: Sequence[LabelFile],
    schema: pa.Schema,
    mode: str,
) -> Registered:
    ours = _table_schema(schema)
    table = _open_or_create(catalog, identifier, ours)
    check_schema(name, _columns(table.schema()), _columns(ours))
    spec = [f"{f.transform}({table.schema().find_column_name(f.source_id)})" for f in table.spec().fields]
    check_schema(
        name, {RUN_COLUMN: f"partitioned by {spec}"}, {RUN_COLUMN: f"partitioned by ['identity({RUN_COLUMN})']"}
    )
    version = str(content_version(files))
    earlier = [task.file for task in table.scan(row_filter=EqualTo(term=RUN_COLUMN, value=run_id)).plan_files()]
    wanted = {_location(f.uri): (f.size, f.rows) for f in files}
    before = _last_content(table, run_id)
    same = {f.file_path: _measures(f) for f in earlier} == wanted if before is None else before == version
    if earlier and same:
        return Registered("iceberg", identifier, _snapshot(table), False)
    if earlier and mode == "append":
        refuse_append(name, run_id, len(earlier))
    # In memory only: pyiceberg would send the same commit again where we look at the table first.
    table.metadata.properties[TableProperties.COMMIT_NUM_RETRIES] = "0"
    summary = {RUN_PROPERTY: run_id, CONTENT_PROPERTY: version}
    with table.transaction() as transaction:
        if transaction.table_metadata.name_mapping() is None:
            # The files hold no field ids; without a mapping readers cannot tell the columns.
            mapping = transaction.table_metadata.schema().name_mapping.model_dump_json()
            transaction.set_properties({TableProperties.DEFAULT_NAME_MAPPING: mapping})
        update = transaction.update_snapshot(snapshot_properties=summary)
        with update.overwrite() if earlier else update.fast_append() as snapshot:
            for known in earlier:
                snapshot.delete_data_file(known)
            for file in files:
                found = data_file(table.io, transaction.table_metadata, file)
                # The files have no such column: readers take the value from the metadata.
                found[_PARTITION] = Record(run_id)
                snapshot.append_data_file(found)
    return Registered("iceberg", identifier, _snapshot(table), True)


def data_file(io: FileIO, metadata: TableMetadata, file: LabelFile) -> DataFile:
    """Return what the table is told of a file; its footer is read only where nobody noted what is in it."""
    location = _location(file.uri)
    if file.columns is None:
        return parquet_file_to_data_file(io, metadata, location)
    schema = metadata.schema()
    plan = compute_statistics_plan(schema, metadata.properties)
    ids = {field.name: field.field_id for field in schema.fields}
    ranges: dict[int, StatsAggregator] = {}
    counted: dict[str, ColumnFacts] = {}
    for name, facts in file.columns.items():
        collector = plan[ids[name]]
        if collector.mode.type == MetricModeTypes.NONE:
            continue
        counted[name] = facts
        if collector.mode.type != MetricModeTypes.COUNTS and facts["least"] is not None:
            aggregate = StatsAggregator(
                collector.iceberg_type, _PHYSICAL[type(collector.iceberg_type)], collector.mode.length
            )
            aggregate.update_min(facts["least"])
            aggregate.update_max(facts["largest"])
            ranges[ids[name]] = aggregate
    found = DataFileStatistics(
        record_count=file.rows,
        column_sizes={ids[name]: facts["bytes"] for name, facts in file.columns.items()},
        value_counts={ids[name]: file.rows for name in counted},
        null_value_counts={ids[name]: nulls for name, f in counted.items() if (nulls := f["nulls"]) is not None},
        nan_value_counts={},
        column_aggregates=ranges,
        split_offsets=[],
    )
    return DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=location,
        file_format=FileFormat.PARQUET,
        partition=Record(),
        file_size_in_bytes=file.size,
        sort_order_id=None,
        spec_id=metadata.default_spec_id,
        equality_ids=None,
        key_metadata=None,
        **{**found.to_serialized_dict(), "split_offsets": None},
    )


def _open_or_create(catalog: Catalog, identifier: str, schema: Schema) -> Table:
    try:
        return catalog.load_table(identifier)
    except NoSuchTableError:
        catalog.create_namespace_if_not_exists(identifier.rpartition(".")[0])
    run_field = schema.find_field(RUN_COLUMN)
    spec = PartitionSpec(PartitionField(run_field.field_id, 1000, IdentityTransform(), RUN_COLUMN))
    return catalog.create_table(identifier, schema, partition_spec=spec)


def _table_schema(labels: pa.Schema) -> Schema:
    fields = [
        NestedField(number, field.name, _TYPES[field.type], required=False)
        for number, field in enumerate(with_run_column(labels), 1)
    ]
    return Schema(*fields)


def _columns(schema: Schema) -> dict[str, str]:
    return {field.name: str(field.field_type) for field in schema.fields}


def _last_content(table: Table, run_id: str) -> str | None:
    """Return the content version of the run's last commit, as far back as the table keeps its snapshots."""
    snapshot: Any = table.current_snapshot()
    while snapshot is not None:
        summary = snapshot.summary.additional_properties if snapshot.summary is not None else {}
        if summary.get(RUN_PROPERTY) == run_id:
            return summary.get(CONTENT_PROPERTY)
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
    return None


def _measures(file: DataFile) -> tuple[int, int]:
    return file.file_size_in_bytes, file.record_count


def _location(uri: str) -> str:
    return uri if "://" in uri else f"file://{uri}"


def _snapshot(table: Table) -> str:
    current = table.current_snapshot()
    return "" if current is None else str(current.snapshot_id)
