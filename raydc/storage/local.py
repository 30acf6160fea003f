"""Local files that are whole or not there: on the disk before they are renamed into place."""

import errno
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from raydc.errors import StageError
from raydc.storage.secrets import masked

MORE_ROOM = "Free space there, or use another output"

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


class WholeFiles(pa.fs.FSSpecHandler):
    """Local files for pyarrow: one appears when it is closed, and what was there stays after a write that failed.

    Ray Train replaces its list of checkpoints after each of them, and cannot go on from one that was cut off.
    """

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        """Return a stream whose file is there once it is closed."""
        return pa.PythonFile(_WholeFile(Path(path)), mode="w")


class _WholeFile:
    """The file below a stream of pyarrow; one that is dropped unclosed is not published."""

    def __init__(self, target: Path) -> None:
        self._publication = renamed_into(target)
        # Unbuffered: pyarrow hands over what it holds in one piece, and nothing is left that a close could still write.
        self._handle = next(self._publication).open("wb", buffering=0)

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while len(rest):
                rest = rest[self._handle.write(rest) :]
        except OSError:
            self._publication.close()
            raise
        return len(data)

    def tell(self) -> int:
        return self._handle.tell()

    def flush(self) -> None:
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()
        # Ended already where a write failed: nothing is published then.
        next(self._publication, None)


def renamed_into(target: Path) -> Generator[Path, None, None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = _beside(target)
    try:
        yield staged
        _flush(staged)
        os.replace(staged, target)
        _flush(target.parent)
    finally:
        staged.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Return if a folder is there to write in or can be made, without writing anything.

    Raises:
        StageError: a file is in the way, or the rights are missing.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StageError(f"storage {folder}: {place} is there and no folder. Move it away, or use another output.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StageError(
            f"storage {folder}: {place} may not be written. Give this user the right to write there, or use another "
            "output."
        )


def create_local(target: Path, data: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = _beside(target)
    try:
        staged.write_bytes(data)
        _flush(staged)
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
        _flush(target.parent)
        return True
    finally:
        staged.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a rename may reach it before the contents do."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the errors of a full disk and of missing rights into one that names the folder and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StageError(
                f"storage {folder}: no space left to write ({masked(str(error))}). {remedy}; then the same command "
                "continues."
            ) from error
        # The block may read elsewhere; only what names this folder is about writing here.
        if error.errno in _NO_RIGHT and str(folder) in str(error):
            raise StageError(
                f"storage {folder}: may not be written ({masked(str(error))}). Give this user the right to write "
                "there, or use another output."
            ) from error
        raise
