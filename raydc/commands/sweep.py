"""`raydc sweep`: one pretraining and one fit per number of leaves, on Ray as in a run, and a recommendation.

The run folder gets sweep.json (everything), sweep.md (the table) and sweep.png (the curves). An interrupted sweep goes
on with the K that were not done.
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch

from raydc.config import Config, dump
from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.metrics.choose_k import recommend
from raydc.core.models.preprocess import Preprocess
from raydc.core.training.collectives import Ranks
from raydc.core.training.rows import Batch, ResidentRows, Rows, StreamedRows
from raydc.core.training.settings import SweepSettings
from raydc.core.training.sweep import Sample, sweep
from raydc.data.profile import Profile
from raydc.data.records import RecommendationRecord, SweepEntry, SweepRecord
from raydc.data.sample import profile_input
from raydc.errors import ConfigError
from raydc.pipeline import make_lake
from raydc.report.sweep import figure, page
from raydc.runfolder import artifacts
from raydc.runfolder.folder import SWEEP_KIND, RunDir
from raydc.runfolder.lease import acquire
from raydc.runtime import session
from raydc.runtime.board import bounded
from raydc.runtime.patience import collective_timeout
from raydc.runtime.row_dataset import readers, slice_dataset
from raydc.runtime.train import Failure, Job, RayContext, collect, in_worker, launch

log = logging.getLogger(__name__)

_NAME = SWEEP_KIND

_RESULTS = (artifacts.SWEEP, artifacts.SWEEP_PAGE, artifacts.SWEEP_FIGURE)
_WRITES = (artifacts.ATTEMPTS, artifacts.CHECKPOINTS, *_RESULTS)
"""What a sweep leaves in its folder; an interrupted one goes on from it, a new start removes it."""


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the K of `5:50:5` (first, last, step; the last included) or `5,8,10`, rising.

    Raises:
        ConfigError: the text is neither, or names fewer than two K, or one below 2.
    """
    try:
        if ":" in text:
            first, last, step = (int(part) for part in text.split(":"))
            found = list(range(first, last + 1, step))
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--k {text}: expected FIRST:LAST:STEP, such as 5:50:5, or a list such as 5,8,10.") from None
    numbers = tuple(sorted(set(found)))
    if len(numbers) < 2 or numbers[0] < 2:
        raise ConfigError(f"--k {text}: expected at least two numbers of leaves, each 2 or more.")
    return numbers


def run(config: Config, run_id: str, numbers: tuple[int, ...]) -> RunDir:
    """Sweep the numbers of leaves and return the run folder.

    Raises:
        ConfigError, DataError, StageError: see raydc.errors. The same call continues where it stopped.
    """
    if config.needs_neighbors:
        raise ConfigError(
            f"sweep: fit.objective={config.fit.objective} takes rows in pairs. Sweep with dec or another."
        )
    if config.fit.teacher is not None:
        raise ConfigError(
            "sweep: fit.teacher brings its own number of leaves. Leave it out of the settings of a sweep."
        )
    folder = RunDir(make_lake(config), config.output, run_id)
    folder.check(config, SWEEP_KIND)
    # The largest K must fit the rows; that of the settings only says for which K target_top_q was set.
    wanted = replace(config.cluster, num_leaves=max(config.cluster.num_leaves, numbers[-1]))
    found = profile_input(config.model_copy(update={"cluster": wanted}), folder.lake)
    settings = config.settings("fit") | {
        "sweep": dump(config.sweep) | {"k": list(numbers)},
        "input_fingerprint": found.fingerprint,
    }
    if folder.is_done(_NAME, settings):
        log.info("sweep: done earlier, skipped")
        return folder
    lease = acquire(folder.lake, folder.root, progress=folder.progress, **config.lease.model_dump())
    folder.fence = lease.fence
    with lease:
        # Another sweep may have ended here since the first look.
        if folder.is_done(_NAME, settings):
            return folder
        folder.write_header(config, SWEEP_KIND)
        with session.connected(config):
            if folder.marker(_NAME) is None:
                folder.remove(*(artifact.path for artifact in _WRITES))
            folder.begin(_NAME, settings)
            started = time.perf_counter()
            body = _sweep(config, folder, found, numbers)
            _write(folder, body)
            folder.mark_done(_NAME, settings, time.perf_counter() - started, {"recommended": body["recommendation"]})
    return folder


def lines(run: RunDir) -> list[str]:
    """Return what a person reads at the end: the table, the recommendation and the paths."""
    return [*page(artifacts.SWEEP.read(run)), *(f"{file.path:12s}{file.uri(run)}" for file in _RESULTS)]


def _sweep(config: Config, folder: RunDir, found: Profile, numbers: tuple[int, ...]) -> SweepRecord:
    expected = min(found.num_rows, config.fit.max_rows or found.num_rows)
    log.info(
        "sweep: K = %s on about %d of %d rows (%.2f %%), of which %.0f %% are held out; both by hash of the row key",
        ", ".join(map(str, numbers)),
        expected,
        found.num_rows,
        100 * expected / found.num_rows,
        100 * config.sweep.held_out,
    )
    evaluate = config.evaluate
    plan = SweepSettings(
        num_leaves=numbers,
        stability_rows=config.sweep.stability_rows,
        num_repeats=config.sweep.num_repeats,
        neighbor_rows=evaluate.neighbor_rows,
        num_neighbors=evaluate.num_neighbors,
        neighbor_queries=evaluate.neighbor_queries,
    )
    with bounded(_NAME, config, folder, folder.tell) as bound:
        settings = config.fit_settings(found.fingerprint)
        job = Job.of(config, settings, found, folder, bound.board, expected_rows=expected)
        dataset = slice_dataset(
            folder.lake,
            found.slices,
            found.spec,
            bound,
            seed=config.seed,
            fraction=expected / found.num_rows,
            num_readers=readers(config),
            with_classes=found.spec.label_column is not None,
        )
        loop_config = {"job": job, "plan": plan, "held_out": config.sweep.held_out, "rows": evaluate.baseline_rows}
        patience = collective_timeout(config, expected, found.spec.dim, max(numbers))
        outcome = launch(config, folder, dataset, _train_loop, loop_config, _NAME, patience)
    advice = recommend(cast(list[dict[str, Any]], outcome.entries))
    return {
        "objective": config.fit.objective,
        "seed": config.seed,
        "rows": {**outcome.rows, "input": found.num_rows},
        "entries": outcome.entries,
        "recommendation": cast(RecommendationRecord, asdict(advice)),
    }


def _write(folder: RunDir, body: SweepRecord) -> None:
    artifacts.SWEEP.write(folder, body)
    artifacts.SWEEP_PAGE.write(folder, ("\n".join(page(body, markdown=True)) + "\n").encode())
    artifacts.SWEEP_FIGURE.write(folder, figure(body))


class _Split:
    """Tells held-out rows from training rows as they arrive, and remembers the classes of the sampled ones."""

    def __init__(self, seed: int, held_out: float, sampled: float) -> None:
        self._seed, self._share, self._sampled = seed, held_out, sampled
        self.waiting: list[Batch] | None = []
        """Held-out rows met so far; None once they are read for themselves."""

        self.classes: list[tuple[np.ndarray, np.ndarray]] | None = []
        """(keys, classes) of the sampled rows met so far; None once they are gathered."""

    def training(self, table: pa.Table, batch: Batch) -> Batch:
        """Return the rows to train on."""
        apart = self._apart(batch)
        if self.waiting is not None:
            self.waiting.append(_taken(batch, apart))
        kept = _taken(batch, ~apart)
        if self.classes is not None and "class" in table.column_names:
            chosen = self.chosen(kept)
            classes = table["class"].to_numpy()[~apart.numpy()]
            self.classes.append((kept.keys_N.numpy()[chosen], classes[chosen]))
        return kept

    def held_out(self, table: pa.Table, batch: Batch) -> Batch:
        """Return the rows that are held out."""
        return _taken(batch, self._apart(batch))

    def chosen(self, batch: Batch) -> np.ndarray:
        """Return which rows belong to the sample."""
        return sample_mask(batch.keys_N.cpu().numpy(), stream_seed(self._seed, 12), self._sampled)

    def _apart(self, batch: Batch) -> torch.Tensor:
        return torch.from_numpy(sample_mask(batch.keys_N.numpy(), stream_seed(self._seed, 13), self._share))


class _Counts(TypedDict):
    trained: int
    held_out: int
    sample: int


@dataclass(frozen=True)
class _Done:
    """What the workers have found."""

    entries: list[SweepEntry]
    rows: _Counts


def _train_loop(loop_config: dict[str, Any]) -> _Done | Failure:
    return in_worker(loop_config["job"], partial(_swept, loop_config))


def _swept(loop_config: dict[str, Any], context: RayContext, ranks: Ranks) -> _Done:
    job: Job = loop_config["job"]
    share = loop_config["held_out"]
    trained = job.expected_rows * (1 - share)
    split = _Split(job.settings.seed, share, loop_config["rows"] / max(trained, 1.0))
    rows, held_out = _collected(job, ranks, split, share)
    sample = _sample(rows, split, job.preprocess, ranks, job.settings.block_rows)
    entries = sweep(rows, held_out, sample, job.preprocess, job.settings, loop_config["plan"], context)
    counts: _Counts = {"trained": rows.num_rows, "held_out": held_out.num_rows, "sample": len(sample.x_ND)}
    return _Done(cast(list[SweepEntry], entries), counts)


def _collected(job: Job, ranks: Ranks, split: _Split, share: float) -> tuple[Rows, Rows]:
    """Return the training rows and the held-out rows; resident rows are read once for both."""
    job = replace(job, expected_rows=max(1, round(job.expected_rows * (1 - share))))
    rows = collect(job, ranks, split.training)
    if isinstance(rows, StreamedRows):
        split.waiting = None
        few = replace(job, expected_rows=max(1, round(job.expected_rows * share / (1 - share))), resident_bytes=0)
        return rows, collect(few, ranks, split.held_out)
    assert split.waiting is not None
    dtype = torch.float16 if job.spec.dtype == np.float16 else torch.float32
    held_out = ResidentRows.collect(iter(split.waiting), job.spec.dim, dtype, ranks)
    split.waiting = None
    return rows, held_out


def _sample(rows: Rows, split: _Split, preprocess: Preprocess, ranks: Ranks, block_rows: int) -> Sample:
    """Return the sampled training rows of all ranks on rank 0, with their classes."""
    keys, values = [torch.empty(0, dtype=torch.int64)], [torch.empty((0, rows.dim))]
    for batch in rows.blocks(block_rows):
        chosen = torch.from_numpy(split.chosen(batch)).to(batch.x_ND.device)
        keys.append(batch.keys_N[chosen].cpu())
        values.append(preprocess(batch.x_ND[chosen]).cpu())
    found, x = ranks.gather_rows(torch.cat(keys)), ranks.gather_rows(torch.cat(values))
    order = found.argsort()
    known = split.classes or []
    split.classes = None
    # Every rank takes part in the sums, also one that was given no rows.
    pairs = [np.concatenate([np.empty(0, np.int64), *(p[i] for p in known)]) for i in (0, 1)]
    owners, classes = (ranks.gather_rows(torch.from_numpy(p)) for p in pairs)
    if not len(owners):
        return Sample(x[order], None)
    # Streamed rows may have been met by more than one pass; the same key has the same class.
    owners_N, first = np.unique(owners.numpy(), return_index=True)
    place = np.searchsorted(owners_N, found[order].numpy())
    return Sample(x[order], classes.numpy()[first][place])


def _taken(batch: Batch, rows: torch.Tensor) -> Batch:
    return Batch(batch.keys_N[rows], batch.x_ND[rows], batch.weights_N[rows])
