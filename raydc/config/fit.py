"""The settings of the fit that concern a job alone: presets, teachers, samples and workers.

All that decides the mathematics is in raydc.core.training.settings.
"""

from typing import Annotated, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from raydc.config.section import check_uri
from raydc.core.training.settings import CHECKED, OPERATIONAL, ObjectiveSettings

Workers = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class FitConfig(ObjectiveSettings):
    """What is learned, and on which workers."""

    preset: Literal["paper", "scale"] | None = None
    """Values for those settings of the objective that you do not give (see raydc/config/presets.py).

    paper has the published ones, for small data. scale is for many rows and leaves."""

    teacher: str | None = None
    """distill: URI of a finished run, or of its model folder, whose labels teach. null is the run's own k-means.

    The fit starts from the teacher's network, so nothing is pretrained and the preprocessing is the teacher's. Set
    autoencoder.* to the teacher's widths. A teacher without a network (kmeans) gives its labels only."""

    teacher_level: int | None = Field(default=None, ge=1)
    """distill: number of groups of the teacher's tree level that teaches; null is its leaves.

    Set cluster.num_leaves to the same number."""

    max_rows: int | None = Field(default=None, ge=1)
    """Train on a sample of about this many rows, chosen by hash of the row key. Every row is still assigned."""

    num_workers: Workers | tuple[Workers, Workers] = Field(default=1, json_schema_extra=OPERATIONAL)
    """Training workers (ranks). [1, 4] is elastic: at least 1, at most 4.

    An elastic fit starts on as many workers as there is room for. It goes on from its last checkpoint with fewer when a
    node is lost, and with more when one joins."""

    resize_seconds: float = Field(default=60.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds between two looks of an elastic fit for room for more workers.

    A resize starts the workers again from the last checkpoint."""

    cpus_per_worker: int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """CPUs, and compute threads, of a training worker."""

    use_gpu: bool = Field(default=False, json_schema_extra=OPERATIONAL)
    """Give each training worker one GPU (NCCL). Otherwise workers train on CPUs (gloo)."""

    resident_bytes: int | None = Field(default=None, ge=0, json_schema_extra=OPERATIONAL)
    """Most bytes of rows that a worker keeps in memory. A larger shard is streamed in each epoch.

    null is 60 % of the worker's memory."""

    max_failures: int = Field(default=3, ge=-1, json_schema_extra=OPERATIONAL)
    """Restarts of the workers after a failure; -1 is no limit."""

    @pydantic.field_validator("teacher")
    @classmethod
    def _teacher_is_shared_and_free_of_secrets(cls, value: str | None) -> str | None:
        if value is not None:
            check_uri(value, "fit.teacher")
        return value

    @pydantic.field_validator("num_workers")
    @classmethod
    def _fewest_before_most(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(
                f"fit.num_workers={list(value)}: the fewest comes first, then the most. Set it to {sorted(value)}"
            )
        return value

    @property
    def fewest_workers(self) -> int:
        """Return how many workers the fit cannot do without."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Return how many workers the fit takes where there is room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
