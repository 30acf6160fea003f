"""The checked profile of an input: what its footers say, and what a sample of its rows says."""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np

from raydc.config import Config
from raydc.core.hashing import stream_seed
from raydc.core.models.preprocess import Moments
from raydc.data.columns import shown
from raydc.data.inspection import inspect, refuse
from raydc.data.profile import Profile
from raydc.data.reader import read_slice
from raydc.errors import DataError
from raydc.storage.lake import Lake

log = logging.getLogger(__name__)

_SAMPLED_SLICES = 64


def profile_input(config: Config, lake: Lake) -> Profile:
    """Return the checked profile of the input, sample included.

    Raises:
        DataError, ConfigError: every problem found, in one message.
    """
    profile, data_problems, config_problems = inspect(config, lake)
    if profile is not None:
        profile, sample_problems = _sample(profile, config, lake)
        data_problems += sample_problems
    refuse(data_problems, config_problems)
    assert profile is not None
    for bad in profile.bad_files:
        log.warning("profile: left out %s (%s rows): %s", bad["uri"], bad["rows"], bad["problem"])
    if profile.sample_rejects:
        log.warning("profile: bad rows in the sample, to be quarantined: %s", profile.sample_rejects)
    if any(c.dtype == "float64" for c in profile.spec.columns):
        log.warning("profile: float64 embeddings are rounded to float32")
    return profile


def _sample(profile: Profile, config: Config, lake: Lake) -> tuple[Profile, list[str]]:
    """Return the profile with the moments of a sample, and the problems of its rows.

    Every row is read where there are no more than `input.sample_rows`; else the first rows of slices chosen by hash.
    """
    wanted = config.input.sample_rows
    filled = [s for s in profile.slices if s.num_rows]
    if profile.num_rows > wanted:
        filled.sort(key=lambda s: stream_seed(7, s.index))
        filled = sorted(filled[:_SAMPLED_SLICES], key=lambda s: s.index)
    share = wanted if profile.num_rows <= wanted else max(1, -(-wanted // len(filled)))
    spec = profile.spec
    moments = Moments(0, np.zeros(spec.dim), np.zeros(spec.dim))
    rejects: Counter[str] = Counter()
    example = ""
    unreadable = 0
    for part in filled:
        # The sample looks at all bad rows before it judges, so the reader must not stop at the first one.
        reader = read_slice(lake, part, replace(spec, on_bad_rows="quarantine"), block_rows=min(share, 8192))
        seen = 0
        try:
            for batch in reader:
                moments = moments.merge(Moments.of(batch.x))
                found = Counter(batch.rejects["reason"].to_pylist())
                # Not the rows' fault: input.on_bad_files has let these pass.
                unreadable += found.pop("unreadable_file", 0)
                if found and not example:
                    first = batch.rejects.slice(0, 1).to_pylist()[0]
                    example = f"{part.uri} row {first['row']} (id {shown(first['id'])}) is bad: {first['reason']}"
                rejects += found
                seen += len(batch.x) + len(batch.rejects)
                if seen >= share:
                    break
        except DataError as error:
            return profile, [str(error)]
        finally:
            reader.close()
    problems = []
    if rejects and spec.on_bad_rows == "fail":
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(rejects.items()))
        problems.append(
            f"{example}. Bad rows in the sample: {counts}. Fix the export, or set input.on_bad_rows=quarantine"
        )
    rejects += Counter(unreadable_file=unreadable)
    if not problems and not moments.num_rows:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(rejects.items()))
        problems.append(f"input.path={config.input.path}: no usable row in the sample ({counts}). Fix the export")
    return replace(profile, moments=moments, sample_rejects=dict(rejects)), problems
