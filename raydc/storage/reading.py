"""Reading by URI: local folders, s3://, gs:// and whatever else fsspec knows."""

import datetime
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import fsspec
import numpy.typing as npt
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from raydc.errors import ConfigError, DataError
from raydc.storage import listing
from raydc.storage.arrays import array_of
from raydc.storage.listing import PassedOver, passed_over_text
from raydc.storage.schemes import why_refused
from raydc.storage.secrets import refuse_credentials

_S3 = ("s3", "s3a", "s3n")

# As `_beside` names them; a stranger's file may be hidden and end in .tmp as well.
_STAGED = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp", re.DOTALL)


@dataclass(frozen=True)
class StoredFile:
    """One file in storage."""

    uri: str
    size: int
    """Bytes."""

    _: KW_ONLY
    modified: float | None = None
    """Unix time of the last change, where a listing tells it."""

    etag: str | None = None
    """What the store calls this content, where it does; the MD5 of the bytes, or not."""

    version: str = ""
    """ETag, or times of change, as its listing says them; "" where it says none."""


@dataclass(frozen=True)
class Listing:
    """The files of an input, and what else lies there."""

    files: list[StoredFile]
    passed_over: dict[str, PassedOver]
    """By kind."""

    notes: list[str]

    @property
    def digest(self) -> str:
        """Hash of each file's name, size and version: equal for unchanged files. "" where a file has no version."""
        seen = hashlib.sha256()
        for file in self.files:
            if not file.version:
                return ""
            seen.update(repr((file.uri, file.size, file.version)).encode("utf-8", "surrogatepass"))
        return seen.hexdigest()


class Reading:
    """The half of a Lake that reads."""

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
            for path, details in found.files.items():
                name = _with_scheme(uri, path)
                files[name] = StoredFile(name, details["size"], version=listing.version(path, details))
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
        return [
            StoredFile(_below(uri, path, p), details[p]["size"], modified=_modified(details[p]), etag=_etag(details[p]))
            for p in sorted(details)
        ]

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


def _modified(details: dict[str, Any]) -> float | None:
    """Return the time that a listing of local files or of S3 tells."""
    found = details.get("mtime", details.get("LastModified"))
    return found.timestamp() if isinstance(found, datetime.datetime) else found


def _etag(details: dict[str, Any]) -> str | None:
    found = details.get("ETag")
    return found.strip('"') if isinstance(found, str) else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
