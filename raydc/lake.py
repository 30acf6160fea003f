"""The only door to storage: local folders, s3://, gs:// and whatever else fsspec knows.

Writes are whole or not there: a local file is renamed into place, an object appears when its upload is complete.
"""

import errno
import json
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from raydc.errors import DataError

_CREATE_TRIES = 4


@dataclass(frozen=True)
class StoredFile:
    """One file in storage."""

    uri: str
    size: int
    """Bytes."""


class Lake:
    """Reads and writes files by URI. Cheap to make, safe to send to another process."""

    def __init__(
        self,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        anonymous: bool = False,
    ) -> None:
        client = {"region_name": region} if region else {}
        s3: dict[str, Any] = {"endpoint_url": endpoint_url, "profile": profile, "client_kwargs": client}
        self._s3_options = {k: v for k, v in s3.items() if v}
        self._anonymous = anonymous

    def file_system(self, uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the fsspec file system of `uri` and the path inside it."""
        protocol = uri.partition("://")[0] if "://" in uri else "file"
        options: dict[str, Any] = dict(self._s3_options) if protocol in ("s3", "s3a") else {}
        if self._anonymous and protocol in ("s3", "s3a"):
            options["anon"] = True
        if self._anonymous and protocol in ("gs", "gcs"):
            options["token"] = "anon"
        try:
            fs, path = url_to_fs(uri, **options)
        except (ValueError, ImportError) as error:
            raise DataError(f"storage {uri}: {error}") from None
        return fs, path

    def arrow_file_system(self, uri: str) -> tuple[pa.fs.FileSystem, str]:
        """Return the same as a pyarrow file system, for libraries that take one."""
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            return pa.fs.LocalFileSystem(), path
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(fs)), path

    def list_parquet(self, uris: str | list[str]) -> list[StoredFile]:
        """Return the Parquet files of folders, globs and files, sorted by URI, each once.

        Names that begin with `_` or `.` are passed over, as other readers do, unless they or a folder above them are
        named in the entry. Links to files count as files; links to folders are not followed.

        Raises:
            DataError: an entry names nothing.
        """
        found: dict[str, StoredFile] = {}
        for uri in [uris] if isinstance(uris, str) else uris:
            files = self._expand(uri)
            if not files:
                raise DataError(f"input.path={uri}: no Parquet file there. Check the path and the access rights.")
            found.update({f.uri: f for f in files})
        return [found[key] for key in sorted(found)]

    def _expand(self, uri: str) -> list[StoredFile]:
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        if any(c in path for c in "*?["):
            details = fs.glob(path, detail=True)
            root = re.split(r"[*?[]", path)[0].rpartition("/")[0]
            if _is_visible(path[len(root) :]):
                details = {p: d for p, d in details.items() if _is_visible(p[len(root) :])}
        elif fs.isdir(path):
            details = fs.find(path, detail=True)
            root = fs._strip_protocol(path).rstrip("/")
            details = {p: d for p, d in details.items() if p.endswith(".parquet") and _is_visible(p[len(root) :])}
        elif fs.exists(path):
            details = {path: fs.info(path)}
        else:
            details = {}
        return [
            StoredFile(absolute(fs.unstrip_protocol(p)), d["size"])
            for p, d in details.items()
            if d["type"] == "file" or (d.get("islink") and not fs.isdir(p))
        ]

    @contextmanager
    def open_parquet(self, uri: str) -> Iterator[pa.NativeFile]:
        """Open a file for random access by pyarrow.parquet."""
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            with pa.memory_map(path) as handle:
                yield handle
        else:
            with fs.open(path, "rb", cache_type="readahead", block_size=2**20) as remote:
                yield pa.PythonFile(remote, mode="r")

    def exists(self, uri: str) -> bool:
        """Return whether a file or folder is there."""
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        return fs.exists(path)

    def size(self, uri: str) -> int:
        """Return the bytes of a file."""
        fs, path = self.file_system(uri)
        return fs.info(path)["size"]

    def read_bytes(self, uri: str) -> bytes:
        """Return a whole file."""
        fs, path = self.file_system(uri)
        return fs.cat_file(path)

    def read_json(self, uri: str) -> Any:
        """Return a JSON document."""
        return json.loads(self.read_bytes(uri))

    def find(self, uri: str) -> list[StoredFile]:
        """Return every file below a folder, sorted by URI; nothing if the folder is not there."""
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        if not fs.exists(path):
            return []
        details = fs.find(path, detail=True)
        return [StoredFile(absolute(fs.unstrip_protocol(p)), details[p]["size"]) for p in sorted(details)]

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write a file whole, replacing what was there."""
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            with self.staged(uri) as staged:
                staged.write_bytes(data)
        else:
            fs.pipe_file(path, data)

    def create(self, uri: str, data: bytes) -> bool:
        """Write a file whole if nothing is there; return whether it now holds `data` of this call.

        Of several callers at once exactly one gets True, in any process on any machine: a hard link locally (an
        exclusive open where the file system has no links), If-None-Match on S3, a generation match on GCS. The file is
        read back, so `data` must hold something of the caller's own: a retried request whose first answer was lost then
        still tells its winner, and a store that ignores the condition seldom leaves two.
        """
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            return _create_local(Path(path), data)
        for attempt in range(_CREATE_TRIES):
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                break
            except OSError:
                # A refused condition, which some versions report like this, or another creation under way.
                fs.invalidate_cache()
                if not fs.exists(path) and attempt == _CREATE_TRIES - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
            else:
                break
        return self.read_bytes(uri) == data

    def write_json(self, uri: str, value: Any) -> None:
        """Write a JSON document, keys in the order given."""
        self.write_bytes(uri, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    @contextmanager
    def staged(self, uri: str) -> Iterator[Path]:
        """Yield a local path to write; publish it as `uri` when the block ends well, else leave nothing behind."""
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
            try:
                yield staged
                os.replace(staged, target)
            finally:
                staged.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory(prefix="raydc-") as folder:
                staged = Path(folder) / posixpath.basename(path)
                yield staged
                fs.put_file(str(staged), path)

    def upload_folder(self, folder: Path, uri: str) -> None:
        """Write every file below a local folder to the same names below `uri`, each whole."""
        for source in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.write_bytes(join(uri, *source.relative_to(folder).parts), source.read_bytes())

    def download_folder(self, uri: str, folder: Path) -> None:
        """Copy every file below `uri` to the same names below a local folder."""
        root = absolute(uri).rstrip("/") + "/"
        for stored in self.find(uri):
            target = folder / absolute(stored.uri).removeprefix(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read_bytes(stored.uri))

    def remove(self, uri: str) -> None:
        """Remove a file or a folder with all below it, if it is there."""
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def join(uri: str, *names: str) -> str:
    """Return the URI of a name below a folder."""
    return "/".join([uri.rstrip("/"), *names])


def is_staged(uri: str) -> bool:
    """Return whether this is a temporary file of `Lake.staged`, left behind by a process that was killed."""
    name = posixpath.basename(uri)
    return name.startswith(".") and name.endswith(".tmp")


def absolute(uri: str) -> str:
    """Return `uri` so that it means the same in another process: plain local paths become absolute ones."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _create_local(target: Path, data: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        staged.write_bytes(data)
        try:
            os.link(staged, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            try:
                with target.open("xb") as handle:
                    handle.write(data)
            except FileExistsError:
                return False
        return True
    finally:
        staged.unlink(missing_ok=True)


def _is_visible(path: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in path.split("/") if part)
