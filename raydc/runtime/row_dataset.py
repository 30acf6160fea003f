"""The rows of slices as Ray Data's blocks, on their way to the training workers.

Its processes start one after the other while nobody can train, so nothing here loads torch before it is needed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import TaskPoolStrategy
from ray.train import DataConfig

from raydc.config import Config
from raydc.data.columns import class_names
from raydc.data.reader import RowBatch, read_slice
from raydc.data.slices import InputSpec, Slice
from raydc.errors import DataError, StageError, StorageUnavailable
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runtime.attempts import Bound
from raydc.runtime.session import nodes_with_cpus
from raydc.storage.lake import Lake


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """What a reader needs to know."""

    lake: Lake
    spec: InputSpec
    bound: Bound
    seed: int
    """Seed of the sample."""

    fraction: float
    """Share of the rows that is taken."""

    neighbors_of: Place | None
    """Run folder that has the neighbors of the rows; None where the objective needs none."""

    with_classes: bool


class EverySlice(DataConfig):
    """Split the dataset over the workers without dropping a row.

    Train's own split cuts every worker to the same number of rows; ours need no equal shares, because the batches are
    made from row keys (see raydc.core.training.rows).
    """

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Return one iterator per worker and dataset."""
        output: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            splits = dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for rank, split in enumerate(splits):
                output[rank][name] = split
        return output


def slice_dataset(
    lake: Lake,
    slices: list[Slice],
    spec: InputSpec,
    bound: Bound,
    *,
    seed: int,
    fraction: float,
    num_readers: int | None,
    neighbors_of: Place | None = None,
    with_classes: bool = False,
) -> ray.data.Dataset:
    """Return a dataset of row blocks: key, x and weight of the good rows of each slice, by our own reader.

    With `neighbors_of`, the run folder where that stage has written, also the keys of each row's neighbors. With
    classes, there is a column `class` too: a number made from the text of the known class, -1 for a missing one.

    Ray Data may use only the CPUs that Train leaves, and Train takes the last one when it grows, or when a node is
    lost: the workers would then wait for rows for ever. So where the workers live on CPUs, a reader books none, and
    `num_readers` bounds them instead. None leaves it to Ray Data: workers on GPUs leave CPUs, and a queue of readers
    that book one lets the cluster grow.

    Ray starts a reader that died again for ever, so each counts its attempts in `bound`. A slice that kills its reader
    too often stops the fit, or, under on_bad_files=quarantine, is not trained on.
    """
    from raydc.core.hashing import stream_seed

    job = BlockJob(
        lake=lake,
        spec=spec,
        bound=bound,
        seed=stream_seed(seed, 8),
        fraction=fraction,
        neighbors_of=neighbors_of,
        with_classes=with_classes,
    )
    items = [asdict(s) for s in slices if s.num_rows]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_blocks,  # type: ignore[arg-type]
        fn_kwargs={"job": job},
        batch_size=1,
        batch_format="pyarrow",
        udf_modifying_row_count=True,
        num_cpus=1 if num_readers is None else 0,
        compute=TaskPoolStrategy(size=num_readers),
        label_selector=None if num_readers is None else nodes_with_cpus(),
    )


def read_blocks(batch: pa.Table, job: BlockJob) -> Iterator[pa.Table]:
    """Yield the blocks of some slices.

    Raises:
        DataError, StageError: posted to the board first: on its way through Ray Data an error may lose its cause.
    """
    try:
        for row in batch.to_pylist():
            part = Slice.from_row(row)
            with job.bound.attempt(part.name) as lost:
                if not job.bound.is_left_out(part, lost, job.spec.on_bad_files):
                    yield from _blocks(part, job)
    except StorageUnavailable:
        # The next try of the workers may find the store well.
        raise
    except (DataError, StageError) as error:
        ray.get(job.bound.board.fail.remote((type(error).__name__, str(error))))
        raise


def _blocks(part: Slice, job: BlockJob) -> Iterator[pa.Table]:
    graph = None if job.neighbors_of is None else _graph(job, part)
    for rows in read_slice(job.lake, part, job.spec, with_labels=job.with_classes):
        block = _to_block(rows, job)
        yield block if graph is None else _with_neighbors(block, part, *graph)


def readers(config: Config) -> int | None:
    """Return how many slices are read at once: one for each CPU that training leaves.

    At least one for each CPU of the workers, which wait meanwhile: in a cluster that starts from zero no CPU is there
    yet, and Train brings these.
    """
    if config.fit.use_gpu:
        return None
    trained_on = config.fit.most_workers * config.fit.cpus_per_worker
    return max(trained_on, int(ray.cluster_resources().get("CPU", 1)) - trained_on)


def _graph(job: BlockJob, part: Slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    assert job.neighbors_of is not None
    return artifacts.NEIGHBORS.read(job.neighbors_of, part)


def _to_block(rows: RowBatch, job: BlockJob) -> pa.Table:
    chosen = np.ones(len(rows.keys), bool)
    if job.fraction < 1.0:
        from raydc.core.hashing import sample_mask

        chosen = sample_mask(rows.keys, job.seed, job.fraction)
    x = np.ascontiguousarray(rows.x if chosen.all() else rows.x[chosen])
    weights = np.ones(len(rows.keys), np.float32) if rows.weights is None else rows.weights
    columns: dict[str, Any] = {
        "key": rows.keys[chosen],
        "x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), job.spec.dim),
        "weight": weights[chosen],
    }
    classes = class_names(rows.labels)
    if classes is not None:
        columns["class"] = _class_numbers(classes[chosen])
    return pa.table(columns)


def _class_numbers(classes_N: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
    """Return the same number for the same text on any worker; -1 for no text."""
    names, of_row = np.unique(classes_N, return_inverse=True)
    digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names.tolist()]
    numbers = [int.from_bytes(d, "big") >> 1 if name else -1 for name, d in zip(names.tolist(), digests)]
    return np.array(numbers, np.int64)[of_row]


def _with_neighbors(
    block: pa.Table, part: Slice, keys_N: npt.NDArray[np.int64], neighbors_NM: npt.NDArray[np.int64]
) -> pa.Table:
    keys = block["key"].to_numpy()
    first = int(np.searchsorted(keys_N, keys[0])) if len(keys) else 0
    rows = slice(first, first + len(keys))
    if not np.array_equal(keys_N[rows], keys):
        raise DataError(
            f"{part.uri}: its rows are others than when their neighbors were searched. The input changed while the "
            "run was reading it; use a new --run-id."
        )
    values = pa.array(neighbors_NM[rows].reshape(-1))
    return block.append_column("neighbors", pa.FixedSizeListArray.from_arrays(values, neighbors_NM.shape[1]))
