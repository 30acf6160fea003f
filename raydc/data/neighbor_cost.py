"""What the search for nearest neighbors asks of a cluster, which grows with the square of the slices.

Every slice is a task that goes through the rows of all slices. Letters: N rows, D width, S slices.
"""

from dataclasses import dataclass

from raydc.config import Config
from raydc.data.profile import Profile

_TASK_BYTES, _REFERENCE_BYTES = 0.21 * 2**20, 286.0
"""Memory of the driver for a task, and for each shard that it names: 0.37, 0.76 and 2.4 MiB a task were measured at
500, 2,000 and 8,000 slices."""


@dataclass(frozen=True)
class NeighborCost:
    """The cost of the stage beside its arithmetic."""

    slices: int
    trained_rows: int
    dim: int

    @classmethod
    def of(cls, config: Config, profile: Profile) -> "NeighborCost | None":
        """Return the cost of a run with these settings; None where its objective needs no neighbors."""
        if not config.needs_neighbors:
            return None
        trained = min(profile.num_rows, config.fit.max_rows or profile.num_rows)
        return cls(sum(1 for s in profile.slices if s.num_rows), trained, profile.spec.dim)

    @property
    def requests(self) -> int:
        """Shards that are fetched by all tasks together: S^2."""
        return self.slices**2

    @property
    def traffic_bytes(self) -> int:
        """Bytes that tasks fetch, at most: all rows as float32 with a key, S times; less where a node has them."""
        return self.slices * self.trained_rows * (4 * self.dim + 8)

    @property
    def driver_bytes(self) -> float:
        """Memory of the driver: each of S tasks names S shards."""
        return self.slices * (_TASK_BYTES + _REFERENCE_BYTES * self.slices)

    def problems(self, config: Config) -> list[str]:
        """Return what is beyond the bounds of the settings, with what to do about it."""
        section, found = config.neighbors, []
        other = "or take another fit.objective, such as dec: it needs no neighbors"
        if self.slices > section.max_slices:
            found.append(
                f"fit.objective={config.fit.objective} searches neighbors in {self.slices:,} slices, above "
                f"neighbors.max_slices={section.max_slices:,}: {self.requests:,} fetches, and about "
                f"{self.driver_bytes / 2**30:.1f} GiB in the driver. Raise input.slice_bytes or point input.path at "
                f"fewer, larger files, {other}."
            )
        if self.traffic_bytes > section.max_traffic_bytes:
            fit = int(section.max_traffic_bytes / (self.slices * (4 * self.dim + 8)))
            found.append(
                f"fit.objective={config.fit.objective} searches the neighbors of {self.trained_rows:,} rows in "
                f"{self.slices:,} slices, for which up to {self.traffic_bytes / 1e12:,.0f} TB are fetched, above "
                f"neighbors.max_traffic_bytes={section.max_traffic_bytes:.3g}. Train on a sample (fit.max_rows={fit} "
                f"at most), {other}."
            )
        return found
