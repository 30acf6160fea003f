"""What a run measures of itself while it works, as gauges of Ray, which Prometheus reads and deploy/grafana.json shows.

Each is set in the process that knows it: the driver, the first training worker, the board of a stage. Without Ray
nothing happens. Ray exports a gauge under its name with `ray_` before it, and forgets it when its process ends.
"""

import time
from collections.abc import Callable
from typing import Any

import ray

from raydc.config.stages import STAGE_NAMES

GAUGES = {
    "raydc_stage": "Number of the stage that a run is at, from 1 (profile) to 5 (assign), the last on the cluster.",
    "raydc_rows": "Rows that the present stage has done.",
    "raydc_rows_per_second": "Rows a second: labeled on average by now, or trained on in the last epoch.",
    "raydc_loss": "Loss of the last epoch.",
    "raydc_slices_left": "Slices that the present stage has still to do.",
    "raydc_rejects": "Rows that were set aside as bad by now.",
    "raydc_attempts_lost": "Processes and nodes that the present stage has lost.",
    "raydc_written_bytes": "Bytes that a process has written to the run folder, without checkpoints; to be summed.",
}
"""Name and description; all have the tags `run` and `stage`."""

_TAGS = ("run", "stage")
_OF_A_STAGE = ("raydc_rows", "raydc_rows_per_second", "raydc_slices_left", "raydc_rejects", "raydc_attempts_lost")


def _ray_gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, GAUGES[name], _TAGS)


class Gauges:
    """The gauges of one stage of one run, in this process. May be sent to another one."""

    def __init__(
        self,
        run_id: str,
        stage: str,
        *,
        every_seconds: float = 1.0,
        make: Callable[[str], Any] = _ray_gauge,
        is_on: Callable[[], bool] = ray.is_initialized,
    ) -> None:
        """Set nothing yet.

        Args:
            run_id: of the run.
            stage: its stage.
            every_seconds: at least so long between two times of `set_at_times`.
            make: returns the gauge of a name.
            is_on: whether there is anybody to tell.
        """
        self._tags = {"run": run_id, "stage": stage}
        self._every, self._last = every_seconds, -float("inf")
        self._make, self._is_on = make, is_on
        self._made: dict[str, Any] = {}

    def begin(self) -> None:
        """Say that the stage has begun: nothing is done yet."""
        self.set(raydc_stage=STAGE_NAMES.index(self._tags["stage"]) + 1, **dict.fromkeys(_OF_A_STAGE, 0))

    def set_at_times(self, **values: float | None) -> None:
        """Set gauges as `set` does, but not sooner than the settings say after the last time."""
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self.set(**values)

    def set(self, **values: float | None) -> None:
        """Set gauges by their names; None leaves one as it is."""
        if not self._is_on():
            return
        for name, value in values.items():
            if value is not None:
                if name not in self._made:
                    self._made[name] = self._make(name)
                self._made[name].set(float(value), self._tags)
