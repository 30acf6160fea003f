"""The settings of the data: the input, the object store, the preprocessing and the nearest neighbors."""

from typing import Any, Literal, Self

import pydantic
from pydantic import Field

from raydc.config.section import OPERATIONAL, Section, check_uri

ElementType = Literal[
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "int64",
    "ubinary",
    "binary",
]


class EmbeddingColumn(Section):
    """One embedding of a row; several are concatenated in the order given."""

    name: str
    """Column name; for `prefix`, `columns` and `npy` a name of your choice."""

    weight: float = Field(1.0, gt=0)
    """Factor on the column after preprocessing; squared distances scale with its square."""

    dtype: ElementType | None = None
    """How bytes and integers are read. Needed for bytes, such as numpy.tobytes (little endian), and for lists of
    integers that are no numbers: bfloat16 (in uint16), ubinary and binary (packed bits in uint8 and int8)."""

    scale: float = Field(1.0, gt=0)
    """Factor on the stored numbers, for quantized embeddings such as int8."""

    prefix: str | None = None
    """One column for each dimension, called prefix and a number: f_0, f_1, ... In the order of their numbers."""

    columns: list[str] = []
    """One column for each dimension, by name and in this order."""

    npy: str | None = None
    """Where .npy files hold the rows, beside Parquet files without them, as clip-retrieval writes: a path with
    {number} for the digits at the end of a Parquet file's name, or {stem} for all of the name."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_what_has_none(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "name" in values:
            return values
        columns = values.get("columns")
        if values.get("prefix") is not None:
            return values | {"name": f"{values['prefix']}*"}
        if isinstance(values.get("npy"), str):
            return values | {"name": values["npy"].rsplit("/", 1)[-1]}
        if isinstance(columns, list) and columns:
            return values | {"name": f"{columns[0]}..{columns[-1]}"}
        return values

    @pydantic.model_validator(mode="after")
    def _is_stored_in_one_way(self) -> Self:
        if (self.prefix is not None) + bool(self.columns) + (self.npy is not None) > 1:
            raise ValueError(f"input.embedding_columns: {self.name!r}: give one of prefix, columns and npy")
        if self.npy is not None:
            check_uri(self.npy, "input.embedding_columns[].npy")
            if "{number}" not in self.npy and "{stem}" not in self.npy:
                raise ValueError(f"input.embedding_columns: npy={self.npy!r} needs {{number}} or {{stem}} in it")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"input.embedding_columns: columns of {self.name!r} names a column twice")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _leave_out_what_is_not_set(self, handler: Any) -> dict[str, Any]:
        # So that settings which came later change no fingerprint of a run that does not use them.
        found = handler(self)
        unset: dict[str, Any] = {"scale": 1.0, "prefix": None, "columns": [], "npy": None}
        return {k: v for k, v in found.items() if k not in unset or v != unset[k]}


class InputConfig(Section):
    """Where the rows are and what their columns mean."""

    path: str | list[str]
    """Folder, glob, file, or a list of them: local, or any URI that fsspec knows (s3://, gs://, ...)."""

    id_column: str = "id"
    """Column with the row's identifier: integers, text, UUIDs, bytes, decimals, dates or timestamps.

    It is copied to the labels."""

    embedding_columns: list[EmbeddingColumn] = Field([EmbeddingColumn(name="embedding")], min_length=1)
    """Embedding columns. A plain name or a list of names is accepted too, also of columns of one number each."""

    label_column: str | None = None
    """Column with known classes, of any type that has a text. It is used for evaluation only, never for training.

    It may be missing in some rows and files, and may stand in the folders' names (label=cat/)."""

    weight_column: str | None = None
    """Column with positive row weights, for every loss and statistic. null weighs each row 1.

    So does a file that has no value in it."""

    carry_columns: list[str] = []
    """Columns copied to the exemplars, such as a URI or a caption."""

    image_shape: list[int] | None = Field(None, min_length=2, max_length=3)
    """Shape of the rows when they are images themselves: [height, width] or [height, width, channels].

    The report then draws them."""

    on_bad_rows: Literal["fail", "quarantine"] = "fail"
    """What to do with bad rows: NaN, Inf, missing, huge, of wrong length, or of zero norm with preprocess.method=l2.

    fail stops the run; quarantine writes them to rejects/."""

    on_bad_files: Literal["fail", "quarantine"] = "fail"
    """What to do with a file that cannot be read or has another schema: stop the run, or set it aside."""

    unique_ids: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Refuse an input in which two rows share an id. By default such rows are only counted in the metrics."""

    slice_bytes: int = Field(256 * 2**20, gt=0)
    """Target size of a slice, in uncompressed bytes. A larger file is split between its row groups."""

    sample_rows: int = Field(100_000, gt=0)
    """Rows that profile reads for mean, spread and bad rows. Preprocessing statistics come from them."""

    @pydantic.field_validator("embedding_columns", mode="before")
    @classmethod
    def _accept_plain_names(cls, value: Any) -> Any:
        given = value if isinstance(value, list) else [value]
        # A name such as 0, as pandas calls the columns of a matrix, is a number in YAML.
        return [{"name": str(n)} if isinstance(n, str | int) and not isinstance(n, bool) else n for n in given]

    @pydantic.field_validator("path")
    @classmethod
    def _path_is_shared_and_free_of_secrets(cls, value: str | list[str]) -> str | list[str]:
        for uri in [value] if isinstance(value, str) else value:
            check_uri(uri, "input.path")
        return value

    @pydantic.model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        names = [c.name for c in self.embedding_columns]
        if len(set(names)) != len(names):
            raise ValueError(
                f"input.embedding_columns names a column twice: {names}. Name each once; set its weight to count it "
                "more"
            )
        if self.label_column in names or self.label_column == self.id_column:
            raise ValueError(
                f"input.label_column={self.label_column!r} is already the id or an embedding column. Name the column "
                "of the classes, or leave it out"
            )
        taken = sorted({*self.carry_columns} & {"leaf", "rank", "key", "id", "distance", "label", "embedding"})
        if taken:
            raise ValueError(f"input.carry_columns={taken} are names of the exemplars' own columns; rename them")
        return self


class StorageConfig(Section):
    """How to reach an object store. Credentials come from the environment, a profile or the instance."""

    endpoint_url: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """S3 endpoint, for a store other than AWS."""

    region: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """S3 region."""

    profile: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """Name of a credentials profile."""

    anonymous: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Read public buckets without credentials."""

    max_attempts: int = Field(8, ge=1, le=20, json_schema_extra=OPERATIONAL)
    """Fewest requests to S3 before a failure that may pass is final, the first included.

    The pause between two grows from 0.5 to 20 seconds."""

    max_wait_seconds: float = Field(120.0, ge=0, le=86400, json_schema_extra=OPERATIONAL)
    """Seconds that an outage of S3 is waited for, at least. Raise it where the store may be away for longer.

    A request is given up once both this and max_attempts are used up. 0 leaves it to max_attempts alone."""

    timeout_seconds: float = Field(30.0, gt=0, json_schema_extra=OPERATIONAL)
    """Longest wait for a connection to S3, and for the next bytes of an answer, in seconds."""

    @pydantic.field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_a_plain_url(cls, value: str | None) -> str | None:
        if value is not None:
            check_uri(value, "storage.endpoint_url")
            if not value.startswith(("http://", "https://")):
                raise ValueError(f"storage.endpoint_url={value!r} must begin with http:// or https://.")
        return value


class PreprocessConfig(Section):
    """What is done to a raw row before anything else; saved with the model."""

    method: Literal["none", "l2", "standardize", "scale"] = "none"
    """Preprocessing of each row. Use l2 for embeddings that were trained for cosine similarity.

    l2 brings each column to unit norm. standardize brings each dimension to mean 0 and deviation 1. scale multiplies
    all by one factor."""

    factor: float | None = Field(None, gt=0)
    """Factor of method=scale. null makes |x|^2 / D equal 1 on average over the sample."""


class NeighborsConfig(Section):
    """The nearest neighbors of every row, for the objectives that learn from them (temi, icon)."""

    num: int = Field(10, ge=1)
    """Neighbors of each row (M)."""

    metric: Literal["cosine", "l2"] = "cosine"
    """Distance between the preprocessed rows."""

    method: Literal["auto", "exact", "ivf"] = "auto"
    """Search: exact, or ivf, which looks only into the cells nearest to a row. auto is exact up to exact_rows rows.

    The recall of ivf is measured and reported."""

    exact_rows: int = Field(1_000_000, ge=1)
    """Most rows that method=auto searches exactly, at 2 N^2 D operations."""

    num_probes: int = Field(32, ge=1)
    """ivf: cells searched for each row. There are as many cells as the square root of the number of rows."""

    recall_rows: int = Field(1000, ge=1)
    """ivf: rows that are also searched exactly, to measure the recall; chosen by hash of the row key."""

    max_slices: int = Field(2000, ge=1, json_schema_extra=OPERATIONAL)
    """Most slices with rows. Every slice is searched in all others, so requests and driver memory grow with its square.

    At 2,000 slices the driver holds about 1.5 GiB for the tasks, at 8,000 about 19 GiB."""

    max_traffic_bytes: float = Field(1e14, gt=0, json_schema_extra=OPERATIONAL)
    """Most bytes that the tasks may fetch: slices times the rows trained on, as float32. 1e14 is 22 h at 10 Gbit/s."""

    cpus_per_task: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of a task. A task searches the neighbors of one slice."""
