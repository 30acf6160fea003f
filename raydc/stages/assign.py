"""assign: label every row of every slice, in actors that Ray Data schedules; rows in = labels + rejects, checked."""

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from raydc.config import Config
from raydc.core.metrics.neighbor_agreement import Agreement, agreement, gain, nearest_neighbors
from raydc.core.objectives.table import info
from raydc.core.process import prepare_process
from raydc.data.metrics import AgreementRecord, MethodAgreement
from raydc.data.records import AssignMetrics
from raydc.data.slices import InputSpec, Slice
from raydc.data.statistics import Statistics
from raydc.errors import DataError, StageError
from raydc.labeling.label_slice import Labeling, label_slice, reject_slice
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.ownership import OwnedFolder
from raydc.runtime.attempts import Bound
from raydc.runtime.board import bounded
from raydc.runtime.failures import error_of
from raydc.runtime.memory import give_back
from raydc.runtime.remedies import remedy
from raydc.runtime.session import can_grow, root_cause
from raydc.storage.secrets import masked

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_FULL_POOL = 0.75
_LESS_MEMORY = "If memory was short, lower assign.num_actors, or give the workers more."
_CONTINUES = "Complete slices are kept; the same command continues."
_RESULTS = pa.schema([("statistics", pa.large_binary()), ("kind", pa.string()), ("failure", pa.string())])


def run(config: Config, run: RunDir) -> AssignMetrics:
    """Write labels/, rejects/, exemplars.parquet and map_rows.parquet, and the statistics of every metric.

    agreement.json says how the learned partition and the baselines treat nearest neighbors; the rows among which these
    are looked up are not kept.
    """
    profile = artifacts.PROFILE.read(run)
    load = partial(_load, config, run, profile.spec, profile.num_rows)
    with bounded("assign", config, run, stall_seconds=config.assign.stall_seconds) as bound:
        total = label_all(config, load, profile.slices, config.evaluate.num_exemplars, bound, run)
    for file, table in ((artifacts.EXEMPLARS, total.exemplars), (artifacts.MAP_ROWS, total.map_rows)):
        if table is not None:
            file.write(run, table.sort_by("key"))
    # What the slices took on their way.
    give_back()
    if (found := neighbor_agreement(config, total)) is not None:
        artifacts.AGREEMENT.write(run, found)
    artifacts.STATISTICS.write(run, total)
    return {"rows": total.rows, "labels": total.labels, "rejects": total.rejects, "slices": len(profile.slices)}


def _load(config: Config, run: RunDir, spec: InputSpec, num_rows: int) -> Labeling:
    """Return what an actor needs, read from the run folder by the actor itself."""
    model, leaves = artifacts.MODEL.load(run), artifacts.LEAVES.read(run)
    baselines = artifacts.baselines_of(run)
    section = config.evaluate
    learned = info(config.fit.objective).baseline != "raw_kmeans"
    near_rows = min(section.neighbor_rows, section.baseline_rows) if baselines and learned else 0
    return Labeling(
        lake=run.lake,
        output=run.root,
        spec=spec,
        model=model,
        group_centers={k: leaves.group_centers(groups) for k, groups in model.levels.items()},
        baselines=baselines,
        seed=config.seed,
        baseline_fraction=section.baseline_rows / num_rows,
        map_fraction=min(section.map_rows, section.baseline_rows) / num_rows,
        neighbor_fraction=near_rows / num_rows,
        num_exemplars=section.num_exemplars,
        keep_vectors=config.input.image_shape is not None,
        block_rows=config.assign.block_rows,
    )


def neighbor_agreement(config: Config, total: Statistics) -> AgreementRecord | None:
    """Return how each method's partition agrees with the nearest neighbors of raw rows; None without a sample of them.

    Args:
        config: for the number of neighbors and of queries.
        total: of all slices; its `near_rows` are taken away, since a copy of them in order takes their place.
    """
    section = config.evaluate
    near_rows, total.near_rows = total.near_rows, None
    if near_rows is None or near_rows.num_rows <= section.num_neighbors:
        return None
    order = np.argsort(near_rows["key"].to_numpy(), kind="stable")
    names = [name for name in near_rows.column_names if name not in ("key", "x")]
    leaves = {name: near_rows[name].to_numpy()[order] for name in names}
    x = _in_order(near_rows["x"], order)
    del near_rows
    near = nearest_neighbors(x, num=section.num_neighbors, max_queries=section.neighbor_queries)
    methods = {name: agreement(leaf, near) for name, leaf in leaves.items()}
    raw = methods["raw_kmeans"]
    found = {name: _method(own, raw) for name, own in methods.items()}
    return {
        "rows": len(x),
        "queries": len(near.queries_Q),
        "num_neighbors": section.num_neighbors,
        "num_leaves": config.cluster.num_leaves,
        "methods": found,
    }


def _method(own: Agreement, raw: Agreement) -> MethodAgreement:
    difference, error = gain(own, raw)
    return {
        "score": own.score,
        "share": own.share,
        "chance": own.chance,
        "num_effective": own.num_effective,
        "gain": difference,
        "standard_error": error,
    }


def _in_order(lists: pa.ChunkedArray, order_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return lists of one length as (N, D), row order_N[i] at i; each is copied once, to where it belongs."""
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    x_ND, first = np.empty((len(lists), lists.type.list_size), np.float32), 0
    for chunk in lists.chunks:
        x_ND[place_N[first : first + len(chunk)]] = chunk.flatten().to_numpy().reshape(len(chunk), -1)
        first += len(chunk)
    return x_ND


def label_all(
    config: Config,
    load: Callable[[], Labeling],
    slices: list[Slice],
    num_exemplars: int,
    bound: Bound,
    run: OwnedFolder | None = None,
    *,
    slots: int | None = None,
) -> Statistics:
    """Return the sum of all slices' statistics, after every slice was labeled.

    A slice that kills its process stops the run after `bound.most` deaths; under on_bad_files=quarantine its rows go to
    the rejects instead. It is on_bad_files because the file is what cannot be used: no row of it was seen to be bad.

    Args:
        config: for the resources of the actors.
        load: called once in each actor.
        slices: to be labeled; those that are complete already are only counted.
        num_exemplars: nearest rows kept for each leaf.
        bound: on the attempts at a slice.
        run: gets the progress; its lease is checked before each slice is written. Default: neither.
        slots: actors for which there is room at the start. Default: what the cluster offers now.

    Raises:
        DataError: a bad row or file that the settings do not let pass, or a slice that kills its process.
        StageError: a worker failed for good, or rows in are not labels + rejects.
    """
    total = Statistics()
    started = logged = time.monotonic()
    expected = sum(s.num_rows for s in slices)
    check = run.check_owner if run is not None else None
    # Closed at once when something stops the loop: an error's traceback would keep the actors and their readers alive.
    slots = free_slots(config) if slots is None else slots
    with closing(_labeled(config, load, slices, bound, check, slots)) as labeled:
        for done, statistics in enumerate(labeled, 1):
            total.merge(statistics, num_exemplars)
            now = time.monotonic()
            rate = total.rows / (now - started)
            left = (expected - total.rows) / max(rate, 1e-9)
            # Slices without rows come first at times: nothing is known of the speed then.
            ending = f", {left:.0f} s left" if total.rows else ""
            line = f"{done} of {len(slices)} slices, {total.rows:,} rows, {rate:,.0f} rows/s{ending}"
            if run is not None:
                run.tell(line)
            if bound.gauges is not None:
                bound.gauges.set_at_times(**_measures(total, rate, len(slices) - done))
            if now - logged > _LOG_SECONDS:
                logged = now
                log.info("assign: %s", line)
    if bound.gauges is not None:
        bound.gauges.set(**_measures(total, total.rows / max(time.monotonic() - started, 1e-9), 0))
    if not total.rows == total.labels + total.rejects == expected:
        raise StageError(
            f"assign: {expected} rows in, but {total.labels} labels and {total.rejects} rejects out. The input changed "
            "while the run was reading it, or files under labels/ were touched; use a new --run-id."
        )
    return total


def _measures(total: Statistics, rate: float, slices_left: int) -> dict[str, float]:
    """Return the values of the gauges while rows are labeled."""
    return {
        "raydc_rows": total.rows,
        "raydc_rows_per_second": rate,
        "raydc_slices_left": slices_left,
        "raydc_rejects": total.rejects,
    }


def _labeled(
    config: Config,
    load: Callable[[], Labeling],
    slices: list[Slice],
    bound: Bound,
    check: Callable[[], None] | None,
    slots: int,
) -> Generator[Statistics]:
    section = config.assign
    # Where nodes may join, no count of today bounds the pool: Ray Data adds actors as it finds room, and asks for twice
    # the room while all are busy. On a cluster that cannot grow it finds none, and asks in vain.
    most = section.num_actors or (len(slices) if can_grow(config) else slots)
    actors = min(most, max(len(slices), 1))

    class Labeler:
        """One actor: the model stays loaded from slice to slice."""

        def __init__(self) -> None:
            prepare_process(section.cpus_per_actor)
            self.job: Labeling | None = None

        def __call__(self, batch: pa.Table) -> pa.Table:
            return pa.Table.from_pylist([self._label(row) for row in batch.to_pylist()], _RESULTS)

        def _label(self, row: dict[str, Any]) -> dict[str, Any]:
            # An error comes back as a row: raised here, it would reach the driver without its cause.
            try:
                if self.job is None:
                    self.job = _loaded(load, row["name"], bound, use_gpu=section.use_gpu)
                return {"statistics": label_or_reject(self.job, Slice.from_row(row), bound, check)}
            except Exception as error:
                log.exception("slice %s", row["name"])
                return {"kind": type(error).__name__, "failure": f"slice {row['name']}: {error}"}

    items = [asdict(s) for s in slices]
    # Ray Data's own measure of a pool that may grow counts on tasks that wait at an actor; here none does.
    ray.data.DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = _FULL_POOL
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Labeler,
        batch_size=1,
        batch_format="pyarrow",
        # As many as there is room for start at once: Ray Data would add one after the other. One is enough to go on.
        # One slice each: a second one would wait at a busy actor while another has none.
        compute=ActorPoolStrategy(
            min_size=1, max_size=actors, initial_size=min(slots, actors), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=section.cpus_per_actor,
        num_gpus=1 if section.use_gpu else None,
    )
    # A lost actor or node is retried by Ray; a lost slice is done again whole, and a complete one is skipped.
    try:
        for row in dataset.iter_rows():
            yield _counted(row)
    except ray.exceptions.RayError as error:
        told = f"{type(error).__name__}: {error}"
        raise error_of(
            root_cause(error), f"assign: the actors were lost: {masked(told)}.{remedy('assign', told)} {_CONTINUES}"
        ) from error


def _counted(row: dict[str, Any]) -> Statistics:
    """Return the statistics that an actor sent, or raise what it met."""
    if row["kind"] == DataError.__name__:
        raise DataError(f"assign: {row['failure']}")
    if row["kind"] is not None:
        told = f"{row['kind']}: {row['failure']}"
        raise error_of(row["kind"], f"assign: {masked(told)}.{remedy('assign', told)} {_CONTINUES}")
    return Statistics.from_bytes(row["statistics"])


def label_or_reject(job: Labeling, part: Slice, bound: Bound, check: Callable[[], None] | None = None) -> bytes:
    """Return the statistics of a slice, labeled, or all in the rejects if it kills its process each time.

    Args:
        job: what the actor needs.
        part: the slice.
        bound: on its attempts.
        check: called before it is begun.

    Raises:
        DataError: it does, under on_bad_files=fail, or even while its ids or nothing of it is read.
    """
    with bound.attempt(part.name, task=part.name) as lost:
        if check is not None:
            check()
        if not bound.is_left_out(part, lost, job.spec.on_bad_files):
            return label_slice(job, part, bound.progress(part.name))
        beyond = lost.beyond(bound.most)
        if beyond > 1:
            raise DataError(f"{part.uri}: its rows could not even be put into the rejects; it {bound.ending(lost)}")
        return reject_slice(job, part, "killed_process", with_ids=beyond == 0)


def _loaded(load: Callable[[], Labeling], name: str, bound: Bound, *, use_gpu: bool) -> Labeling:
    """Return what an actor needs; a process that dies meanwhile is not charged to the slice that waits for it."""
    piece = f"{name}.model"
    with bound.attempt(piece, task=piece) as lost:
        bound.require(lost, "loading the model", _LESS_MEMORY)
        return _on_gpu(load()) if use_gpu else load()


def _on_gpu(job: Labeling) -> Labeling:
    device = torch.device("cuda")
    return replace(job, model=job.model.to(device), baselines={name: m.to(device) for name, m in job.baselines.items()})


def free_slots(config: Config) -> int:
    """Return the actors for which the cluster has room."""
    resources, section = ray.cluster_resources(), config.assign
    if section.use_gpu:
        return max(1, int(resources.get("GPU", 1)))
    cpus = resources.get("CPU", 1)
    if config.ray.num_cpus is None and len([n for n in ray.nodes() if n["Alive"]]) == 1:
        # This machine alone: a local cluster may count more CPUs than it has, so that training leaves one for Ray Data.
        cpus = min(cpus, os.cpu_count() or 1)
    return max(1, int(cpus // section.cpus_per_actor))
