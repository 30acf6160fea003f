"""The only door to storage: local folders, s3://, gs:// and whatever else fsspec knows.

Writes are whole or not there: a local file is on the disk before it is renamed into place, an object appears when its
upload is complete. Requests to S3 are tried again as raydc/storage/s3.py says; for other stores their libraries decide.
"""

import glob
import json
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from raydc.errors import DataError
from raydc.storage import written
from raydc.storage.local import MORE_ROOM, WholeFiles, check_writable, create_local, renamed_into, told
from raydc.storage.reading import Listing, Reading, StoredFile, absolute, is_staged, join

_CREATE_TRIES = 4


__all__ = ["Lake", "Listing", "StoredFile", "absolute", "is_staged", "join"]


class Lake(Reading):
    """Reads and writes files by URI. Cheap to make, safe to send to another process."""

    def arrow_file_system(self, uri: str) -> tuple[pa.fs.FileSystem, str]:
        """Return the same as a pyarrow file system, for libraries that take one."""
        fs, path = self.file_system(uri)
        handler = WholeFiles(fs) if isinstance(fs, LocalFileSystem) else pa.fs.FSSpecHandler(fs)
        return pa.fs.PyFileSystem(handler), path

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
                written.add(Path(path).stat().st_size)
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


def _uploaded(upload: Callable[[], Any]) -> None:
    try:
        upload()
    except FileNotFoundError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code != "NoSuchUpload":
            raise
        # The answer to the end of a multipart upload was lost, and the second request found it ended.
        upload()
