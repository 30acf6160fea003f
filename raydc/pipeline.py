"""The ordered stages of a run. A stage that is done already is skipped; the manifest comes last."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from raydc.config import Config, digest
from raydc.config.stages import StageName, after
from raydc.data.inspection import inspect, refuse, settings_problems
from raydc.data.profile import Profile
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RUN_KIND, RunDir, now
from raydc.runfolder.lease import acquire
from raydc.runfolder.signals import stoppable
from raydc.runfolder.teacher import load_teacher
from raydc.runtime import session
from raydc.runtime.gauges import Gauges
from raydc.runtime.memory import give_back
from raydc.runtime.plan import make_plan
from raydc.stages import assign, evaluate, fit, merge, neighbors, profile, publish, report
from raydc.storage.lake import Lake, Listing
from raydc.tables import register

log = logging.getLogger(__name__)

Settings = Mapping[StageName, dict[str, Any]]
"""What decides the result of each stage."""

_SKIPPED = "%s: done earlier, skipped"


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: StageName
    run: Callable[[Config, RunDir], Mapping[str, Any]]
    repeatable: bool = False
    """Other settings of its own do it again instead of being refused, because no stage rests on it."""

    on_cluster: bool = True
    """Whether it has work for the cluster, beside what the driver does."""

    @property
    def writes(self) -> tuple[str, ...]:
        """What it leaves in the run folder; an interrupted stage goes on from it, a new start removes it."""
        return tuple(artifact.path for artifact in artifacts.WRITES[self.name])


STAGES = (
    Stage("profile", profile.run),
    Stage("neighbors", neighbors.run),
    Stage("fit", fit.run),
    Stage("merge", merge.run),
    Stage("assign", assign.run),
    Stage("evaluate", evaluate.run, on_cluster=False),
    Stage("report", report.run, on_cluster=False),
    Stage("publish", publish.run, repeatable=True, on_cluster=False),
)


def stages_of(config: Config) -> list[Stage]:
    """Return the stages that a run with these settings has; not every objective needs all of them."""
    return [stage for stage in STAGES if stage.name in config.stages]


def make_lake(config: Config) -> Lake:
    """Return the door to the storage that the settings name."""
    return Lake(**config.storage.model_dump())


def check(config: Config, run_id: str, kind: str = RUN_KIND) -> None:
    """Return if a run, or a sweep, may work in its folder: nothing of the input is read and nothing is written.

    Args:
        config: for the places.
        run_id: name of the folder below `output`.
        kind: the command, run or sweep.

    Raises:
        ConfigError, StageError: see RunDir.check.
    """
    RunDir(make_lake(config), config.output, run_id).check(config, kind)


def run(config: Config, run_id: str) -> RunDir:
    """Run every stage that is not done yet and return the run folder.

    The run has one driver: a second one is refused while the first lives. On SIGTERM the lease is given back and
    Stopped is raised, in the main thread.

    Raises:
        ConfigError, DataError, StageError: see raydc.errors. The same call continues where it stopped.
    """
    folder = RunDir(make_lake(config), config.output, run_id)
    folder.lake.check_writable(config.output)
    folder.check(config)
    register.check(config, folder)
    found, inspected = check_input(config, folder)
    inputs = {"input_fingerprint": found.fingerprint}
    settings = {stage.name: config.settings(stage.name) | inputs for stage in stages_of(config)}
    # Other settings are refused before anything starts.
    done = _done(config, folder, settings)
    log.info("run %s in %s", run_id, folder.root)
    if all(done):
        for stage in stages_of(config):
            log.info(_SKIPPED, stage.name)
        return folder
    lease = acquire(folder.lake, folder.root, progress=folder.progress, **config.lease.model_dump())
    folder.fence = lease.fence

    def give_back() -> None:
        # Before the cluster is left, which may take longer than the sender of the signal waits.
        lease.release("stopped by SIGTERM")
        log.error("%s: stopped by SIGTERM; `%s` continues", folder.progress.get("stage"), folder.resume_command)

    left = [stage for stage, is_done in zip(stages_of(config), done, strict=True) if not is_done]
    needed = any(stage.on_cluster for stage in left)
    joined = session.connected(config) if needed else nullcontext(lambda: None)
    with lease, stoppable(lease):
        # Another driver may have worked here, with other settings, since the first look.
        _done(config, folder, settings)
        folder.write_header(config)
        # Twice, because joining a cluster installs Ray's own handler.
        with joined as leave, stoppable(lease, give_back):
            _run_stages(config, folder, settings, leave, inspected)
    return folder


def _done(config: Config, folder: RunDir, settings: Settings) -> list[bool]:
    """Return which stages are done; StageError where one was started with other settings."""
    return [folder.is_done(s.name, settings[s.name], repeatable=s.repeatable) for s in stages_of(config)]


def _run_stages(
    config: Config, folder: RunDir, settings: Settings, leave: Callable[[], None], inspected: Profile | None
) -> None:
    for stage in stages_of(config):
        if not stage.on_cluster:
            leave()
        if folder.is_done(stage.name, settings[stage.name], repeatable=stage.repeatable):
            log.info(_SKIPPED, stage.name)
            continue
        folder.progress.clear()
        folder.progress.update(stage=stage.name, started=now())
        if stage.on_cluster:
            # Later the cluster is being left.
            Gauges(folder.run_id, stage.name).begin()
        _forget_later(folder, stage)
        if folder.marker(stage.name) is None:
            folder.remove(*stage.writes)
        folder.begin(stage.name, settings[stage.name])
        if stage.name == "assign":
            # The driver only waits meanwhile.
            threading.Thread(target=report.load_libraries, daemon=True).start()
        started = time.perf_counter()
        metrics = profile.run(config, folder, inspected) if stage.name == "profile" else stage.run(config, folder)
        seconds = time.perf_counter() - started
        folder.mark_done(stage.name, settings[stage.name], seconds, metrics)
        log.info("%s: done in %.1f s", stage.name, seconds)
        give_back()
        if stage.name == "profile":
            for line in make_plan(config, artifacts.PROFILE.read(folder)).lines():
                log.info("plan: %s", line)


def _forget_later(folder: RunDir, stage: Stage) -> None:
    """Take back the markers of the stages after one that is about to run: they rest on what it will write."""
    folder.remove(*(artifacts.marker(name).path for name in after(stage.name)), artifacts.MANIFEST.path)


def check_input(config: Config, folder: RunDir) -> tuple[Profile, Profile | None]:
    """Return what is known of the input as it is now, before anything is written or started.

    While names, sizes and versions are those of the run's profile, that is it, and no footer is read.

    Returns:
        the profile; and the same again where its footers were read just now, for the stage that goes on from it.

    Raises:
        DataError, ConfigError: the input cannot be used, or settings do not fit it; every problem in one message.
        StageError: no file says what its columns are.
    """
    listing = folder.lake.find_parquet(config.input.path)
    found = _profiled(config, folder, listing)
    inspected = None
    if found is not None:
        refuse([], settings_problems(config, found.num_rows, found.spec.dim, found.spec.id_type))
    else:
        inspected, data_problems, config_problems = inspect(config, folder.lake, listing)
        refuse(data_problems, config_problems)
        found = inspected
    if found is None:
        raise StageError(
            f"profile: input.path={config.input.path}: no file says what its columns are. Check the path and the "
            "columns of the settings."
        )
    load_teacher(config, found.spec.dim, folder.lake)
    return found, inspected


def _profiled(config: Config, folder: RunDir, listing: Listing) -> Profile | None:
    """Return the profile of a run if it was made of the same files with the same settings."""
    marker = folder.marker("profile")
    if marker is None or marker["state"] != "done" or not artifacts.PROFILE.exists(folder):
        return None
    found = artifacts.PROFILE.read(folder)
    settings = config.settings("profile") | {"input_fingerprint": found.fingerprint}
    same = found.listing == listing.digest and marker["fingerprint"] == digest(settings)
    return found if same and found.listing else None
