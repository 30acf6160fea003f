"""publish: the label files into tables, and the manifest, last of all; who sees it may trust every file it lists."""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.data.profile import Profile
from raydc.data.schema import FORMAT_VERSION, MANIFEST, labels_schema
from raydc.errors import StageError
from raydc.model import Model
from raydc.runfolder.folder import RunDir, now
from raydc.stages import profile as profiling
from raydc.storage.lake import StoredFile, is_staged
from raydc.tables import register
from raydc.tables.register import LabelFile

log = logging.getLogger(__name__)

# Working files, which a later command may rewrite, and the manifest itself.
_NOT_LISTED = ("checkpoints/", "stages/", "slices/", "fit/", "lease/", "labels/_delta_log/", MANIFEST)
_BLOCK = 8 * 2**20


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Check that the counts add up, register the label files in the tables of the settings and write _MANIFEST.json.

    The manifest lists path, rows, bytes and checksum of every file, and the version of every table. The files stay as
    they are; done again, the stage changes nothing.

    Raises:
        StageError: files are missing or too many, or another driver has taken the run over.
    """
    prefix = run.root.rstrip("/") + "/"
    run.check_owner()
    stored = [f for f in run.lake.find(run.root) if not f.uri.removeprefix(prefix).startswith(_NOT_LISTED)]
    # A killed worker leaves its hidden temporary file behind; nobody writes any more.
    for leftover in [f for f in stored if is_staged(f.uri)]:
        run.lake.remove(leftover.uri)
        stored.remove(leftover)
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda f: _entry(run, f, f.uri.removeprefix(prefix)), stored))
    rows = {
        folder: sum(e.get("rows", 0) for e in entries if e["path"].startswith(folder + "/"))
        for folder in ("labels", "rejects")
    }
    profile = profiling.load(run)
    missing = {f"labels/{s.name}" for s in profile.slices} - {e["path"] for e in entries}
    if missing:
        raise StageError(f"publish: {len(missing)} label files are missing, such as {min(missing)}. Run the job again.")
    if rows["labels"] + rows["rejects"] != profile.num_rows:
        raise StageError(
            f"publish: {profile.num_rows} rows in, but {rows['labels']} labels and {rows['rejects']} rejects on disk. "
            "Files were changed after they were written; use a new --run-id."
        )
    if run.fence is not None:
        run.fence.advance("publish")
    registered = register.register(config, run, _label_files(run, entries), _labels_schema(config, run, profile))
    for table in registered:
        log.info(
            "publish: %s %s, %s %s",
            table.format,
            table.table,
            "committed as version" if table.committed else "held these files already, version",
            table.version,
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "finished": now(),
        "input_fingerprint": profile.fingerprint,
        "rows": {"input": profile.num_rows, **rows},
        "files": entries,
        "tables": [register.as_dict(table) for table in registered],
    }
    _write_manifest(run, manifest)
    return {"files": len(entries), "bytes": sum(e["bytes"] for e in entries), "tables": manifest["tables"]}


def _label_files(run: RunDir, entries: list[dict[str, Any]]) -> list[LabelFile]:
    return [
        LabelFile(e["path"].removeprefix("labels/"), run.uri(e["path"]), e["bytes"], e["rows"], e["sha256"])
        for e in entries
        if e["path"].startswith("labels/")
    ]


def _labels_schema(config: Config, run: RunDir, profile: Profile) -> pa.Schema:
    levels = Model.load(run.uri("model"), run.lake).levels
    return labels_schema(profile.spec.arrow_id_type, list(levels))


def _write_manifest(run: RunDir, manifest: dict[str, Any]) -> None:
    """Create the manifest; one that says the same stays as it is, another gives way to the lease's holder."""
    uri = run.uri(MANIFEST)
    run.check_owner()
    if run.lake.create(uri, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()):
        return
    before = run.lake.read_json(uri)
    if before | {"finished": None} != manifest | {"finished": None}:
        run.check_owner()
        run.lake.write_json(uri, manifest)


def _entry(run: RunDir, file: StoredFile, path: str) -> dict[str, Any]:
    fs, location = run.lake.file_system(file.uri)
    checksum = hashlib.sha256()
    with fs.open(location, "rb") as handle:
        while block := handle.read(_BLOCK):
            checksum.update(block)
    entry: dict[str, Any] = {"path": path, "bytes": file.size, "sha256": checksum.hexdigest()}
    if path.endswith(".parquet"):
        with run.lake.open_parquet(file.uri) as source:
            entry["rows"] = pq.ParquetFile(source).metadata.num_rows
    return entry
