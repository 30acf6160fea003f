"""The rows nearest to each leaf's center: as one small picture per leaf where the rows are images, else as text."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from raydc.report.text import clean, percent, score, short_score

MOST_LEAVES = 200
MOST_ROWS = 10

# A larger picture is shrunk: 200 leaves of ten would make a page of hundreds of megabytes.
_MOST_PIXELS = 48
# A smaller one is enlarged, so that the margin between pictures stays thin beside them.
_LEAST_PIXELS = 24
_MARGIN_PIXELS = 1
_OWN_COLUMNS = ("leaf", "key", "rank", "id", "distance", "label", "embedding")


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """One of the nearest rows of a leaf."""

    id: str
    distance: str
    label: str | None
    agrees: bool
    """Whether its label is the leaf's most frequent one."""

    carried: list[str]

    def described(self, names: Sequence[str]) -> str:
        """Return all that is known of the row, in one line."""
        label = [] if self.label is None else [f"label {self.label}"]
        carried = [f"{name} {value}" for name, value in zip(names, self.carried, strict=True)]
        return ", ".join([f"id {self.id}", *label, f"distance {self.distance}", *carried])


@dataclass(frozen=True, kw_only=True)
class Card:
    """One leaf with its nearest rows."""

    leaf: int
    rows: int
    majority: str | None
    share: str
    mean_distance: str
    silhouette: str
    color: str
    group: int | None
    """Group at the coarsest level."""

    exemplars: list[Exemplar]
    picture: str | None
    """The rows side by side, as a data URI."""


@dataclass(frozen=True)
class Cards:
    """The leaves that are shown."""

    cards: list[Card]
    carried: list[str]
    """Names of the carried columns."""

    left_out: int


def make_cards(
    leaves: pa.Table,
    exemplars: pa.Table | None,
    *,
    colors: Sequence[str],
    group_column: str | None = None,
    image_shape: Sequence[int] | None = None,
) -> Cards:
    """Return a card for each leaf, in tree order; of more than 200 leaves, the largest.

    Args:
        leaves: one row per leaf: leaf, rows, mean_distance, silhouette, majority_label, majority_share, level columns.
        exemplars: leaf, rank, id, distance, optionally label, embedding and carried columns; None where there are none.
        colors: (K,) color of each leaf.
        group_column: column of `leaves` under whose values the leaves are listed.
        image_shape: (height, width) or (height, width, channels) of an embedding.
    """
    chosen = _largest(leaves["rows"].to_numpy())
    exemplars = _nearest(exemplars, chosen)
    carried = [name for name in exemplars.column_names if name not in _OWN_COLUMNS]
    pictures = _images(exemplars, image_shape)
    of_leaf = exemplars["leaf"].to_numpy()
    described = leaves.take(pa.array(chosen)).to_pylist()
    cards = []
    for about in described:
        first, end = np.searchsorted(of_leaf, [about["leaf"], about["leaf"] + 1])
        majority = about.get("majority_label")
        cards.append(
            Card(
                leaf=about["leaf"],
                rows=about["rows"],
                majority=None if majority is None else clean(majority, 40),
                share=percent(about.get("majority_share")),
                mean_distance=short_score(about.get("mean_distance")),
                silhouette=short_score(about.get("silhouette")),
                color=colors[about["leaf"]],
                group=about[group_column] if group_column else None,
                exemplars=_exemplars(exemplars.slice(first, end - first), carried, majority),
                picture=None if pictures is None or first == end else data_uri(contact_sheet(pictures[first:end])),
            )
        )
    return Cards(cards, [clean(name, 40) for name in carried], len(leaves) - len(cards))


def _largest(rows_K: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.sort(np.argsort(-rows_K, kind="stable")[:MOST_LEAVES])


def _nearest(exemplars: pa.Table | None, leaves: npt.NDArray[np.int64]) -> pa.Table:
    """Return the ten nearest rows of the chosen leaves, sorted by leaf and distance."""
    if exemplars is None:
        return pa.table({"leaf": pa.array([], pa.int32())})
    leaf = exemplars["leaf"].to_numpy()
    closeness = exemplars["rank" if "rank" in exemplars.column_names else "distance"].to_numpy()
    order = np.lexsort((closeness, leaf))
    leaf = leaf[order]
    place = np.arange(len(leaf)) - np.searchsorted(leaf, leaf, side="left")
    return exemplars.take(pa.array(order[(place < MOST_ROWS) & np.isin(leaf, leaves)]))


def _exemplars(rows: pa.Table, carried: list[str], majority: str | None) -> list[Exemplar]:
    kept = [name for name in rows.column_names if name != "embedding"]
    found = []
    for row in rows.select(kept).to_pylist():
        label = row.get("label")
        found.append(
            Exemplar(
                id=clean(row["id"], 60),
                distance=score(row.get("distance")),
                label=None if label in (None, "") else clean(label, 40),
                agrees=majority is None or str(label) == str(majority),
                carried=["" if row[name] is None else clean(row[name]) for name in carried],
            )
        )
    return found


def _images(exemplars: pa.Table, shape: Sequence[int] | None) -> npt.NDArray[np.uint8] | None:
    """Return the rows as (N, height, width, 1 or 3) pixels, or None where they are not images.

    Brightness is stretched between the 0.5th and 99.5th percentile of all pictures on the page, so that leaves can be
    compared and a single outlier does not darken the rest.
    """
    if shape is None or "embedding" not in exemplars.column_names or not exemplars.num_rows:
        return None
    values = matrix(exemplars["embedding"])
    if values.shape[1] != math.prod(shape):
        return None
    pixels = values.reshape(len(values), shape[0], shape[1], -1)
    if pixels.shape[3] not in (1, 3):
        pixels = pixels.mean(axis=3, keepdims=True)
    low, high = np.percentile(pixels[np.isfinite(pixels)], [0.5, 99.5]) if np.isfinite(pixels).any() else (0.0, 1.0)
    stretched = (np.nan_to_num(pixels) - low) / max(high - low, 1e-12)
    return (255 * np.clip(stretched, 0, 1)).round().astype(np.uint8)


def contact_sheet(pictures_NHWC: npt.NDArray[np.uint8]) -> bytes:
    """Return up to ten pictures side by side as a PNG, always ten wide, so that all sheets of a page are to scale."""
    tiles = [_tile(picture) for picture in pictures_NHWC[:MOST_ROWS]]
    blank = np.zeros_like(tiles[0])
    sheet = np.hstack([*tiles, *[blank] * (MOST_ROWS - len(tiles))])
    buffer = io.BytesIO()
    Image.fromarray(sheet, "LA" if sheet.shape[2] == 2 else "RGBA").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _tile(picture_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a picture with an opaque alpha channel and a transparent margin."""
    height, width = picture_HWC.shape[:2]
    if max(height, width) < _LEAST_PIXELS:
        times = math.ceil(_LEAST_PIXELS / max(height, width))
        picture_HWC = picture_HWC.repeat(times, axis=0).repeat(times, axis=1)
    if max(height, width) > _MOST_PIXELS:
        scale = _MOST_PIXELS / max(height, width)
        image = Image.fromarray(picture_HWC.squeeze(2) if picture_HWC.shape[2] == 1 else picture_HWC)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture_HWC = np.atleast_3d(np.asarray(image.resize(size, Image.Resampling.BOX)))
    opaque = np.dstack([picture_HWC, np.full(picture_HWC.shape[:2], 255, np.uint8)])
    return np.pad(opaque, ((0, 0), (_MARGIN_PIXELS, _MARGIN_PIXELS), (0, 0)))


def data_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return a list column whose lists are all of one length as (N, D) float32."""
    if not len(column):
        return np.zeros((0, 0), np.float32)
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)
