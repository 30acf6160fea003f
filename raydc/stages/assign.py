"""assign: label every row of every slice, in actors that Ray Data schedules; rows in = labels + rejects, checked."""

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
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
from raydc.data.profile import Profile
from raydc.data.records import AssignMetrics
from raydc.data.slices import InputSpec, Slice
from raydc.data.statistics import Statistics
from raydc.errors import DataError, StageError
from raydc.labeling.label_slice import Labeling, completed, label_slice, num_groups, reject_slice
from raydc.labeling.nearest_so_far import NearestSoFar
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.runfolder.formats import Place
from raydc.runfolder.lease import Looks
from raydc.runfolder.ownership import OwnedFolder
from raydc.runtime.attempts import Bound
from raydc.runtime.board import bounded
from raydc.runtime.failures import error_of
from raydc.runtime.gauges import Gauges
from raydc.runtime.memory import give_back
from raydc.runtime.remedies import remedy
from raydc.runtime.session import can_grow, root_cause
from raydc.runtime.slice_sums import sum_of_slices
from raydc.storage.secrets import masked

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_FULL_POOL = 0.75
_LESS_MEMORY = "If memory was short, lower assign.num_actors, or give the workers more."
_CONTINUES = "Complete slices are kept; the same command continues."
_RESULTS = pa.schema([("rows", pa.int64()), ("kind", pa.string()), ("failure", pa.string())])

_TASKS = 4000
_TASKS_OF_AN_ACTOR = 4
"""Tasks at least: so many in all, and for each actor, so that all of them end at about the same time."""

_LOOK_SECONDS = 5.0
_LOOKS_A_SECOND = 100.0
"""An actor looks at the lease as seldom as this, and all of them together no more often: it is one key in the store."""


def run(config: Config, run: RunDir) -> AssignMetrics:
    """Write labels/, rejects/, exemplars.parquet and map_rows.parquet, and the statistics of every metric.

    agreement.json says how the learned partition and the baselines treat nearest neighbors; the rows among which these
    are looked up are not kept.
    """
    profile = artifacts.PROFILE.read(run)
    # Written last: a driver that died after it has only the files of the slices to remove.
    if artifacts.STATISTICS.exists(run):
        groups = num_groups(artifacts.MODEL.load(run), artifacts.baselines_of(run).values())
        total = artifacts.STATISTICS.read(run, groups)
    else:
        total = _label(config, run, profile)
    run.remove(artifacts.SLICES.path)
    return {"rows": total.rows, "labels": total.labels, "rejects": total.rejects, "slices": len(profile.slices)}


def _label(config: Config, run: RunDir, profile: Profile) -> Statistics:
    """Label every slice, write what is counted, the statistics last, and return them."""
    load = shared(_labeling(config, run, profile.spec, profile.num_rows))
    with bounded("assign", config, run, stall_seconds=config.assign.stall_seconds) as bound:
        total = label_all(config, load, profile.slices, config.evaluate.num_exemplars, bound, run)
    for file, table in ((artifacts.EXEMPLARS, total.exemplars), (artifacts.MAP_ROWS, total.map_rows)):
        if table is not None:
            file.write(run, table.sort_by("key"))
    if total.files is not None:
        artifacts.LABEL_FILES.write(run, total.files.sort_by("path"))
    # What the slices took on their way.
    give_back()
    if (found := neighbor_agreement(config, total)) is not None:
        artifacts.AGREEMENT.write(run, found)
    artifacts.STATISTICS.write(run, total)
    return total


def shared(job: Labeling) -> Callable[[], Labeling]:
    """Return what gives the same labeling in any process; each node fetches it once, and nobody reads the store."""
    # As bytes: arrays that lie in shared memory could not be written to, which torch warns of.
    body = ray.put(ray.cloudpickle.dumps(job))
    return lambda: ray.cloudpickle.loads(ray.get(body))


def _labeling(config: Config, run: RunDir, spec: InputSpec, num_rows: int) -> Labeling:
    """Return what an actor needs."""
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
    place: Place,
    *,
    slots: int | None = None,
) -> Statistics:
    """Return the sum of all slices' statistics, after every slice was labeled.

    The slices that are complete are told by one listing. The actors hand over counts of rows alone.

    A slice that kills its process stops the run after `bound.most` deaths; under on_bad_files=quarantine its rows go to
    the rejects instead. It is on_bad_files because the file is what cannot be used: no row of it was seen to be bad.

    Args:
        config: for the resources of the actors.
        load: called once in each actor.
        slices: to be labeled; those that have a file in `place` already are only counted.
        num_exemplars: nearest rows kept for each leaf.
        bound: on the attempts at a slice.
        place: the folder that `load` names; an OwnedFolder gets the progress, and its lease is looked at.
        slots: actors for which there is room at the start. Default: what the cluster offers now.

    Raises:
        DataError: a bad row or file that the settings do not let pass, or a slice that kills its process.
        StageError: a worker failed for good, or rows in are not labels + rejects.
    """
    # Closed at once when something stops the loop: an error's traceback would keep the actors and their readers alive.
    slots = free_slots(config) if slots is None else slots
    left = artifacts.SLICES.incomplete(place, slices)
    expected = sum(s.num_rows for s in slices)
    told = _Progress(place, len(slices), len(slices) - len(left), expected, sum(s.num_rows for s in left), bound.gauges)
    with closing(_labeled(config, load, left, bound, place, slots)) as labeled:
        for rows in labeled:
            told.add(rows)
    total = sum_of_slices(place, slices, num_exemplars)
    if bound.gauges is not None:
        bound.gauges.set(**_measures(total, told.rate))
    if not total.rows == total.labels + total.rejects == expected:
        raise StageError(
            f"assign: {expected} rows in, but {total.labels} labels and {total.rejects} rejects out. The input changed "
            "while the run was reading it, or files under labels/ were touched; use a new --run-id."
        )
    return total


class _Progress:
    """How far the labeling is, told to the folder and now and then to the log."""

    def __init__(
        self, place: Place, slices: int, done: int, rows: int, rows_left: int, gauges: Gauges | None = None
    ) -> None:
        self._place, self._slices, self._done, self._rows, self._left = place, slices, done, rows, rows_left
        self._gauges = gauges
        self.rate = 0.0
        self._first = rows_left
        self._started = self._logged = time.monotonic()

    def add(self, rows: int) -> None:
        """Count a slice."""
        self._done += 1
        self._left -= rows
        now = time.monotonic()
        rate = self.rate = (self._first - self._left) / max(now - self._started, 1e-9)
        # Slices without rows come first at times: nothing is known of the speed then.
        ending = f", {self._left / rate:.0f} s left" if rate else ""
        line = f"{self._done} of {self._slices} slices, {self._rows - self._left:,} rows, {rate:,.0f} rows/s{ending}"
        if isinstance(self._place, OwnedFolder):
            self._place.tell(line)
        if self._gauges is not None:
            self._gauges.set_at_times(
                raydc_rows=self._rows - self._left,
                raydc_rows_per_second=rate,
                raydc_slices_left=self._slices - self._done,
            )
        if now - self._logged > _LOG_SECONDS:
            self._logged = now
            log.info("assign: %s", line)


def _measures(total: Statistics, rate: float) -> dict[str, float]:
    """Return the values of the gauges when all rows are labeled."""
    return {
        "raydc_rows": total.rows,
        "raydc_rows_per_second": rate,
        "raydc_slices_left": 0,
        "raydc_rejects": total.rejects,
    }


def _labeled(
    config: Config,
    load: Callable[[], Labeling],
    slices: list[Slice],
    bound: Bound,
    place: Place,
    slots: int,
) -> Generator[int]:
    """Label the slices and yield the rows of each as it is complete."""
    if not slices:
        return
    section = config.assign
    groups = grouped(slices, slots)
    # Where nodes may join, no count of today bounds the pool: Ray Data adds actors as it finds room, and asks for twice
    # the room while all are busy. On a cluster that cannot grow it finds none, and asks in vain.
    most = section.num_actors or (len(groups) if can_grow(config) else slots)
    actors = min(most, len(groups))
    look = None
    if isinstance(place, OwnedFolder):
        look = Looks(place.check_owner, max(_LOOK_SECONDS, actors / _LOOKS_A_SECOND))
    labeler = _labeler(load, bound, look, cpus=section.cpus_per_actor, use_gpu=section.use_gpu)
    # Ray Data's own measure of a pool that may grow counts on tasks that wait at an actor; here none does.
    ray.data.DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold = _FULL_POOL
    items = [{"slices": [dict(vars(part)) for part in group]} for group in groups]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        labeler,
        batch_size=1,
        batch_format="pyarrow",
        # As many as there is room for start at once: Ray Data would add one after the other. One is enough to go on.
        # One group each: a second one would wait at a busy actor while another has none.
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


def _labeler(
    load: Callable[[], Labeling],
    bound: Bound,
    look: Callable[[], None] | None,
    *,
    cpus: int,
    use_gpu: bool,
) -> type:
    class Labeler:
        """One actor: the model stays loaded from slice to slice."""

        def __init__(self) -> None:
            prepare_process(cpus)
            self.job: Labeling | None = None
            self.nearest: NearestSoFar | None = None

        def __call__(self, batch: pa.Table) -> pa.Table:
            parts = [Slice.from_row(row) for group in batch["slices"].to_pylist() for row in group]
            rows: list[dict[str, Any]] = []
            may_be_done = True
            for part in parts:
                # An error comes back as a row: raised here, it would reach the driver without its cause.
                try:
                    if self.job is None:
                        self.job = _loaded(load, part.name, bound, use_gpu=use_gpu)
                        self.nearest = NearestSoFar(self.job.num_exemplars)
                    # A group is done in order. If its first slice is new, so are the others, and nobody has to ask.
                    done = completed(self.job, part) if may_be_done else None
                    may_be_done = done is not None
                    if done is None:
                        done = label_or_reject(self.job, part, bound, look, self.nearest)
                    rows.append({"rows": done.rows})
                except Exception as error:
                    log.exception("slice %s", part.name)
                    rows.append({"kind": type(error).__name__, "failure": f"slice {part.name}: {error}"})
                    break
            return pa.Table.from_pylist(rows, _RESULTS)

    return Labeler


def grouped(slices: list[Slice], slots: int) -> list[list[Slice]]:
    """Return the slices in groups, one for each task: a task costs the driver milliseconds, a slice microseconds."""
    size = -(-len(slices) // max(_TASKS, _TASKS_OF_AN_ACTOR * slots))
    return [slices[first : first + size] for first in range(0, len(slices), size)]


def _counted(row: dict[str, Any]) -> int:
    """Return the rows of a slice that an actor has labeled, or raise what it met."""
    if row["kind"] == DataError.__name__:
        raise DataError(f"assign: {row['failure']}")
    if row["kind"] is not None:
        told = f"{row['kind']}: {row['failure']}"
        raise error_of(row["kind"], f"assign: {masked(told)}.{remedy('assign', told)} {_CONTINUES}")
    return int(row["rows"])


def label_or_reject(
    job: Labeling,
    part: Slice,
    bound: Bound,
    check: Callable[[], None] | None = None,
    nearest: NearestSoFar | None = None,
) -> Statistics:
    """Return the statistics of a slice, labeled, or all in the rejects if it kills its process each time.

    Args:
        job: what the actor needs.
        part: the slice.
        bound: on its attempts.
        check: called before it is begun.
        nearest: what this process knows of the exemplars.

    Raises:
        DataError: it does, under on_bad_files=fail, or even while its ids or nothing of it is read.
    """
    with bound.attempt(part.name, task=part.name) as lost:
        if check is not None:
            check()
        if not bound.is_left_out(part, lost, job.spec.on_bad_files):
            return label_slice(job, part, bound.progress(part.name), nearest=nearest)
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
