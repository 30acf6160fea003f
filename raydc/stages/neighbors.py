"""neighbors: the nearest neighbors of every row that is trained on, for the objectives that learn from them.

The rows of each slice, preprocessed, lie in the object store once, as shards. A task takes the rows of one slice as
queries, goes through the shards one by one and writes the slice's file whole; a slice whose file is there is not done
again. Exact search costs 2 N^2 D operations, and a task holds about 4 D (rows of its slice + rows of one shard) bytes.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from raydc.config import Config, NeighborsConfig
from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.models.preprocess import Preprocess
from raydc.core.process import prepare_process
from raydc.core.search.knn import Neighbors, Shard, cell_centers, nearest_cells, num_hits, prepare, search
from raydc.data.metrics import NeighborFacts, NeighborsMetrics
from raydc.data.reader import read_slice
from raydc.data.slices import InputSpec, Slice
from raydc.errors import DataError, StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runtime.attempts import Bound
from raydc.runtime.board import bounded
from raydc.runtime.failures import error_of
from raydc.runtime.session import in_one_line, root_cause

log = logging.getLogger(__name__)

_LESS_MEMORY = "If memory was short, give the workers more, or lower input.slice_bytes under a new --run-id."

_CELL_SAMPLE = 64
"""Rows per cell from which the cells of the approximate search are made."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every task needs to know."""

    run: RunDir
    spec: InputSpec
    preprocess: Preprocess
    section: NeighborsConfig
    seed: int
    fraction: float
    """Share of the rows that the fit is trained on."""

    bound: Bound
    """On the attempts at a slice. A task is a pure function of it, so Ray may run it again."""


def run(config: Config, run: RunDir) -> NeighborsMetrics:
    """Write neighbors/: one Parquet file per slice with the key, neighbors and similarities of each trained row."""
    with bounded("neighbors", config, run) as bound:
        return _run(config, run, bound)


def _run(config: Config, run: RunDir, bound: Bound) -> NeighborsMetrics:
    profile = artifacts.PROFILE.read(run)
    job = Job(
        run=run,
        spec=profile.spec,
        preprocess=profile.preprocess(config),
        section=config.neighbors,
        seed=config.seed,
        fraction=profile.trained_fraction(config),
        bound=bound,
    )
    slices = [s for s in profile.slices if s.num_rows]
    done = [s for s in slices if artifacts.NEIGHBORS.of(s).exists(run)]
    if len(done) < len(slices):
        if done:
            log.info("neighbors: %d of %d slices are there already", len(done), len(slices))
        try:
            _search_all(job, slices, {s.index for s in done})
        except ray.exceptions.RayError as error:
            cause = root_cause(error)
            if isinstance(cause, DataError):
                raise DataError(f"neighbors: {cause}") from error
            text = f"neighbors: {in_one_line(cause)}. Complete slices are kept; the same command continues."
            raise error_of(cause, text) from error
    metrics = _summary(job, slices)
    if metrics["method"] == "ivf":
        log.info("neighbors: approximate, recall %.4f on %d rows", metrics["recall"], metrics["recall_rows"])
    return metrics


def _search_all(job: Job, slices: list[Slice], done: set[int]) -> None:
    section, retries = job.section, job.bound.retries
    load = ray.remote(num_cpus=section.cpus_per_task, max_retries=retries, num_returns=2)(_load)
    loaded: list[Any] = [load.remote(job, part) for part in slices]
    shards = [rows for rows, _ in loaded]
    num_rows = sum(ray.get([count for _, count in loaded]))
    if num_rows <= section.num:
        raise StageError(
            f"neighbors: {num_rows} rows cannot have {section.num} neighbors each. Lower neighbors.num, or raise "
            "fit.max_rows."
        )
    exact = section.method == "exact" or (section.method == "auto" and num_rows <= section.exact_rows)
    centers: Any = None
    if not exact:
        num_cells = max(1, math.isqrt(num_rows))
        log.info("neighbors: %d rows, approximate search in %d cells", num_rows, num_cells)
        train = ray.remote(num_cpus=section.cpus_per_task, max_retries=retries)(_train_cells)
        centers = train.remote(job, shards, num_cells, num_rows)
        sort = ray.remote(num_cpus=section.cpus_per_task, max_retries=retries)(_sort_into_cells)
        shards = [sort.remote(job, part, shard, centers) for part, shard in zip(slices, shards, strict=True)]
    recall_fraction = 0.0 if exact else section.recall_rows / num_rows
    task = ray.remote(num_cpus=section.cpus_per_task, max_retries=retries)(_search_slice)
    waiting = [
        task.remote(job, part, shards, number, centers, recall_fraction)
        for number, part in enumerate(slices)
        if part.index not in done
    ]
    while waiting:
        finished, waiting = ray.wait(waiting, num_returns=1)
        ray.get(finished)
        line = f"{len(slices) - len(waiting)} of {len(slices)} slices"
        job.run.tell(line)
        log.info("neighbors: %s", line)
        if job.bound.gauges is not None:
            job.bound.gauges.set(raydc_slices_left=len(waiting))


def _load(job: Job, part: Slice) -> tuple[Shard, int]:
    """Return the trained rows of a slice, and how many they are: none if it is left out."""
    prepare_process(job.section.cpus_per_task)
    keys, rows = [np.empty(0, np.int64)], [np.empty((0, job.spec.dim), np.float32)]
    with job.bound.attempt(part.name) as lost:
        left_out = job.bound.is_left_out(part, lost, job.spec.on_bad_files)
        for batch in () if left_out else read_slice(job.run.lake, part, job.spec):
            chosen = sample_mask(batch.keys, stream_seed(job.seed, 8), job.fraction)
            x = job.preprocess(torch.from_numpy(np.require(batch.x[chosen], requirements=["C", "W"]))).numpy()
            keys.append(batch.keys[chosen])
            rows.append(prepare(x, job.section.metric))
        shard = Shard.from_rows(np.concatenate(keys), np.concatenate(rows))
    return shard, len(shard.keys_N)


def _train_cells(job: Job, shards: list[Any], num_cells: int, num_rows: int) -> npt.NDArray[np.float32]:
    prepare_process(job.section.cpus_per_task)
    sample = []
    with job.bound.attempt("cells") as lost:
        job.bound.require(lost, f"making the {num_cells} cells of the approximate search", _LESS_MEMORY)
        for reference in shards:
            shard: Shard = ray.get(reference)
            chosen = sample_mask(shard.keys_N, stream_seed(job.seed, 12), num_cells * _CELL_SAMPLE / num_rows)
            sample.append(shard.x_ND[chosen])
        return cell_centers(np.concatenate(sample), num_cells, seed=stream_seed(job.seed, 13))


def _sort_into_cells(job: Job, part: Slice, shard: Shard, centers: npt.NDArray[np.float32]) -> Shard:
    prepare_process(job.section.cpus_per_task)
    with job.bound.attempt(f"{part.name}.cells") as lost:
        job.bound.require(lost, f"sorting the rows of {part.uri} into cells", _LESS_MEMORY)
        return shard.in_cells(centers, job.section.metric)


def _search_slice(
    job: Job,
    part: Slice,
    shards: list[Any],
    number: int,
    centers: npt.NDArray[np.float32] | None,
    recall_fraction: float,
) -> None:
    """Search the rows of shard `number` among all shards and write the file of their slice."""
    prepare_process(job.section.cpus_per_task)
    with job.bound.attempt(f"{part.name}.search") as lost:
        job.bound.require(lost, f"searching the neighbors of {part.uri}", _LESS_MEMORY)
        _search_rows(job, part, shards, number, centers, recall_fraction)


def _search_rows(
    job: Job,
    part: Slice,
    shards: list[Any],
    number: int,
    centers: npt.NDArray[np.float32] | None,
    recall_fraction: float,
) -> None:
    own: Shard = ray.get(shards[number])
    order = np.argsort(own.keys_N)
    keys, x = own.keys_N[order], np.ascontiguousarray(own.x_ND[order])
    hits = wanted = 0
    if centers is None:
        found = _through(job, keys, x, shards, None)
    else:
        probes = nearest_cells(x, centers, min(job.section.num_probes, len(centers)), job.section.metric)
        found = _through(job, keys, x, shards, probes)
        asked = sample_mask(keys, stream_seed(job.seed, 14), recall_fraction)
        # A row whose cells hold too few is looked up among all rows, so that every row has its number of neighbors.
        again = np.flatnonzero(asked | found.missing_Q)
        exact = _through(job, keys[again], x[again], shards, None)
        sampled = asked[again]
        hits = num_hits(found.take(again[sampled]), exact.take(np.flatnonzero(sampled)))
        wanted = int(sampled.sum()) * job.section.num
        short = found.missing_Q[again]
        found.keys_QM[again[short]], found.scores_QM[again[short]] = exact.keys_QM[short], exact.scores_QM[short]
    similarity = float(found.scores_QM.sum())
    facts: NeighborFacts = {"exact": centers is None, "hits": hits, "wanted": wanted, "similarity": similarity}
    # A worker outlives its driver by a moment; by then the run may have another one.
    job.run.check_owner()
    artifacts.NEIGHBORS.write(job.run, part, keys, found.keys_QM, found.scores_QM.astype(np.float32), facts)


def _through(
    job: Job, keys: npt.NDArray[np.int64], x: npt.NDArray[np.float32], shards: list[Any], probes: Any
) -> Neighbors:
    found = Neighbors.none(len(keys), job.section.num)
    for reference in shards:
        # One shard at a time: it is fetched, looked through and let go.
        found = search(keys, x, ray.get(reference), found, metric=job.section.metric, probes_QP=probes)
    return found


def _summary(job: Job, slices: list[Slice]) -> NeighborsMetrics:
    """Return what the files say, so that slices of an earlier attempt count like the others."""
    rows = hits = wanted = 0
    exact, similarity = True, 0.0
    for part in slices:
        num_rows, facts = artifacts.NEIGHBORS.read_facts(job.run, part)
        rows += num_rows
        hits, wanted = hits + facts["hits"], wanted + facts["wanted"]
        exact, similarity = exact and facts["exact"], similarity + facts["similarity"]
    num = job.section.num
    return {
        "rows": rows,
        "num": num,
        "metric": job.section.metric,
        "method": "exact" if exact else "ivf",
        "recall": 1.0 if exact else (hits / wanted if wanted else None),
        "recall_rows": rows if exact else wanted // num,
        "mean_similarity": similarity / max(rows * num, 1),
    }
