"""Which files of a folder, a pattern or a list are Parquet; what is passed over is counted, so that it can be told.

A path that exists is that path, whatever its name looks like; only what does not exist is read as a pattern.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

PARQUET_ENDINGS = (".parquet", ".parq", ".pq")

# Files of these endings are never Parquet, so they are not opened to find out.
_OTHER_KINDS = """
arrow avro bak bin bmp bz2 cfg csv db feather gif gz h5 hdf5 html ipc ipynb jpeg jpg json jsonl log lz4 md mp4 ndjson
npy npz orc pdf pickle pkl png pt pth py rst safetensors sh sqlite svg tar tfrecord tgz toml tsv txt wav webp xml xz
yaml yml zip zst
"""
_OTHER_ENDINGS = {f".{kind}" for kind in _OTHER_KINDS.split()}

# What Spark, Hive, dask and desktops leave beside their data: no rows of anybody's.
_SIDE_FILES = re.compile(
    r"(^|/)(_SUCCESS|_metadata|_common_metadata|_committed_[^/]*|_started_[^/]*|\.DS_Store|[^/]*\.crc|"
    r"(_delta_log|\.git|\.ipynb_checkpoints|__MACOSX)/.*)$"
)

_MAGIC = (b"PAR1", b"PARE")
_READERS = 16


@dataclass
class PassedOver:
    """The files of one kind that a listing leaves out."""

    count: int = 0
    example: str = ""


@dataclass
class Found:
    """What a listing found: files by path, and what it left out by kind."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path in the file system -> its details."""

    passed_over: dict[str, PassedOver] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What else a reader should know of the place."""

    def leave_out(self, kind: str, path: str) -> None:
        """Count a path that is left out."""
        entry = self.passed_over.setdefault(kind, PassedOver(example=path))
        entry.count += 1


def passed_over_text(passed_over: dict[str, PassedOver]) -> str:
    """Return what was passed over in one line, "" for nothing."""
    if not passed_over:
        return ""
    kinds = [f"{p.count} {kind} (such as {p.example})" for kind, p in sorted(passed_over.items())]
    total = sum(p.count for p in passed_over.values())
    return f"passed over {total} {'entry' if total == 1 else 'entries'}: {', '.join(kinds)}"


def version(path: str, details: Mapping[str, Any]) -> str:
    """Return what a listing says of a file's content: its ETag or generation, else its times; "" for neither."""
    for key in ("ETag", "etag", "generation"):
        if details.get(key):
            return str(details[key])
    if "ino" not in details:
        # Other stores say a time at most, which two writes may share.
        return ""
    if not details.get("islink"):
        return f"{details['mtime']}-{details['created']}-{details['ino']}"
    # A link has its own times: those of the file it leads to count.
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_mtime}-{found.st_ctime}-{found.st_ino}"


def find_parquet(fs: AbstractFileSystem, path: str) -> Found:
    """Return the Parquet files that one entry names: a file, a folder with all below it, or a pattern of either.

    Names that begin with `_` or `.` are left out, as other readers do, unless they or a folder above them are named in
    the entry, or are a partition such as `_lang=en`. Files with a Parquet ending are taken; of the others the first
    bytes decide, where the ending does not say already what they are. Folders behind links are read, but for those
    that lead back into the folder itself.
    """
    found = Found()
    if _has_magic(path) and not fs.exists(path):
        _match(fs, path, found)
    elif fs.isdir(path):
        _descend(fs, path.rstrip("/"), found, {_real(fs, path)})
    elif fs.exists(path):
        found.files[path] = fs.info(path)
    return found


def _match(fs: AbstractFileSystem, path: str, found: Found) -> None:
    pattern, literal = _pattern(fs, path)
    inside = len(literal)
    details = fs.glob(pattern, detail=True)
    hidden_named = not _is_visible(path[inside:])
    seen: set[str] = set()
    for name, info in sorted(details.items()):
        if not hidden_named and not _is_visible(name[inside:]):
            _leave_hidden(found, name)
        elif info["type"] == "directory" or (info.get("islink") and fs.isdir(name)):
            real = _real(fs, name)
            # A folder whose files another match of the pattern has already named.
            if not any(_inside(real, other) for other in seen):
                _descend(fs, name.rstrip("/"), found, seen | {real})
                seen.add(real)
        else:
            found.files[name] = info


def _descend(fs: AbstractFileSystem, root: str, found: Found, seen: set[str]) -> None:
    """Add the files below a folder; `seen` holds the real paths of the folders that lead here."""
    unsure: dict[str, dict[str, Any]] = {}
    delta = iceberg = False
    for name, info in fs.find(root, detail=True).items():
        inside = name[len(root) :]
        delta |= "/_delta_log/" in inside
        iceberg |= "/metadata/" in inside and name.endswith(".metadata.json")
        if info.get("islink") and fs.isdir(name):
            _follow(fs, name, inside, found, seen)
        elif info.get("islink") and not name.lower().endswith(PARQUET_ENDINGS) and not fs.exists(name):
            found.leave_out("links that lead nowhere", name)
        elif info["type"] not in ("file", "other") or (info["type"] == "other" and not info.get("islink")):
            found.leave_out("neither file nor folder", name)
        elif not _is_visible(inside):
            _leave_hidden(found, name)
        elif name.lower().endswith(PARQUET_ENDINGS):
            found.files[name] = info
        elif _SIDE_FILES.search(inside):
            continue
        elif (ending := _ending(name)) in _OTHER_ENDINGS:
            found.leave_out(f"*{ending}", name)
        else:
            unsure[name] = info
    for name, is_parquet in _first_bytes(fs, list(unsure)):
        if is_parquet:
            found.files[name] = unsure[name]
        else:
            found.leave_out("not Parquet by their first bytes", name)
    if delta:
        found.notes.append(
            f"{root} is a Delta table, and its files are read as they lie, with those that the table has removed. For "
            f"its present rows set input.path to deltalake.DeltaTable({root!r}).file_uris()"
        )
    if iceberg:
        found.notes.append(
            f"{root} is an Iceberg table, and its files are read as they lie, with those of old snapshots. For its "
            "present rows set input.path to the files of table.scan().plan_files()"
        )


def _follow(fs: AbstractFileSystem, name: str, inside: str, found: Found, seen: set[str]) -> None:
    if not _is_visible(inside):
        _leave_hidden(found, name)
        return
    real = _real(fs, name)
    if any(_inside(real, other) or _inside(other, real) for other in seen):
        found.leave_out("linked folders that lead back", name)
        return
    seen.add(real)
    _descend(fs, name, found, seen)


def _leave_hidden(found: Found, name: str) -> None:
    if not _SIDE_FILES.search(name):
        found.leave_out("hidden (a name begins with _ or .)", name)


def _first_bytes(fs: AbstractFileSystem, names: list[str]) -> Iterator[tuple[str, bool]]:
    if not names:
        return
    with ThreadPoolExecutor(_READERS) as pool:
        yield from zip(names, pool.map(lambda name: fs.cat_file(name, 0, 4) in _MAGIC, names), strict=True)


def _pattern(fs: AbstractFileSystem, path: str) -> tuple[str, str]:
    """Return the pattern of a path whose parts that exist are taken literally, and the folder before any pattern."""
    literal = "/" if path.startswith("/") else ""
    escaped = literal
    parts = path.strip("/").split("/")
    for number, part in enumerate(parts):
        if _has_magic(part) and not fs.exists(literal + part):
            return escaped + "/".join(parts[number:]), literal.rstrip("/")
        literal += part + "/"
        escaped += glob.escape(part) + "/"
    return escaped.rstrip("/"), literal.rstrip("/")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _has_magic(path: str) -> bool:
    return any(c in path for c in "*?[")


def _is_visible(path: str) -> bool:
    # Spark hides names with an underscore too, but for partitions.
    return not any(p.startswith(".") or (p.startswith("_") and "=" not in p) for p in path.split("/") if p)


def _real(fs: AbstractFileSystem, path: str) -> str:
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path.rstrip("/")


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
