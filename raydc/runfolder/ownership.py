"""Whose folder it is: names of runs, folders that are not raydc's, and places that lie within one another.

raydc writes into a folder that is empty or its own, and removes there only what it wrote. A folder becomes its own by a
marker (run.json, labels.json), which is written under the lease and before anything else. So a folder that holds
files and no marker belongs to somebody else, and is left as it is.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from raydc.errors import ConfigError, StageError
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runfolder.lease import FOLDER as LEASE_FOLDER
from raydc.runfolder.lease import Fence, is_lease_file
from raydc.storage.lake import Lake, absolute, is_staged

DEMO_INPUT = "input-digits"
"""The folder below `output` in which the demo writes its input; the only input that may lie there."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The file that says that a folder is raydc's."""

    name: str
    format: str
    """Its value under the key `format`."""

    is_earlier: Callable[[dict[str, Any]], bool]
    """Tells a marker that was written before markers had a format."""

    command: str
    remedy: str

    def is_ours(self, body: Any) -> bool:
        """Return whether a document is such a marker."""
        if not isinstance(body, dict):
            return False
        return body["format"] == self.format if "format" in body else self.is_earlier(body)


def _is_earlier_run(body: dict[str, Any]) -> bool:
    return body.keys() >= {"run_id", "format_version", "started", "versions", "config"}


def _is_earlier_labels(body: dict[str, Any]) -> bool:
    return body.keys() == {"model", "input"} and all(_DIGEST.fullmatch(str(v)) for v in body.values())


RUN = Marker(
    name=artifacts.RUN.path,
    format="raydc-run",
    is_earlier=_is_earlier_run,
    command="run",
    remedy="Use another --run-id or output",
)
LABELS = Marker(
    name=artifacts.LABELED_FROM.path,
    format="raydc-labels",
    is_earlier=_is_earlier_labels,
    command="assign",
    remedy="Use another --output",
)


class OwnedFolder(Place):
    """A folder that one command works in at a time: its marker, the fence of its driver and the progress."""

    def __init__(self, lake: Lake, root: str, owner: Marker) -> None:
        super().__init__(lake, root)
        self.owner = owner
        self.fence: Fence | None = None
        """The number under which this process may write; None for readers."""

        self.progress: dict[str, str] = {}
        """What is being done, for `raydc show`; written with every heartbeat."""

    def check_owner(self) -> None:
        """Return if this process may write: before every durable step.

        Raises:
            LeaseLost: another driver has taken the folder over.
        """
        if self.fence is not None:
            self.fence.check()

    def tell(self, line: str) -> None:
        """Note what the present stage is doing."""
        self.progress["line"] = line

    def read_owner(self) -> dict[str, Any] | None:
        """Return what the marker says; None in a folder that is free.

        A folder is free if nothing is in it, or nothing but the lease of a driver that ended before it wrote the
        marker.

        Raises:
            StageError: the folder is somebody else's.
        """
        try:
            body = json.loads(self.lake.read_bytes(self.uri(self.owner.name)))
        except FileNotFoundError:
            self._refuse_foreign_files()
            return None
        except (NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
            body = None
        if not self.owner.is_ours(body):
            raise self._foreign(f"its {self.owner.name} is not one that raydc wrote")
        return body

    def write_owner(self, body: dict[str, Any]) -> None:
        """Write the marker, after another look at what is in the folder.

        Raises:
            StageError: the folder is somebody else's, or became it a moment ago.
        """
        self.check_owner()
        data = (json.dumps({"format": self.owner.format, **body}, indent=1, allow_nan=False) + "\n").encode()
        if self.read_owner() is not None:
            self.lake.write_bytes(self.uri(self.owner.name), data)
        elif not self.lake.create(self.uri(self.owner.name), data):
            raise self._foreign(f"another process has just written its {self.owner.name}")

    def _refuse_foreign_files(self) -> None:
        names = self.lake.names(self.root)
        found = [name for name in names if name != LEASE_FOLDER and not _is_left_over(name, self.owner.name)]
        if LEASE_FOLDER in names:
            lease = self.lake.names(self.uri(LEASE_FOLDER))
            found += [f"{LEASE_FOLDER}/{name}".rstrip("/") for name in lease if not is_lease_file(name)]
        if found:
            shown = ", ".join(name or "a file of this name" for name in sorted(found)[:_MOST_SHOWN])
            more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
            raise self._foreign(f"it holds {shown}{more}, and no {self.owner.name}")

    def _foreign(self, reason: str) -> StageError:
        return StageError(
            f"{self.owner.command}: {self.root} is not a folder of raydc: {reason}. Nothing there was touched. "
            f"{self.owner.remedy}, or move what is there to another place."
        )


def check_run_id(run_id: str) -> None:
    """Return if this may be the name of a run.

    Raises:
        ConfigError: it may not; such a name could lead out of `output`.
    """
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"--run-id {str(run_id)[:200]!r}: a run id has 1 to 128 letters, digits, dots, hyphens and underscores, "
            "and begins with a letter or a digit, such as imagenet-1."
        )


def overlaps(setting: str, paths: str | Sequence[str], what: str, folder: str) -> list[str]:
    """Return a sentence for each path whose files may lie in a folder, or that the folder may lie in.

    Args:
        setting: name of the paths and what comes before their value, for the message.
        paths: folders, globs or files.
        what: the same for the folder.
        folder: path or URI.
    """
    found = []
    for path in [paths] if isinstance(paths, str) else paths:
        if not _meet(path, folder):
            continue
        inner, outer = what + folder, setting + path
        if _begins_in(path, folder):
            inner, outer = outer, inner
        found.append(
            f"{inner} lies in {outer}: raydc would mix what it reads with what it writes. Choose two places beside one "
            "another."
        )
    return found


def same_place(first: str, second: str) -> bool:
    """Return whether two paths or URIs name one place."""
    return _place(first) == _place(second)


def _meet(path: str, folder: str) -> bool:
    (scheme, *pattern), (other, *parts) = _place(path), _place(folder)
    if scheme != other:
        return False
    if not _is_glob(path):
        return all(a == b for a, b in zip(pattern, parts, strict=False))
    return _names_below(pattern, parts)


def _names_below(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Return whether a glob may name a file below a folder; both as their parts."""
    if not pattern or not folder:
        return bool(pattern)
    if "**" in pattern[0]:
        return True
    return fnmatchcase(folder[0], pattern[0]) and _names_below(pattern[1:], folder[1:])


def _place(uri: str) -> tuple[str, ...]:
    """Return the scheme and the parts of a path; of a local one after its links, so that a place has one name."""
    scheme, separator, rest = absolute(uri).partition("://")
    if not separator or scheme == "local":
        scheme, rest = "", os.path.realpath(rest if separator else absolute(uri))
    return (scheme, *(part for part in rest.split("/") if part))


def _begins_in(path: str, folder: str) -> bool:
    """Return whether a path, up to its first wildcard, leads into a folder, and not only to it."""
    place, outer = _place(path), _place(folder)
    first = next((i for i, part in enumerate(place) if _is_glob(part)), len(place))
    return len(place) > len(outer) and place[:first][: len(outer)] == outer


def _is_glob(text: str) -> bool:
    return any(c in text for c in "*?[")


def _is_left_over(name: str, target: str) -> bool:
    """Return whether this is what a killed writer of `target` leaves."""
    return is_staged(name) and name.startswith(f".{target}.")
