"""publish: the label files into tables, and the manifest, last of all; who sees it may trust every file it lists."""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.data.profile import Profile
from raydc.data.records import FileEntry, Manifest, PublishMetrics
from raydc.data.schema import FORMAT_VERSION, labels_schema
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir, now
from raydc.runfolder.formats import Folder
from raydc.storage.lake import StoredFile, is_staged
from raydc.tables import register
from raydc.tables.common import LabelFile

log = logging.getLogger(__name__)

_BLOCK = 8 * 2**20


def run(config: Config, run: RunDir) -> PublishMetrics:
    """Check that the counts add up, register the label files in the tables of the settings and write _MANIFEST.json.

    The manifest lists path, rows, bytes and checksum of every file, and the version of every table. The files stay as
    they are; done again, the stage changes nothing.

    Raises:
        StageError: files are missing or too many, or another driver has taken the run over.
    """
    prefix = run.root.rstrip("/") + "/"
    run.check_owner()
    stored = [f for f in run.lake.find(run.root) if _is_listed(f.uri.removeprefix(prefix))]
    # A killed worker leaves its hidden temporary file behind; nobody writes any more.
    for leftover in [f for f in stored if is_staged(f.uri)]:
        run.lake.remove(leftover.uri)
        stored.remove(leftover)
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda f: _entry(run, f, f.uri.removeprefix(prefix)), stored))
    profile = artifacts.PROFILE.read(run)
    labels, rejects = (_rows_in(folder, entries) for folder in (artifacts.LABELS, artifacts.REJECTS))
    missing = {artifacts.LABELS.of(s).path for s in profile.slices} - {e["path"] for e in entries}
    if missing:
        raise StageError(f"publish: {len(missing)} label files are missing, such as {min(missing)}. Run the job again.")
    if labels + rejects != profile.num_rows:
        raise StageError(
            f"publish: {profile.num_rows} rows in, but {labels} labels and {rejects} rejects on disk. "
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
    manifest: Manifest = {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "finished": now(),
        "input_fingerprint": profile.fingerprint,
        "rows": {"input": profile.num_rows, "labels": labels, "rejects": rejects},
        "files": entries,
        "tables": [table.to_json() for table in registered],
    }
    _write_manifest(run, manifest)
    return {"files": len(entries), "bytes": sum(e["bytes"] for e in entries), "tables": manifest["tables"]}


def _is_listed(path: str) -> bool:
    return path != artifacts.MANIFEST.path and not any(folder.holds(path) for folder in artifacts.UNLISTED)


def _rows_in(folder: Folder, entries: list[FileEntry]) -> int:
    return sum(e.get("rows", 0) for e in entries if folder.holds(e["path"]))


def _label_files(run: RunDir, entries: list[FileEntry]) -> list[LabelFile]:
    folder = artifacts.LABELS
    return [
        LabelFile(
            path=e["path"].removeprefix(f"{folder.path}/"),
            uri=run.uri(e["path"]),
            size=e["bytes"],
            rows=e["rows"],
            sha256=e["sha256"],
        )
        for e in entries
        if folder.holds(e["path"])
    ]


def _labels_schema(config: Config, run: RunDir, profile: Profile) -> pa.Schema:
    levels = artifacts.MODEL.load(run).levels
    return labels_schema(profile.spec.arrow_id_type, list(levels))


def _write_manifest(run: RunDir, manifest: Manifest) -> None:
    """Create the manifest; one that says the same stays as it is, another gives way to the lease's holder."""
    run.check_owner()
    if artifacts.MANIFEST.create(run, manifest):
        return
    before = artifacts.MANIFEST.read(run)
    if {**before, "finished": None} != {**manifest, "finished": None}:
        run.check_owner()
        artifacts.MANIFEST.write(run, manifest)


def _entry(run: RunDir, file: StoredFile, path: str) -> FileEntry:
    fs, location = run.lake.file_system(file.uri)
    checksum = hashlib.sha256()
    with fs.open(location, "rb") as handle:
        while block := handle.read(_BLOCK):
            checksum.update(block)
    entry: FileEntry = {"path": path, "bytes": file.size, "sha256": checksum.hexdigest()}
    if path.endswith(".parquet"):
        with run.lake.open_parquet(file.uri) as source:
            entry["rows"] = pq.ParquetFile(source).metadata.num_rows
    return entry
