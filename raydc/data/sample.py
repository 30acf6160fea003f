"""The checked profile of an input: what its footers say, and what a sample of its rows says."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from raydc.config import Config
from raydc.core.hashing import stream_seed
from raydc.core.models.preprocess import Moments, Preprocess
from raydc.data.columns import shown
from raydc.data.distinct import DistinctRows
from raydc.data.inspection import inspect, refuse
from raydc.data.profile import Profile
from raydc.data.reader import REMEDIES, RowBatch, read_slice
from raydc.data.slices import Slice
from raydc.errors import DataError
from raydc.storage.lake import Lake

log = logging.getLogger(__name__)

_SAMPLED_SLICES = 64

EXTREME = 1000.0
"""A row whose norm is so many times the median norm is told by name, and has no say in means and spreads.

Ordinary embeddings stay within a factor of 10. At 1000 one row weighs as a million others do in a sum of squares, so it
takes a leaf of its own.
"""

# More than this share of extreme rows are no outliers but the data.
_FEW = 0.05

_MOST_NAMED = 3


def profile_input(
    config: Config, lake: Lake, preprocess: Preprocess | None = None, inspected: Profile | None = None
) -> Profile:
    """Return the checked profile of the input, sample included.

    Args:
        config: checked settings.
        lake: where the input is.
        preprocess: of the model that is to label the rows; by default that of the settings, with the sample's
            statistics. A row that it makes too large for float32 is bad.
        inspected: what `inspect` has found already, so that no footer is read twice.

    Raises:
        DataError, ConfigError: every problem found, in one message.
    """
    profile, data_problems, config_problems = (inspected, [], []) if inspected else inspect(config, lake)
    if profile is not None:
        profile, sample_problems = _sample(profile, config, lake, preprocess)
        data_problems += sample_problems
    refuse(data_problems, config_problems)
    assert profile is not None
    for bad in profile.bad_files:
        log.warning("profile: left out %s (%s rows): %s", bad["uri"], bad["rows"], bad["problem"])
    if profile.sample_rejects:
        log.warning("profile: bad rows in the sample, to be quarantined: %s", profile.sample_rejects)
    for note in profile.notes:
        log.warning("profile: %s", note)
    return profile


@dataclass(kw_only=True)
class _Seen:
    """What was seen of the sample's rows."""

    moments: Moments
    rejects: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    """Rows that are not to blame: input.on_bad_files has let these pass."""

    example: str = ""
    """The first bad row."""

    squares: list[npt.NDArray[np.float64]] = field(default_factory=list)
    """Squared norm of each good row."""

    extremes: list[str] = field(default_factory=list)
    """The first rows that were left out of the moments."""


def _sample(profile: Profile, config: Config, lake: Lake, preprocess: Preprocess | None) -> tuple[Profile, list[str]]:
    """Return the profile with the moments of a sample, and the problems of its rows.

    Every row is read where there are no more than `input.sample_rows`; else the first rows of slices chosen by hash.
    """
    wanted = config.input.sample_rows
    distinct = DistinctRows(config.cluster.num_leaves)
    try:
        if preprocess is not None:
            profile = _guarded(profile, preprocess)
        seen = _look(profile, wanted, lake, distinct=distinct)
        moments, note = _robust(profile, wanted, lake, seen)
        profile = replace(profile, moments=moments)
        if preprocess is None and moments.num_rows:
            profile = _guarded(profile, profile.preprocess(config))
            if max(float(s.max(initial=0)) for s in seen.squares) > profile.spec.guard.safe_square:
                # Preprocessing may make some of them too large.
                again = _look(profile, wanted, lake)
                seen = replace(again, moments=moments)
    except DataError as error:
        return profile, [str(error).removeprefix("profile: ")]
    problems = []
    if seen.rejects and profile.spec.on_bad_rows == "fail":
        remedy = next((REMEDIES[r] for r in sorted(seen.rejects) if r in REMEDIES), "Fix the export")
        problems.append(
            f"{seen.example}. Bad rows in the sample: {_counts(seen.rejects)}. {remedy}, or set "
            "input.on_bad_rows=quarantine"
        )
    rejects = seen.rejects + Counter(unreadable_file=seen.unreadable)
    if not problems and not moments.num_rows:
        problems.append(
            f"input.path={config.input.path}: no usable row in the sample ({_counts(rejects)}). Fix the export"
        )
    notes = profile.notes + ([note] if note and not profile.spec.refuse_zero_norm else [])
    notes += _few_rows(distinct.num, moments.num_rows, profile, config)
    return replace(profile, sample_rejects=dict(rejects), notes=notes), problems


def _look(
    profile: Profile, wanted: int, lake: Lake, *, most_square: float = np.inf, distinct: DistinctRows | None = None
) -> _Seen:
    """Return what the sample's rows say; rows of a larger squared norm than `most_square` stay out of the moments."""
    zeros = np.zeros(profile.spec.dim)
    seen = _Seen(moments=Moments(0, zeros, zeros))
    for part, batch in _batches(profile, wanted, lake):
        with np.errstate(over="ignore"):
            squares = np.einsum("ij,ij->i", batch.x, batch.x, dtype=np.float64, casting="unsafe")
        ordinary = squares <= most_square
        # Without a copy where every row is ordinary, which is nearly always.
        seen.moments = seen.moments.merge(Moments.from_rows(batch.x if ordinary.all() else batch.x[ordinary]))
        for at in np.flatnonzero(~ordinary)[: _MOST_NAMED - len(seen.extremes)]:
            row = part.first_row + int(batch.keys[at]) - part.first_key
            text = shown(batch.ids[int(at)].as_py())
            seen.extremes.append(f"{part.uri} row {row} (id {text}, norm {np.sqrt(squares[at]):.3g})")
        seen.squares.append(squares)
        if distinct is not None:
            distinct.add(batch.x)
        found = Counter(batch.rejects["reason"].to_pylist())
        seen.unreadable += found.pop("unreadable_file", 0)
        if found and not seen.example:
            first = batch.rejects.slice(0, 1).to_pylist()[0]
            seen.example = f"{part.uri} row {first['row']} (id {shown(first['id'])}) is bad: {first['reason']}"
        seen.rejects += found
    return seen


def _batches(profile: Profile, wanted: int, lake: Lake) -> Iterator[tuple[Slice, RowBatch]]:
    filled = [s for s in profile.slices if s.num_rows]
    if profile.num_rows > wanted:
        filled.sort(key=lambda s: stream_seed(7, s.index))
        filled = sorted(filled[:_SAMPLED_SLICES], key=lambda s: s.index)
    share = wanted if profile.num_rows <= wanted else max(1, -(-wanted // len(filled)))
    # The sample looks at all bad rows before it judges, so the reader must not stop at the first one.
    spec = replace(profile.spec, on_bad_rows="quarantine")
    for part in filled:
        reader = read_slice(lake, part, spec, block_rows=min(share, 8192))
        rows = 0
        try:
            for batch in reader:
                yield part, batch
                rows += len(batch.x) + len(batch.rejects)
                if rows >= share:
                    break
        finally:
            reader.close()


def _robust(profile: Profile, wanted: int, lake: Lake, seen: _Seen) -> tuple[Moments, str]:
    """Return the moments without extreme rows, and a sentence that names these; "" where there are none."""
    squares = np.concatenate([np.empty(0), *seen.squares])
    positive = squares[squares > 0]
    if not len(positive):
        return seen.moments, ""
    median = float(np.median(positive))
    extreme = int((squares > EXTREME**2 * median).sum())
    if not 0 < extreme <= _FEW * len(squares):
        return seen.moments, ""
    again = _look(profile, wanted, lake, most_square=EXTREME**2 * median)
    return again.moments, (
        f"{extreme} of {len(squares)} sampled rows are over {EXTREME:.0f} times as long as the median row (norm "
        f"{np.sqrt(median):.3g}), such as {'; '.join(again.extremes)}. Each may take a leaf of its own; they have no "
        "say in the means and spreads of preprocessing. Set them right, leave them out, or use preprocess.method=l2"
    )


def _few_rows(num: int, sampled: int, profile: Profile, config: Config) -> list[str]:
    """Return a note where there are fewer different rows than leaves."""
    leaves = config.cluster.num_leaves
    if not 0 < num < leaves:
        return []
    where = "the input has" if sampled == profile.num_rows else f"the {sampled} sampled rows have"
    rows = "one distinct row" if num == 1 else f"{num} distinct rows"
    return [
        f"{where} {rows}, fewer than cluster.num_leaves={leaves}: at most {num} leaves can differ. Lower num_leaves"
    ]


def _guarded(profile: Profile, preprocess: Preprocess) -> Profile:
    """Return the profile whose readers refuse rows that preprocessing would make too large for float32."""
    guard = preprocess.guard(profile.spec.dim)
    spec = replace(profile.spec, refuse_zero_norm=guard.by_norm, factor=guard.factor, offset=guard.offset)
    return replace(profile, spec=spec)


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
