"""The only door to storage: local folders, s3://, gs:// and whatever else fsspec knows.

Writes are whole or not there: a local file is on the disk before it is renamed into place, an object appears when its
upload is complete. Requests to S3 are tried again as raydc/storage/s3.py says; for other stores their libraries decide.
"""

import glob
import json
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from raydc.errors import ConfigError, DataError
from raydc.storage import listing, written
from raydc.storage.arrays import array_of
from raydc.storage.listing import PassedOver, passed_over_text
from raydc.storage.local import MORE_ROOM, WholeFiles, check_writable, create_local, renamed_into, told
from raydc.storage.schemes import why_refused
from raydc.storage.secrets import refuse_credentials

_S3 = ("s3", "s3a", "s3n")

_CREATE_TRIES = 4

# As `_beside` names them; a stranger's file may be hidden and end in .tmp as well.
_STAGED = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp", re.DOTALL)


@dataclass(frozen=True)
class StoredFile:
    """One file in storage."""

    uri: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Listing:
    """The files of an input, and what else lies there."""

    files: list[StoredFile]
    passed_over: dict[str, PassedOver]
    """By kind."""

    notes: list[str]


class Lake:
    """Reads and writes files by URI. Cheap to make, safe to send to another process."""

    def __init__(
        self,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        anonymous: bool = False,
        max_attempts: int = 8,
        max_wait_seconds: float = 120.0,
        timeout_seconds: float = 30.0,
    ) -> None:
        client = {"region_name": region} if region else {}
        s3: dict[str, Any] = {"endpoint_url": endpoint_url, "profile": profile, "client_kwargs": client}
        self._s3_options = {k: v for k, v in s3.items() if v}
        self._s3_options |= {
            "max_attempts": max_attempts,
            "max_wait_seconds": max_wait_seconds,
            "timeout_seconds": timeout_seconds,
        }
        self._anonymous = anonymous

    def file_system(self, uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the fsspec file system of `uri` and the path inside it.

        Raises:
            ConfigError: the URI carries credentials, or is of a kind that is not opened.
            DataError: what knows its scheme is not installed, or cannot take this URI.
        """
        refuse_credentials(uri, "uri")
        if (reason := why_refused(uri)) is not None:
            raise ConfigError(f"storage {uri} {reason}.")
        protocol = uri.partition("://")[0] if "://" in uri else "file"
        if protocol in _S3:
            from raydc.storage.s3 import PatientS3

            fs = PatientS3(**self._s3_options, **({"anon": True} if self._anonymous else {}))
            return fs, fs._strip_protocol(absolute(uri))
        if protocol == "file":
            # fsspec would take a name such as data:x, or one with `::` in it, for a file system.
            return LocalFileSystem(), LocalFileSystem._strip_protocol(uri)
        options = {"token": "anon"} if self._anonymous and protocol in ("gs", "gcs") else {}
        try:
            fs, path = url_to_fs(uri, **options)
        except (ValueError, ImportError) as error:
            raise DataError(f"storage {uri}: {error}") from None
        return fs, path

    def arrow_file_system(self, uri: str) -> tuple[pa.fs.FileSystem, str]:
        """Return the same as a pyarrow file system, for libraries that take one."""
        fs, path = self.file_system(uri)
        handler = WholeFiles(fs) if isinstance(fs, LocalFileSystem) else pa.fs.FSSpecHandler(fs)
        return pa.fs.PyFileSystem(handler), path

    def list_parquet(self, uris: str | list[str]) -> list[StoredFile]:
        """Return the Parquet files of folders, globs and files; see `find_parquet`."""
        return self.find_parquet(uris).files

    def find_parquet(self, uris: str | list[str]) -> Listing:
        """Return the Parquet files of folders, globs and files, sorted by URI, each once, and what was passed over.

        See raydc.storage.listing for what counts as one.

        Raises:
            DataError: an entry names nothing, or a file could not be looked at.
        """
        files: dict[str, StoredFile] = {}
        passed_over: dict[str, PassedOver] = {}
        notes: list[str] = []
        for uri in [uris] if isinstance(uris, str) else uris:
            fs, path = self.file_system(uri)
            fs.invalidate_cache()
            try:
                found = listing.find_parquet(fs, path)
            except PermissionError as error:
                raise DataError(f"input.path={uri}: {error}. Check the access rights.") from None
            if not found.files:
                passed = passed_over_text(found.passed_over)
                raise DataError(
                    f"input.path={uri}: no Parquet file there{f' ({passed})' if passed else ''}. "
                    "Check the path and the access rights."
                )
            named = ((_with_scheme(uri, path), details["size"]) for path, details in found.files.items())
            files.update({name: StoredFile(name, size) for name, size in named})
            for kind, some in found.passed_over.items():
                known = passed_over.setdefault(kind, PassedOver(example=some.example))
                known.count += some.count
            notes += found.notes
        return Listing([files[name] for name in sorted(files)], passed_over, notes)

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

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """Return the bytes of a file from `start` to before `stop`, fewer where it ends earlier."""
        fs, path = self.file_system(uri)
        return fs.cat_file(path, start=start, end=stop)

    def read_json(self, uri: str) -> Any:
        """Return a JSON document.

        Raises:
            DataError: it is not one.
        """
        try:
            return json.loads(self.read_bytes(uri))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{uri}: not valid JSON ({error}). Restore the file.") from None

    def read_array(self, uri: str) -> npt.NDArray[Any]:
        """Return the array of an .npy file; one that holds Python objects is refused unread.

        Raises:
            DataError: it is no array of numbers, or not whole.
        """
        try:
            return array_of(self.read_bytes(uri))
        except ValueError as error:
            raise DataError(f"{uri}: not a whole array of numbers ({_line(error)}). Restore the file.") from None

    def find(self, uri: str) -> list[StoredFile]:
        """Return every file below a folder, sorted by URI; nothing if the folder is not there."""
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        details = fs.find(path, detail=True)
        return [StoredFile(_below(uri, path, p), details[p]["size"]) for p in sorted(details)]

    def names(self, uri: str) -> list[str]:
        """Return the names directly in a folder, those of folders included, in order.

        Nothing if it is not there; an empty name if it is a file.
        """
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        root, found = path.rstrip("/"), set()
        for entry in entries:
            name = entry["name"].rstrip("/")[len(root) :].lstrip("/")
            # Tools for object stores mark a folder by an object of its name, without bytes.
            if name or not (entry["type"] == "directory" or (entry["name"].endswith("/") and not entry["size"])):
                found.add(name)
        return sorted(found)

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write a file whole, replacing what was there.

        Raises:
            StageError: there is no room, or no right to write there.
        """
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            with self.staged(uri) as staged:
                staged.write_bytes(data)
        else:
            _uploaded(lambda: fs.pipe_file(path, data))
            written.add(len(data))

    def create(self, uri: str, data: bytes) -> bool:
        """Write a file whole if nothing is there; return whether it now holds `data` of this call.

        Of several callers at once exactly one gets True, in any process on any machine: a hard link locally (an
        exclusive open where the file system has no links), If-None-Match on S3, a generation match on GCS. The file is
        read back, so `data` must hold something of the caller's own: a retried request whose first answer was lost then
        still tells its winner, and a store that ignores the condition seldom leaves two.
        """
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            with told(Path(path).parent, MORE_ROOM):
                return create_local(Path(path), data)
        # A server that ignores the condition would let a second writer replace the file of the first.
        fs.invalidate_cache()
        if fs.exists(path):
            return self.read_bytes(uri) == data
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
        """Yield a local path to write; publish it as `uri` when the block ends well, else leave nothing behind.

        Raises:
            StageError: there is no room, or no right to write there.
        """
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            with told(Path(path).parent, MORE_ROOM):
                yield from renamed_into(Path(path))
                written.add(os.path.getsize(path))
        else:
            with (
                told(Path(tempfile.gettempdir()), "Free space there, or let TMPDIR name a larger folder"),
                tempfile.TemporaryDirectory(prefix="raydc-") as folder,
            ):
                staged = Path(folder) / posixpath.basename(path)
                yield staged
                _uploaded(lambda: fs.put_file(str(staged), path))
                written.add(staged.stat().st_size)

    def upload_folder(self, folder: Path, uri: str) -> None:
        """Write every file below a local folder to the same names below `uri`, each whole."""
        for source in sorted(p for p in folder.rglob("*") if p.is_file()):
            with self.staged(join(uri, *source.relative_to(folder).parts)) as staged:
                shutil.copyfile(source, staged)

    def download_folder(self, uri: str, folder: Path) -> None:
        """Copy every file below `uri` to the same names below a local folder.

        Raises:
            DataError: the name of an object leads out of the folder.
        """
        root = absolute(uri).rstrip("/") + "/"
        for stored in self.find(uri):
            name = stored.uri.removeprefix(root)
            if ".." in name.split("/"):
                raise DataError(f"storage {stored.uri}: its name leads out of the folder. Remove or rename the object.")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read_bytes(stored.uri))

    def check_writable(self, uri: str) -> None:
        """Return if a local folder is there to write in or can be made; a store tells when it is written to.

        Raises:
            StageError: a file is in the way, or the rights are missing.
        """
        fs, path = self.file_system(uri)
        if isinstance(fs, LocalFileSystem):
            check_writable(Path(path))

    def remove(self, uri: str) -> None:
        """Remove a file or a folder with all below it, if it is there."""
        fs, path = self.file_system(uri)
        fs.invalidate_cache()
        if fs.exists(path):
            # Stores read brackets in the path as a pattern here, and would remove another folder.
            fs.rm(path if isinstance(fs, LocalFileSystem) else glob.escape(path), recursive=True)


def join(uri: str, *names: str) -> str:
    """Return the URI of a name below a folder."""
    return "/".join([uri.rstrip("/"), *names])


def is_staged(uri: str) -> bool:
    """Return whether this is a temporary file of `Lake.staged`, left behind by a process that was killed."""
    return _STAGED.fullmatch(posixpath.basename(uri)) is not None


def absolute(uri: str) -> str:
    """Return `uri` so that it means the same in another process, with one name for each scheme.

    Plain local paths become absolute ones; s3a:// and s3n:// become s3://, gcs:// becomes gs://.
    """
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    scheme, separator, rest = uri.partition("://")
    if separator:
        return f"{_ONE_NAME.get(scheme, scheme)}://{rest}"
    return os.path.abspath(os.path.expanduser(uri))


_ONE_NAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}


def _below(uri: str, root: str, path: str) -> str:
    """Return the URI of a path at or below `root`, which is the path of `uri`."""
    inside = path[len(root) :].strip("/")
    folder = absolute(uri).rstrip("/")
    return f"{folder}/{inside}" if inside else folder


def _with_scheme(uri: str, path: str) -> str:
    """Return the URI of a path in the file system of `uri`."""
    scheme, separator, _ = absolute(uri).partition("://")
    return f"{scheme}://{path.lstrip('/')}" if separator and "://" not in path else absolute(path)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _uploaded(upload: Callable[[], Any]) -> None:
    try:
        upload()
    except FileNotFoundError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code != "NoSuchUpload":
            raise
        # The answer to the end of a multipart upload was lost, and the second request found it ended.
        upload()
