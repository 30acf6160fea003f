"""profile: read every footer and a sample, refuse what cannot work, and write down the plan of slices.

No worker has started yet: whatever is wrong costs seconds, and all of it is told in one message.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from raydc.config import Config
from raydc.data import duplicate_ids
from raydc.data.profile import Profile
from raydc.data.records import ProfileMetrics
from raydc.data.sample import profile_input
from raydc.data.slices import InputSpec, Slice
from raydc.errors import DataError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake

if TYPE_CHECKING:
    from raydc.runtime.attempts import Bound

log = logging.getLogger(__name__)

_READERS = 16


def run(config: Config, run: RunDir, inspected: Profile | None = None) -> ProfileMetrics:
    """Read the input's sample, and its footers where they are not `inspected` yet, and write profile.json."""
    profile = profile_input(config, run.lake, inspected=inspected)
    repeated = _repeated_ids(config, profile, run)
    artifacts.PROFILE.write(run, profile)
    assert profile.moments is not None
    return {
        "rows": profile.num_rows,
        "bytes": profile.num_bytes,
        "slices": len(profile.slices),
        "dim": profile.spec.dim,
        "sampled_rows": profile.moments.num_rows,
        "sample_rejects": profile.sample_rejects,
        "bad_files": profile.bad_files,
        "notes": profile.notes,
        "repeated_ids": repeated,
    }


def _repeated_ids(config: Config, profile: Profile, run: RunDir) -> int:
    """Return how many rows repeat the id of another, after telling of them.

    Raises:
        DataError: there are some, under input.unique_ids.
    """
    slices, spec, lake = profile.slices, profile.spec, run.lake
    num_parts = -(-profile.num_rows // duplicate_ids.ROWS_PER_PART)
    if num_parts <= 1:
        with ThreadPoolExecutor(_READERS) as pool:
            found = duplicate_ids.count(
                np.concatenate(list(pool.map(lambda s: duplicate_ids.slice_keys(lake, s, spec), slices)))
            )
    else:
        from raydc.runtime.board import bounded

        with bounded("profile", config, run) as bound:
            found = repeats_by_tasks(slices, spec, lake, num_parts, bound)
    if not found.rows:
        return 0
    examples = "; ".join(duplicate_ids.describe(lake, slices, spec, found))
    text = f"{found.rows} rows repeat the id of another row: {examples}"
    if config.input.unique_ids:
        raise DataError(f"profile: {text}. Remove the repeats, or set input.unique_ids=false.")
    log.warning("profile: %s", text)
    return found.rows


def repeats_by_tasks(
    slices: Sequence[Slice], spec: InputSpec, lake: Lake, num_parts: int, bound: "Bound"
) -> duplicate_ids.Repeats:
    """Return the same as one count over all rows; equal ids meet in one of `num_parts` tasks.

    Raises:
        StageError: a task was lost too often.
    """
    import ray

    from raydc.runtime.failures import error_of
    from raydc.runtime.session import in_one_line, root_cause

    @ray.remote(num_returns=num_parts, max_retries=bound.retries)
    def split(some: Sequence[Slice]) -> list[npt.NDArray[np.void]]:
        return duplicate_ids.by_part(np.concatenate([_keys_or_none(lake, s, spec, bound) for s in some]), num_parts)

    @ray.remote(max_retries=bound.retries)
    def count(number: int, *parts: npt.NDArray[np.void]) -> duplicate_ids.Repeats:
        with bound.attempt(f"ids-{number}") as lost:
            bound.require(lost, f"comparing part {number} of {num_parts} of the ids", "Give the workers more memory.")
            return duplicate_ids.count(np.concatenate(parts))

    # As many readers as counters, so that neither holds more rows than the other.
    groups = [slices[i::num_parts] for i in range(num_parts)]
    pieces = [split.remote(group) for group in groups if group]
    try:
        counts = [count.remote(number, *parts) for number, parts in enumerate(zip(*pieces, strict=True))]
        return duplicate_ids.total(ray.get(counts))
    except ray.exceptions.RayError as error:
        cause = root_cause(error)
        raise error_of(cause, f"profile: {in_one_line(cause)}. The same command tries again.") from error


def _keys_or_none(lake: Lake, part: Slice, spec: InputSpec, bound: "Bound") -> npt.NDArray[np.void]:
    """Return the keys of the ids of a slice; none if reading them kills the process, as if they were unreadable."""
    with bound.attempt(part.name) as lost:
        if lost.beyond(bound.most) < 0:
            return duplicate_ids.slice_keys(lake, part, spec)
        bound.leave_out(part.name, lost, f"its {part.num_rows:,} ids are not compared")
        return duplicate_ids.no_keys()
