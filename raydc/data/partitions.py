"""Hive partitions: columns that stand in the folders' names, as `year=2024/label=cat/part-0.parquet`."""

from urllib.parse import unquote

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_values(uri: str) -> dict[str, str | None]:
    """Return the partition columns of a file, percent-escapes decoded; None for Hive's name of a missing value."""
    values: dict[str, str | None] = {}
    for folder in uri.split("/")[:-1]:
        name, separator, value = folder.partition("=")
        if separator and name:
            values[unquote(name)] = None if value == _NULL else unquote(value)
    return values
