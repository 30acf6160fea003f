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
from typing import Any

from raydc.config import Config, difference, digest
from raydc.data.records import Marker
from raydc.data.schema import FORMAT_VERSION
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runfolder.lease import Fence
from raydc.storage.lake import Lake, absolute, join
from raydc.storage.secrets import masked


class RunDir(Place):
    """The folder `<output>/<run_id>` of one run."""

    def __init__(self, lake: Lake, output: str, run_id: str) -> None:
        super().__init__(lake, join(absolute(output), run_id))
        self.run_id = run_id
        self.fence: Fence | None = None
        """The number under which this process may write; None for readers."""

        self.progress: dict[str, Any] = {}
        """What is being done, for `raydc show`; written with every heartbeat."""

    @property
    def resume_command(self) -> str:
        """The command that continues the run from any machine that reaches its folder and its input."""
        return f"raydc resume {self.root}"

    def check_owner(self) -> None:
        """Return if this process may write: before every durable step.

        Raises:
            LeaseLost: another driver has taken the run over.
        """
        if self.fence is not None:
            self.fence.check()

    def tell(self, line: str) -> None:
        """Note what the present stage is doing."""
        self.progress["line"] = line

    def write_header(self, config: Config) -> None:
        """Write run.json: the resolved config, versions, commit and seed, of the driver that works on the run now."""
        self.check_owner()
        before = artifacts.RUN.read_if_there(self)
        artifacts.RUN.write(
            self,
            {
                "run_id": self.run_id,
                "format_version": FORMAT_VERSION,
                "started": now() if before is None else before["started"],
                "seed": config.seed,
                "commit": _commit(),
                "versions": versions(),
                "command": [masked(argument) for argument in sys.argv],
                "config": config.model_dump(mode="json"),
            },
        )

    def marker(self, stage: str) -> Marker | None:
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

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage returned."""
        marker = self.marker(stage)
        if marker is None or marker["state"] != "done":
            raise StageError(f"{stage}: run {self.run_id!r} has not finished this stage.")
        return marker["metrics"]

    def remove(self, *names: str) -> None:
        """Remove files and folders of the run, where they are there."""
        self.check_owner()
        for name in names:
            self.lake.remove(self.uri(name))

    def _write_marker(self, body: Marker) -> None:
        self.check_owner()
        artifacts.marker(body["stage"]).write(self, body)


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
