"""publish: the label files into tables, and the manifest, last of all; who sees it may trust every file it lists."""

import hashlib
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.data import label_files
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
_READERS = 8
_PROBES = 16
_MD5 = re.compile(r"[0-9a-f]{32}")


def run(config: Config, run: RunDir) -> PublishMetrics:
    """Check that the counts add up, register the label files in the tables of the settings and write _MANIFEST.json.

    The manifest lists path, rows, bytes and checksum of every file, and the version of every table. Those of label
    files were noted when they were written; a listing tells whether they are still the same. The files stay as they
    are; done again, the stage changes nothing.

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
    files = {f.uri.removeprefix(prefix): f for f in stored}
    known = _as_written(run, files)
    read = _read(run, {path: f for path, f in files.items() if path not in known})
    entries = [_noted(known[path]) if path in known else read[path] for path in files]
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
    registered = register.register(
        config, run, _label_files(run, entries, files, known), _labels_schema(config, run, profile)
    )
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


def _as_written(run: RunDir, files: Mapping[str, StoredFile]) -> dict[str, dict[str, Any]]:
    """Return what was noted of label files when they were written, of those that are still the same by the listing.

    The same size, and the same MD5 where the store names contents by it. Some stores, and buckets with keys of their
    own, name them otherwise: that is so if no name is an MD5 that was noted, while the contents are.
    """
    if not artifacts.LABEL_FILES.exists(run):
        return {}
    noted = {row["path"]: row for row in artifacts.LABEL_FILES.read(run).to_pylist()}
    of_size = {path: noted[path] for path, f in files.items() if path in noted and noted[path]["bytes"] == f.size}
    other = {path for path in of_size if _MD5.fullmatch(files[path].etag or "") is not None}
    same = {path for path in other if files[path].etag == of_size[path]["md5"]}
    other -= same
    if other and not same:
        read = _read(run, {path: files[path] for path in sorted(other)[:_PROBES]})
        if all(entry["sha256"] == of_size[path]["sha256"] for path, entry in read.items()):
            other = set()
    if changed := len(noted.keys() & files.keys()) - len(of_size) + len(other):
        log.warning("publish: %s label files are not as they were written; they are read again", f"{changed:,}")
    return {path: row for path, row in of_size.items() if path not in other}


def _noted(row: Mapping[str, Any]) -> FileEntry:
    return {"path": row["path"], "bytes": row["bytes"], "sha256": row["sha256"], "rows": row["rows"]}


def _read(run: RunDir, files: Mapping[str, StoredFile]) -> dict[str, FileEntry]:
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(files, pool.map(lambda path: _entry(run, files[path], path), files), strict=True))


def _label_files(
    run: RunDir,
    entries: list[FileEntry],
    files: Mapping[str, StoredFile],
    known: Mapping[str, Mapping[str, Any]],
) -> list[LabelFile]:
    folder = artifacts.LABELS
    return [
        LabelFile(
            path=e["path"].removeprefix(f"{folder.path}/"),
            uri=run.uri(e["path"]),
            size=e["bytes"],
            rows=e["rows"],
            sha256=e["sha256"],
            modified=files[e["path"]].modified,
            columns=label_files.from_record(known[e["path"]]) if e["path"] in known else None,
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
