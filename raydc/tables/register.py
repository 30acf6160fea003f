"""The label files as a table: registered in Delta or Iceberg where they lie, without writing one of them again.

A run's files come in one commit. A table may be shared by runs: then it is partitioned by `run_id`, and each run may be
replaced whole. The files do not hold that column; the table's metadata do. A commit says what it holds
(`content_version`), so a second publish of the same files changes nothing.
"""

import importlib.util
from collections.abc import Sequence

import pyarrow as pa

from raydc.config import Config
from raydc.errors import ConfigError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import absolute
from raydc.tables.common import LabelFile, Registered, below, plain

_PACKAGES = {"delta": "deltalake", "iceberg": "pyiceberg"}


def check(config: Config, run: RunDir) -> None:
    """Return if the tables of the settings can be written, before any work starts.

    Raises:
        ConfigError: a package is missing, or the label files cannot be part of the table; all problems in one message.
    """
    problems = []
    for form, package in _PACKAGES.items():
        if getattr(config.publish, form) is not None and importlib.util.find_spec(package) is None:
            problems.append(f"publish.{form}: needs the package {package}: pip install 'raydc[{form}]'.")
    if config.publish.delta is not None:
        problems += _misplaced(delta_root(config, run), artifacts.LABELS.uri(run))
    if config.publish.iceberg is not None and not config.publish.iceberg.properties and "://" in run.root:
        problems.append(
            "publish.iceberg.properties: the embedded catalog is a local file, but output is not local. Name a "
            "catalog, such as {type: rest, uri: https://...}."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def delta_root(config: Config, run: RunDir) -> str:
    """Return the folder of the Delta table."""
    section = config.publish.delta
    return artifacts.LABELS.uri(run) if section is None or section.uri is None else absolute(section.uri)


def register(config: Config, run: RunDir, files: Sequence[LabelFile], schema: pa.Schema) -> list[Registered]:
    """Commit the label files to every table of the settings and return what was done.

    Args:
        config: its section publish.
        run: whose labels they are; looked at before each commit.
        files: all of them.
        schema: of the files.

    Raises:
        StageError: a table has other columns, holds other files of this run (append), or is too busy.
    """
    done = []
    if config.publish.delta is not None:
        from raydc.tables import delta

        run.check_owner()
        done.append(delta.commit(config, run, delta_root(config, run), files, schema))
    if config.publish.iceberg is not None:
        from raydc.tables import iceberg

        run.check_owner()
        done.append(iceberg.commit(config, run, files, schema))
    return done


def _misplaced(table: str, labels: str) -> list[str]:
    if plain(table).rstrip("/") == plain(labels):
        return []
    path = below(table, labels)
    if path is None:
        return [
            f"publish.delta.uri={table}: the label files in {labels} are not below it, and Polars and Arrow cannot "
            "read a Delta table with files elsewhere. Put output below the table, or leave publish.delta.uri out for a "
            "table of each run."
        ]
    if not any(part.startswith(("_", ".")) for part in path.split("/")):
        return [
            f"publish.delta.uri={table}: VACUUM of a Delta table removes every file below it that the table does not "
            "know, and would remove models and reports of the runs. It passes over names with an underscore: set "
            f"output={table.rstrip('/')}/_runs, or leave publish.delta.uri out for a table of each run."
        ]
    return []
