"""The labeling of one slice: read, encode, assign, write, and count, in one go.

A slice's label file stands 1:1 beside its input and is published whole; the statistics file comes last and says that
the slice is complete, so a retried or resumed slice neither loses nor doubles a row. That file alone is counted: an
actor that dies after it was written has lost nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.metrics.partition_stats import Tally
from raydc.core.search.nearest import own_and_other
from raydc.data import label_files
from raydc.data.columns import class_names
from raydc.data.ids import readable
from raydc.data.reader import RowBatch, all_rejected, read_slice
from raydc.data.schema import labels_schema, level_column, rejects_schema
from raydc.data.slices import InputSpec, Slice
from raydc.data.statistics import Statistics, nearest_rows, stacked
from raydc.errors import DataError
from raydc.labeling.nearest_so_far import NearestSoFar
from raydc.model import Model, Prediction
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Artifact, Place
from raydc.storage.lake import Lake

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """What an actor needs to label slices; the same for all of them."""

    lake: Lake
    output: str
    """Folder URI: labels/, rejects/ and slices/ are written below it."""

    spec: InputSpec
    model: Model
    group_centers: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    """(G, L) centers of the groups of each level that is to be counted, in the clustering space."""

    baselines: dict[str, Model] = field(default_factory=dict)
    """Compared with the model on the rows that the sample takes."""

    seed: int = 0
    baseline_fraction: float = 0.0
    map_fraction: float = 0.0
    neighbor_fraction: float = 0.0
    num_exemplars: int = 10
    keep_vectors: bool = False
    """Keep the raw rows of the exemplars, to draw them."""

    block_rows: int = 8192

    @property
    def num_groups(self) -> int:
        """Groups of all partitions that are counted, together."""
        return num_groups(self.model, self.baselines.values())

    @property
    def place(self) -> Place:
        """The output folder."""
        return Place(self.lake, self.output)


def num_groups(model: Model, baselines: Iterable[Model]) -> int:
    """Return the groups of all partitions that labeling counts, together."""
    # The leaves once more, on the sample.
    return sum(m.num_leaves for m in (model, model, *baselines)) + sum(model.levels)


def completed(job: Labeling, part: Slice) -> Statistics | None:
    """Return the statistics of a slice that is complete, None of another.

    Raises:
        DataError: they are damaged.
    """
    done = artifacts.SLICES.of(part)
    return Statistics.from_bytes(done.read(job.place), job.num_groups) if done.exists(job.place) else None


def label_slice(
    job: Labeling,
    part: Slice,
    progress: Callable[[], None] = lambda: None,
    *,
    nearest: NearestSoFar | None = None,
) -> Statistics:
    """Label one slice, complete or not, and return its statistics.

    Args:
        job: the same for all slices.
        part: the slice.
        progress: called after each block of rows.
        nearest: leaves out rows that cannot be among the exemplars of the run, and learns of those of this slice.

    Raises:
        DataError: a bad row or unreadable bytes that the settings do not let pass.
    """
    place, done = job.place, artifacts.SLICES.of(part)
    nearest = NearestSoFar(job.num_exemplars) if nearest is None else nearest
    statistics = Statistics()
    rejects: list[pa.Table] = []
    schema = labels_schema(job.spec.arrow_id_type, list(job.model.levels))
    sampled = job.baseline_fraction > 0
    batches = read_slice(
        job.lake, part, job.spec, block_rows=job.block_rows, with_labels=True, with_carry=bool(job.spec.carry_columns)
    )
    labels = artifacts.LABELS.of(part)
    with _recorded(job, labels, statistics) as path, pq.ParquetWriter(path, schema) as writer:
        for batch in _ahead(batches):
            statistics.rows += len(batch.keys) + len(batch.rejects)
            if len(batch.rejects):
                rejects.append(batch.rejects)
            if not len(batch.keys):
                continue
            # Arrow's memory is read-only, which torch does not take: copied where it is.
            x = torch.from_numpy(np.require(batch.x, requirements=["C", "W"]))
            z = job.model.encode(x, block_rows=job.block_rows)
            found = job.model.label(z, block_rows=job.block_rows)
            _refuse_lost(part, batch, found)
            writer.write_table(_label_table(batch, found, schema))
            classes = class_names(batch.labels)
            _count(statistics, job, z, found, classes)
            if sampled:
                _count_sample(statistics, job, batch, x, z, found, classes)
            candidates = _exemplars(job, batch, found, classes, nearest)
            statistics.exemplars = nearest_rows(stacked(statistics.exemplars, candidates), job.num_exemplars)
            statistics.labels += len(found.leaf)
            progress()
    if rejects:
        table = pa.concat_tables(rejects)
        statistics.rejects = len(table)
        with _recorded(job, artifacts.REJECTS.of(part), statistics) as path:
            pq.write_table(table.cast(rejects_schema(job.spec.arrow_id_type)), path)
    done.write(place, statistics.to_bytes())
    nearest.take(part.name, statistics.exemplars, job.model.num_leaves)
    return statistics


def reject_slice(job: Labeling, part: Slice, reason: str, *, with_ids: bool) -> Statistics:
    """Put every row of a slice into its reject file, and return its statistics.

    Its label file is there too, without a row. A slice that is complete stays as it is.

    Args:
        job: where to write.
        part: the slice.
        reason: one of REJECT_REASONS.
        with_ids: whether the ids are read; null otherwise.
    """
    if (known := completed(job, part)) is not None:
        return known
    statistics = Statistics(rows=part.num_rows, rejects=part.num_rows)
    with _recorded(job, artifacts.LABELS.of(part), statistics) as path:
        pq.write_table(labels_schema(job.spec.arrow_id_type, list(job.model.levels)).empty_table(), path)
    schema = rejects_schema(job.spec.arrow_id_type)
    rejects = artifacts.REJECTS.of(part)
    with _recorded(job, rejects, statistics) as path, pq.ParquetWriter(path, schema) as writer:
        for table in all_rejected(job.lake, part, job.spec, reason, with_ids=with_ids):
            writer.write_table(table)
    artifacts.SLICES.of(part).write(job.place, statistics.to_bytes())
    return statistics


@contextmanager
def _recorded(job: Labeling, file: Artifact, statistics: Statistics) -> Iterator[Path]:
    """Yield a path to write a Parquet file to, and note what it is like when it is whole."""
    with job.lake.staged(file.uri(job.place)) as path:
        yield path
        statistics.files = stacked(statistics.files, label_files.record(file.path, path))


def _refuse_lost(part: Slice, batch: RowBatch, found: Prediction) -> None:
    if len(lost := found.beyond_float32()):
        row = part.first_row + int(batch.keys[lost[0]]) - part.first_key
        raise DataError(
            f"assign: {part.uri} row {row} leaves the range of float32 on its way through the network. Set its values "
            "right, or leave the row out."
        )


def _label_table(batch: RowBatch, found: Prediction, schema: pa.Schema) -> pa.Table:
    levels = {level_column(k): groups for k, groups in found.levels.items()}
    columns = {
        "id": batch.ids,
        "leaf": found.leaf,
        **levels,
        "confidence": found.confidence,
        "distance": found.distance,
        "second_leaf": found.second_leaf,
        "second_distance": found.second_distance,
    }
    return pa.table(columns).cast(schema)


def _count(
    statistics: Statistics, job: Labeling, z: Tensor, found: Prediction, classes: npt.NDArray[np.str_] | None
) -> None:
    _tally(statistics, "leaf", job.model.num_leaves).add(found.leaf, found.distance, found.second_distance, classes)
    for k, group_centers in job.group_centers.items():
        groups, centers = found.levels[k], torch.from_numpy(group_centers).float().to(z.device)
        own, other = _own_and_other(z, centers, groups)
        _tally(statistics, level_column(k), len(centers)).add(groups, own, other, classes)


def _own_and_other(
    z: Tensor, centers: Tensor, groups: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return each row's distance to its own group's center, and to the nearest other one."""
    own, other = own_and_other(z, centers, torch.from_numpy(groups.astype(np.int64)).to(z.device))
    return own.cpu().numpy(), other.cpu().numpy()


def _count_sample(
    statistics: Statistics,
    job: Labeling,
    batch: RowBatch,
    x: Tensor,
    z: Tensor,
    found: Prediction,
    classes: npt.NDArray[np.str_] | None,
) -> None:
    seed = stream_seed(job.seed, 9)
    chosen = sample_mask(batch.keys, seed, job.baseline_fraction)
    if not chosen.any():
        return
    here = None if classes is None else classes[chosen]
    learned = _tally(statistics, "learned", job.model.num_leaves)
    learned.add(found.leaf[chosen], found.distance[chosen], found.second_distance[chosen], here)
    before = z
    leaves = {"learned": found.leaf[chosen]}
    for name, baseline in job.baselines.items():
        points = baseline.encode(x[torch.from_numpy(chosen)], block_rows=job.block_rows)
        other = baseline.label(points, block_rows=job.block_rows)
        tally = _tally(statistics, name, baseline.num_leaves)
        tally.add(other.leaf, other.distance, other.second_distance, here)
        leaves[name] = other.leaf
        if baseline.encoder is not None:
            before = points
    # The rows for the neighbors and for the map are part of the sample: the same hash below smaller bounds.
    near = sample_mask(batch.keys, seed, job.neighbor_fraction)
    if near.any():
        columns: dict[str, Any] = {
            "key": batch.keys[near],
            "x": _lists(job.model.preprocess(x[torch.from_numpy(near)].to(z.device))),
            **{name: leaf[near[chosen]] for name, leaf in leaves.items()},
        }
        statistics.near_rows = stacked(statistics.near_rows, pa.table(columns))
    drawn = sample_mask(batch.keys, seed, job.map_fraction)
    if not drawn.any():
        return
    inside = torch.from_numpy(drawn[chosen])
    points_before = before[torch.from_numpy(drawn)] if before is z else before[inside]
    keep = pa.array(drawn)
    columns = {
        "key": batch.keys[drawn],
        "id": readable(batch.ids.filter(keep)),
        "leaf": found.leaf[drawn],
        "label": pa.array(classes[drawn].tolist() if classes is not None else [None] * int(drawn.sum()), pa.string()),
        **{level_column(k): groups[drawn] for k, groups in found.levels.items()},
        "before": _lists(points_before),
        "after": _lists(z[torch.from_numpy(drawn)]),
    }
    statistics.map_rows = stacked(statistics.map_rows, pa.table(columns))


def _exemplars(
    job: Labeling,
    batch: RowBatch,
    found: Prediction,
    classes: npt.NDArray[np.str_] | None,
    nearest: NearestSoFar,
) -> pa.Table:
    near = np.flatnonzero(nearest.may_hold(found.leaf, found.distance))
    order = near[np.lexsort((batch.keys[near], found.distance[near], found.leaf[near]))]
    leaf = found.leaf[order]
    kept = order[np.arange(len(leaf)) - np.searchsorted(leaf, leaf, side="left") < job.num_exemplars]
    take = pa.array(kept)
    columns: dict[str, Any] = {
        "leaf": found.leaf[kept],
        "key": batch.keys[kept],
        "id": readable(batch.ids.take(take)),
        "distance": found.distance[kept],
    }
    if classes is not None:
        columns["label"] = pa.array(classes[kept].tolist(), pa.string())
    if batch.carry is not None:
        columns |= {name: batch.carry[name].take(take) for name in batch.carry.column_names if name not in columns}
    if job.keep_vectors:
        columns["embedding"] = _lists(torch.from_numpy(batch.x[kept]).float())
    return pa.table(columns)


def _tally(statistics: Statistics, name: str, num_groups: int) -> Tally:
    return statistics.tallies.setdefault(name, Tally(num_groups=num_groups))


def _lists(z: Tensor) -> pa.Array:
    values = np.ascontiguousarray(z.cpu().numpy().astype(np.float32))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Yield the items, each read in a thread while the one before it is worked on."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item
