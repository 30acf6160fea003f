"""Kinds of files: what is the same for every JSON document, Parquet table or folder, wherever it lies."""

import json
from dataclasses import dataclass
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from raydc.errors import DataError
from raydc.storage.lake import Lake, join

Body = TypeVar("Body")


@dataclass(eq=False)
class Place:
    """A folder in storage that holds files of a run, or labels alone."""

    lake: Lake
    root: str
    """URI."""

    def uri(self, *names: str) -> str:
        """Return the URI of a name in the folder."""
        return join(self.root, *names)


@dataclass(frozen=True)
class Artifact:
    """A file, or a folder with all below it."""

    path: str
    """Below the run folder."""

    def uri(self, place: Place) -> str:
        """Return where it is."""
        return place.uri(self.path)

    def exists(self, place: Place) -> bool:
        """Return whether it is there."""
        return place.lake.exists(self.uri(place))

    def remove(self, place: Place) -> None:
        """Remove it, if it is there."""
        place.lake.remove(self.uri(place))

    def _damaged(self, place: Place, error: Exception) -> DataError:
        """Return the error that says what is wrong with the file, and what to do."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return DataError(f"{self.uri(place)}: damaged ({reason}). Restore the file.")


class Folder(Artifact):
    """A folder whose files have names of their own."""

    def file(self, name: str) -> Artifact:
        """Return a file in it."""
        return Artifact(join(self.path, name))

    def holds(self, path: str) -> bool:
        """Return whether a path below the run folder is in it."""
        return path.startswith(f"{self.path}/")


class JsonFile(Artifact, Generic[Body]):
    """A JSON document."""

    def read(self, place: Place) -> Body:
        """Return the document.

        Raises:
            FileNotFoundError: it is not there.
            DataError: it is not JSON.
        """
        return place.lake.read_json(self.uri(place))

    def read_if_there(self, place: Place) -> Body | None:
        """Return the document, None where there is none."""
        return self.read(place) if self.exists(place) else None

    def write(self, place: Place, body: Body) -> None:
        """Write the document whole, keys in the order given."""
        place.lake.write_json(self.uri(place), body)

    def create(self, place: Place, body: Body) -> bool:
        """Write the document if nothing is there; return whether it now holds this one. See Lake.create."""
        text = json.dumps(body, indent=1, allow_nan=False) + "\n"
        return place.lake.create(self.uri(place), text.encode())


class TableFile(Artifact):
    """A Parquet file."""

    def read(self, place: Place, columns: list[str] | None = None) -> pa.Table:
        """Return the table, or some of its columns."""
        with place.lake.open_parquet(self.uri(place)) as handle:
            return pq.read_table(handle, columns=columns)

    def read_if_there(self, place: Place) -> pa.Table | None:
        """Return the table, None where there is none."""
        return self.read(place) if self.exists(place) else None

    def write(self, place: Place, table: pa.Table) -> None:
        """Write the table whole."""
        with place.lake.staged(self.uri(place)) as path:
            pq.write_table(table, path)


class BytesFile(Artifact):
    """A file that is bytes to us: a page, a picture."""

    def read(self, place: Place) -> bytes:
        """Return its content."""
        return place.lake.read_bytes(self.uri(place))

    def write(self, place: Place, body: bytes) -> None:
        """Write it whole."""
        place.lake.write_bytes(self.uri(place), body)
