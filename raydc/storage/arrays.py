"""Arrays in files that may be a stranger's: what a file claims is held against what is there, before memory is taken.

numpy takes the memory that a header names and then looks whether the numbers are there. An .npz is a zip, which may
hold a thousand times its own size.
"""

import io
import math
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt

# Deflate is asked for no more bytes than an entry claims. The other methods of a zip give whatever is inside.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, SyntaxError, TypeError, OverflowError)


def array_of(data: bytes) -> npt.NDArray[Any]:
    """Return the array of an .npy file; one of Python objects is refused unread.

    Raises:
        ValueError: it is no array of numbers or text, or not whole.
    """
    try:
        return _read(io.BytesIO(data), len(data))
    except _DAMAGE as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def arrays_of(data: bytes, most_bytes: int | None = None) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an .npz file; Python objects are refused unread.

    Args:
        data: the file.
        most_bytes: memory that its arrays may take; None where this program itself made the file.

    Raises:
        ValueError: it is no such file, it is not whole, or its arrays claim more than `most_bytes`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            claimed = sum(entry.file_size for entry in entries)
            if most_bytes is not None and claimed > most_bytes:
                raise ValueError(f"its {len(data)} bytes claim {claimed}, {most_bytes} are expected at most")
            if odd := [entry.filename for entry in entries if entry.compress_type not in _METHODS]:
                raise ValueError(f"{odd[:3]} are compressed in a way that numpy never writes")
            found = {}
            for entry in entries:
                with archive.open(entry) as handle:
                    found[entry.filename.removesuffix(".npy")] = _read(handle, entry.file_size)
            return found
    except _DAMAGE as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _read(handle: IO[bytes], size: int) -> npt.NDArray[Any]:
    """Return the array in `size` bytes, whose header must say so."""
    version = np.lib.format.read_magic(handle)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(handle)
    if dtype.kind not in "biufU":
        raise ValueError(f"numbers or text were expected, its header says {dtype}")
    claimed = handle.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != size:
        raise ValueError(f"its header claims {claimed} bytes, it has {size}")
    body = handle.read()
    # A copy: arrays over bytes cannot be written to.
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C").copy()
