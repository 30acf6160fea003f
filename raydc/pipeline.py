"""The ordered stages of a run. A stage that is done already is skipped; the manifest comes last."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raydc import cluster
from raydc.config import Config
from raydc.errors import StageError
from raydc.lake import Lake
from raydc.plan import make_plan
from raydc.rundir import RunDir
from raydc.schema import MANIFEST
from raydc.stages import assign, evaluate, fit, merge, profile, publish, report

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    run: Callable[[Config, RunDir], dict[str, Any]]
    writes: tuple[str, ...]
    """What it leaves in the run folder; an interrupted stage goes on from it, a new start removes it."""


STAGES = (
    Stage("profile", profile.run, ("profile.json",)),
    Stage("fit", fit.run, ("checkpoints", "fit")),
    Stage("merge", merge.run, ("tree", "model")),
    Stage("assign", assign.run, ("labels", "rejects", "slices", "exemplars.parquet", "map_rows.parquet")),
    Stage("evaluate", evaluate.run, ("metrics.json", "leaves.parquet")),
    Stage("report", report.run, ("report",)),
    Stage("publish", publish.run, (MANIFEST,)),
)


def make_lake(config: Config) -> Lake:
    """Return the door to the storage that the settings name."""
    return Lake(**config.storage.model_dump())


def plan(config: Config) -> list[str]:
    """Return what a run would cost, as lines of text; nothing is written and no worker is started.

    Raises:
        ConfigError, DataError: the run cannot work; all problems in one message.
    """
    return make_plan(config, profile.profile_input(config, make_lake(config))).lines()


def run(config: Config, run_id: str) -> RunDir:
    """Run every stage that is not done yet and return the run folder.

    Raises:
        ConfigError, DataError, StageError: see raydc.errors. The same call continues where it stopped.
    """
    folder = RunDir(make_lake(config), config.output, run_id)
    inputs = {"input_fingerprint": _checked_fingerprint(config, folder)}
    for stage in STAGES:
        folder.is_done(stage.name, config.settings(stage.name) | inputs)
    if folder.marker("profile") is None:
        folder.write_header(config)
    with cluster.connected(config):
        for stage in STAGES:
            settings = config.settings(stage.name) | inputs
            if folder.is_done(stage.name, settings):
                log.info("%s: done earlier, skipped", stage.name)
                continue
            _forget_later(folder, stage)
            if folder.marker(stage.name) is None:
                folder.remove(*stage.writes)
            folder.begin(stage.name, settings)
            started = time.perf_counter()
            metrics = stage.run(config, folder)
            seconds = time.perf_counter() - started
            folder.mark_done(stage.name, settings, seconds, metrics)
            log.info("%s: done in %.1f s", stage.name, seconds)
            if stage.name == "profile":
                for line in make_plan(config, profile.load(folder)).lines():
                    log.info("plan: %s", line)
    return folder


def _forget_later(folder: RunDir, stage: Stage) -> None:
    """Take back the markers of the stages after one that is about to run: they rest on what it will write."""
    later = STAGES[STAGES.index(stage) + 1 :]
    folder.remove(*(f"stages/{s.name}.json" for s in later), MANIFEST)


def _checked_fingerprint(config: Config, folder: RunDir) -> str:
    """Return the fingerprint of the input as it is now, before anything is written or started."""
    found, data_problems, config_problems = profile.inspect(config, folder.lake)
    profile.refuse(data_problems, config_problems)
    if found is None:
        raise StageError("profile: the input could not be read.")
    return found.fingerprint
