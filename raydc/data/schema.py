"""Names, types and Arrow schemas of everything that a run reads or writes."""

import pyarrow as pa

FORMAT_VERSION = 2
"""Version of a run folder and of its manifest. 2: American names of stages, settings and files."""

MODEL_FORMAT_VERSION = 1
"""Version of a saved model; it has not changed since the first."""

MODEL_FOLDER = "model"
"""Where a run folder has its model."""

RUN_COLUMN = "run_id"
"""Partition column of the tables in which runs register their labels; not in the label files themselves."""

REJECT_REASONS = (
    "missing",
    "wrong_length",
    "not_numbers",
    "not_finite",
    "too_large",
    "zero_norm",
    "norm_underflow",
    "norm_overflow",
    "unreadable_file",
    "killed_process",
    "bad_weight",
    "bad_id",
)


def labels_schema(id_type: pa.DataType, levels: list[int]) -> pa.Schema:
    """Return the schema of a label file: one row for each good input row, in the input's order."""
    return pa.schema(
        [
            pa.field("id", id_type),
            pa.field("leaf", pa.int32()),
            *[pa.field(level_column(k), pa.int32()) for k in levels],
            pa.field("confidence", pa.float32()),
            pa.field("distance", pa.float32()),
            pa.field("second_leaf", pa.int32()),
            pa.field("second_distance", pa.float32()),
        ]
    )


def level_column(num_groups: int) -> str:
    """Return the label column of the level with `num_groups` groups."""
    return f"level_{num_groups}"


def rejects_schema(id_type: pa.DataType) -> pa.Schema:
    """Return the schema of a reject file: one row for each bad input row."""
    return pa.schema(
        [
            pa.field("id", id_type),
            pa.field("slice", pa.string()),
            pa.field("row", pa.int64()),
            pa.field("reason", pa.string()),
        ]
    )
