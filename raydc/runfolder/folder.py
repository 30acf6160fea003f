"""A run folder: stage markers, fingerprints and resume.

A stage is done when its marker says so with the present fingerprint. A marker with another fingerprint stops the run
with the settings that changed, so that two settings never mix in one folder.
"""

import datetime
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, overload

from raydc.config import Config, difference, digest
from raydc.data.metrics import FitMetrics, NeighborsMetrics
from raydc.data.records import Header, MergeMetrics, ProfileMetrics, StageMarker
from raydc.data.schema import FORMAT_VERSION
from raydc.errors import ConfigError, StageError
from raydc.runfolder import artifacts
from raydc.runfolder.ownership import DEMO_INPUT, RUN, OwnedFolder, check_run_id, overlaps, same_place
from raydc.storage.lake import Lake, absolute, join
from raydc.storage.secrets import masked

RUN_KIND = "run"
SWEEP_KIND = "sweep"


class RunDir(OwnedFolder):
    """The folder `<output>/<run_id>` of one run, or of one sweep."""

    def __init__(self, lake: Lake, output: str, run_id: str) -> None:
        super().__init__(lake, join(absolute(output), str(run_id)), RUN)
        self.run_id = run_id
        self._output = output

    @property
    def resume_command(self) -> str:
        """The command that continues the run from any machine that reaches its folder and its input."""
        return f"raydc resume {self.root}"

    def check(self, config: Config, kind: str = RUN_KIND) -> None:
        """Return if a command may work here with these settings: before anything is read, written or started.

        Args:
            config: for the places of the input, the teacher and the shared table.
            kind: the command, run or sweep.

        Raises:
            ConfigError: the run id is none, or a place lies within another; all problems in one message.
            StageError: the folder is somebody else's, or another command's.
        """
        check_run_id(self.run_id)
        problems = overlaps("input.path=", config.input.path, "the run folder ", self.root)
        if config.fit.teacher is not None:
            problems += overlaps("fit.teacher=", config.fit.teacher, "the run folder ", self.root)
        if problems:
            raise ConfigError("\n".join(problems))
        if self.header(kind) is None:
            # A run that began when its input could lie in `output` may go on: it does not touch the input there.
            check_output(config, self._output)

    def header(self, kind: str | None = None) -> Header | None:
        """Return run.json; None in a folder that is free.

        Args:
            kind: the command that the folder must belong to, if it matters.

        Raises:
            StageError: the folder is somebody else's, another command's, or of another format.
        """
        body = cast(Header | None, self.read_owner())
        if body is None or kind is None:
            return body
        if body.get("format_version") != FORMAT_VERSION:
            raise StageError(
                f"{kind}: run {self.run_id!r} in {self.root} was written by format {body.get('format_version')}, and "
                f"this raydc writes format {FORMAT_VERSION}. Use a new --run-id; a finished model in it still loads."
            )
        # Earlier headers do not say it.
        found = body.get("kind") or (SWEEP_KIND if self.marker(SWEEP_KIND) is not None else RUN_KIND)
        if found != kind:
            raise StageError(
                f"{kind}: {self.root} belongs to `raydc {found}`, whose files would be lost. Use another --run-id, or "
                f"`raydc {found}` with this one."
            )
        return body

    def write_header(self, config: Config, kind: str = RUN_KIND) -> None:
        """Write run.json: the resolved config, versions, commit and seed, of the driver that works on the run now.

        It makes the folder raydc's, so it comes before any other file of the run, and after the lease.

        Raises:
            StageError: the folder is somebody else's, or another command's.
        """
        before = self.header(kind)
        self.write_owner(
            {
                "kind": kind,
                "run_id": self.run_id,
                "format_version": FORMAT_VERSION,
                "started": now() if before is None else before["started"],
                "seed": config.seed,
                "commit": _commit(),
                "versions": versions(),
                "command": [masked(argument) for argument in sys.argv],
                "config": config.model_dump(mode="json"),
            }
        )

    def marker(self, stage: str) -> StageMarker | None:
        """Return what is known of a stage: settings, state, seconds and metrics; None before its first start."""
        return artifacts.marker(stage).read_if_there(self)

    def is_done(self, stage: str, settings: dict[str, Any], *, repeatable: bool = False) -> bool:
        """Return whether the stage has finished with these settings.

        Args:
            stage: name of the stage.
            settings: that decide its result.
            repeatable: with other settings it is simply to be done again, because nothing rests on it.

        Raises:
            StageError: it was started with other settings.
        """
        marker = self.marker(stage)
        if marker is None:
            return False
        if marker["fingerprint"] != digest(settings):
            if repeatable:
                return False
            changes = "; ".join(difference(marker["settings"], settings)) or "a setting was added or removed"
            raise StageError(
                f"{stage}: run {self.run_id!r} was started with other settings: {changes}. "
                f"Use a new --run-id, or delete {artifacts.marker(stage).uri(self)} and the markers of the stages "
                "after it to do them again."
            )
        return marker["state"] == "done"

    def begin(self, stage: str, settings: dict[str, Any]) -> None:
        """Record that the stage has started with these settings."""
        self._write_marker(
            {
                "stage": stage,
                "fingerprint": digest(settings),
                "state": "running",
                "started": now(),
                "settings": settings,
            }
        )

    def mark_done(self, stage: str, settings: dict[str, Any], seconds: float, metrics: Mapping[str, Any]) -> None:
        """Record that the stage has finished."""
        self._write_marker(
            {
                "stage": stage,
                "fingerprint": digest(settings),
                "state": "done",
                "finished": now(),
                "seconds": round(seconds, 3),
                "metrics": dict(metrics),
                "settings": settings,
            }
        )

    @overload
    def metrics(self, stage: Literal["profile"]) -> ProfileMetrics: ...

    @overload
    def metrics(self, stage: Literal["neighbors"]) -> NeighborsMetrics: ...

    @overload
    def metrics(self, stage: Literal["fit"]) -> FitMetrics: ...

    @overload
    def metrics(self, stage: Literal["merge"]) -> MergeMetrics: ...

    def metrics(self, stage: str) -> Any:
        """Return what a finished stage returned.

        Raises:
            StageError: it has not finished.
        """
        marker = self.marker(stage)
        if marker is None or marker["state"] != "done":
            raise StageError(
                f"{stage}: run {self.run_id!r} has not finished this stage. Continue it with `{self.resume_command}`."
            )
        return marker["metrics"]

    def remove(self, *names: str) -> None:
        """Remove files and folders of the run, where they are there."""
        self.check_owner()
        for name in names:
            self.lake.remove(self.uri(name))

    def _write_marker(self, body: StageMarker) -> None:
        self.check_owner()
        artifacts.marker(body["stage"]).write(self, body)


def check_output(config: Config, output: str | None = None) -> None:
    """Return if the input lies outside the output, and the output outside the input.

    Args:
        config: for the places of the input and of the shared table.
        output: instead of the one of the settings.

    Raises:
        ConfigError: all problems in one message.
    """
    output = config.output if output is None else output
    paths = [config.input.path] if isinstance(config.input.path, str) else config.input.path
    paths = [path for path in paths if not same_place(path, join(output, DEMO_INPUT))]
    problems = overlaps("input.path=", paths, "output=", output)
    delta = config.publish.delta
    if delta is not None and delta.uri is not None and not problems:
        # VACUUM of the table would remove the input.
        problems = overlaps("input.path=", paths, "publish.delta.uri=", delta.uri)
    if problems:
        raise ConfigError("\n".join(problems))


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in ("raydc", "ray", "torch", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "numpy", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
