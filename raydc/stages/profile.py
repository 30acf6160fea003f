"""profile: read every footer and a sample, refuse what cannot work, and write down the plan of slices.

Ray Data takes a schema from a few sampled files and silently bends the later ones to it, so every footer is read here.
No worker has started yet: whatever is wrong costs seconds, and all of it is told in one message.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydc.config import Config, EmbeddingColumn, digest
from raydc.core.hashing import stream_seed
from raydc.core.models.preprocess import Moments
from raydc.data import duplicate_ids
from raydc.data.profile import Profile
from raydc.data.records import BadFile, ProfileMetrics
from raydc.data.slices import (
    Column,
    Footer,
    InputSpec,
    Layout,
    Slice,
    embedding_layout,
    plan_slices,
    read_footers,
    read_slice,
    shown,
)
from raydc.errors import ConfigError, DataError, StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir
from raydc.storage.lake import Lake

if TYPE_CHECKING:
    from raydc.runtime.attempts import Bound

log = logging.getLogger(__name__)

_SAMPLED_SLICES = 64
_MOST_LISTED = 20
_READERS = 16


def run(config: Config, run: RunDir) -> ProfileMetrics:
    """Read the input's footers and sample, and write profile.json."""
    profile = profile_input(config, run.lake)
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
        "repeated_ids": repeated,
    }


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


def inspect(config: Config, lake: Lake) -> tuple[Profile | None, list[str], list[str]]:
    """Return what the footers say: the profile without its sample, the data's problems and the settings' problems."""
    section = config.input
    footers = read_footers(lake, lake.list_parquet(section.path))
    fingerprint = digest([[f.uri.rsplit("/", 1)[-1], f.size, f.digest, f.problem] for f in footers])
    file_problems = {f.uri: f"cannot be read: {f.problem}" for f in footers if f.problem}
    readable = [f for f in footers if not f.problem]
    # A file without rows cannot hold wrong ones, whatever types its writer gave to empty columns.
    filled = [f for f in readable if f.num_rows] or readable
    columns: list[Column] = []
    general: list[str] = []
    for wanted in section.embedding_columns:
        column, problems = _resolve_column(wanted, filled, section.on_bad_rows, lake)
        _collect(file_problems, problems)
        if column is None:
            general.append(f"column {wanted.name!r}: no file holds usable embeddings in it")
        else:
            columns.append(column)
    id_type, problems = _resolve_ids(section.id_column, filled)
    _collect(file_problems, problems)
    _collect(file_problems, _other_columns(config, filled))

    good = [f for f in readable if f.uri not in file_problems]
    num_rows = sum(f.num_rows for f in good)
    bad_files: list[BadFile] = []
    if section.on_bad_files == "quarantine" and num_rows:
        rows = {f.uri: f.num_rows if not f.problem else None for f in footers}
        bad_files = [{"uri": u, "problem": p, "rows": rows[u]} for u, p in sorted(file_problems.items())]
    elif file_problems:
        general += [f"{uri}: {problem}" for uri, problem in sorted(file_problems.items())]
        if section.on_bad_files == "fail":
            general[-1] += ". Fix the export, or set input.on_bad_files=quarantine"
    if not general and num_rows == 0:
        general.append(f"input.path={section.path}: no rows in {len(footers)} files")
    settings = []
    if num_rows and config.cluster.num_leaves > num_rows:
        settings.append(
            f"cluster.num_leaves={config.cluster.num_leaves} exceeds the {num_rows} rows of the input. "
            "Lower num_leaves, or point input.path at more data."
        )
    shape = section.image_shape
    if columns and shape and int(np.prod(shape)) != sum(c.dim for c in columns):
        settings.append(f"input.image_shape={shape} does not hold {sum(c.dim for c in columns)} values.")
    if general or len(columns) < len(section.embedding_columns) or id_type is None:
        return None, general, settings
    spec = InputSpec(
        tuple(columns),
        section.id_column,
        id_type,
        section.label_column,
        section.weight_column,
        tuple(section.carry_columns),
        config.preprocess.method == "l2",
        section.on_bad_rows,
        section.on_bad_files,
    )
    slices = plan_slices(good, section.slice_bytes)
    profile = Profile(spec=spec, slices=slices, fingerprint=fingerprint, bad_files=bad_files)
    return profile, general, settings


def _resolve_column(
    wanted: EmbeddingColumn, footers: Sequence[Footer], on_bad_rows: str, lake: Lake
) -> tuple[Column | None, dict[str, str]]:
    """Return the column as most files have it, and the problem of each file that has it otherwise."""
    problems: dict[str, str] = {}
    layouts: dict[str, Layout] = {}
    dims: dict[str, int | None] = {}
    for f in footers:
        assert f.schema is not None
        if wanted.name not in f.schema.names:
            problems[f.uri] = f"has no column {wanted.name!r} (columns: {', '.join(f.schema.names)})"
            continue
        arrow = f.schema.field(wanted.name)
        layout = embedding_layout(arrow.type, arrow.metadata, wanted.dtype)
        if isinstance(layout, str):
            problems[f.uri] = f"column {wanted.name!r} {layout}"
            continue
        layouts[f.uri] = layout
        values, rows = f.num_values[wanted.name], f.num_rows
        dims[f.uri] = layout.dim or (values // rows if rows and values % rows == 0 else None)
    filled = {f.uri: f for f in footers if f.uri in layouts and f.num_rows}
    found_in = Counter((layouts[u].dtype, dims[u]) for u in filled or layouts)
    if not found_in:
        return None, problems
    dtype, dim = max(found_in, key=lambda kind: (kind[1] is not None, found_in[kind]))
    usual = next((f for u, f in filled.items() if (layouts[u].dtype, dims[u]) == (dtype, dim)), None)
    if usual is not None and layouts[usual.uri].dim is None:
        # So far a mean over the file, which bad rows may have bent to another whole number.
        dim = _commonest_length(usual, wanted.name, lake) or dim
    if not dim:
        return None, problems
    for uri, footer in filled.items():
        layout, found = layouts[uri], dims[uri] or dim
        uneven = dims[uri] is None
        if found != dim and layout.dim is None:
            found = _commonest_length(footer, wanted.name, lake) or dim
            uneven = found == dim
        if uneven and on_bad_rows == "fail":
            counts = f"{footer.num_values[wanted.name]} values in {footer.num_rows} rows"
            problems[uri] = (
                f"column {wanted.name!r} has rows of different lengths, or missing ones ({counts}). "
                "Set input.on_bad_rows=quarantine to leave the wrong ones out"
            )
        elif (layout.dtype, found) != (dtype, dim):
            problems[uri] = f"column {wanted.name!r} holds {found} x {layout.dtype}, expected {dim} x {dtype}"
    return Column(wanted.name, dim, dtype, wanted.weight), problems


def _commonest_length(footer: Footer, name: str, lake: Lake) -> int | None:
    """Return the commonest length among the first rows of a list column; None where they cannot be read."""
    try:
        with lake.open_parquet(footer.uri) as handle:
            batch = next(pq.ParquetFile(handle).iter_batches(1024, columns=[name]))
    except (pa.ArrowException, OSError):
        return None
    column = batch.column(0)
    lengths = pc.drop_null(pc.list_value_length(getattr(column, "storage", column)))
    return Counter(lengths.to_pylist()).most_common(1)[0][0] if len(lengths) else None


def _resolve_ids(name: str, footers: Sequence[Footer]) -> tuple[str | None, dict[str, str]]:
    problems: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for f in footers:
        assert f.schema is not None
        if name not in f.schema.names:
            problems[f.uri] = f"has no column {name!r} for the id (columns: {', '.join(f.schema.names)})"
            continue
        found = f.schema.field(name).type
        plain = found.value_type if pa.types.is_dictionary(found) else found
        if pa.types.is_integer(plain) and plain != pa.uint64():
            kinds[f.uri] = "int64"
        elif pa.types.is_string(plain) or pa.types.is_large_string(plain):
            kinds[f.uri] = "string"
        else:
            problems[f.uri] = f"id column {name!r} is {found}, expected int64 or string"
    if not kinds:
        return None, problems
    kind = Counter(kinds.values()).most_common(1)[0][0]
    problems |= {u: f"id column {name!r} is {k}, expected {kind}" for u, k in kinds.items() if k != kind}
    return kind, problems


def _other_columns(config: Config, footers: Sequence[Footer]) -> dict[str, str]:
    section = config.input
    problems: dict[str, str] = {}
    usual = {name: kept for name in section.carry_columns if (kept := _usual_field(name, footers)) is not None}
    for f in footers:
        assert f.schema is not None
        names = [n for n in (section.label_column, section.weight_column, *section.carry_columns) if n]
        missing = [n for n in names if n not in f.schema.names]
        found = []
        if missing:
            found.append(f"has no column {', '.join(map(repr, missing))} (columns: {', '.join(f.schema.names)})")
        if section.label_column and section.label_column not in missing:
            type_ = f.schema.field(section.label_column).type
            plain = type_.value_type if pa.types.is_dictionary(type_) else type_
            if not (pa.types.is_integer(plain) or pa.types.is_boolean(plain) or _is_text(plain)):
                found.append(f"label column {section.label_column!r} is {type_}, expected integers or strings")
        if section.weight_column and section.weight_column not in missing:
            type_ = f.schema.field(section.weight_column).type
            if not (pa.types.is_integer(type_) or pa.types.is_floating(type_)):
                found.append(f"weight column {section.weight_column!r} is {type_}, expected numbers")
        for name in section.carry_columns:
            if name not in missing and not _stackable(f.schema.field(name), usual[name]):
                found.append(f"carried column {name!r} is {f.schema.field(name).type}, expected {usual[name].type}")
        if found:
            problems[f.uri] = "; ".join(found)
    return problems


def _usual_field(name: str, footers: Sequence[Footer]) -> pa.Field | None:
    types = Counter(f.schema.field(name).type for f in footers if f.schema is not None and name in f.schema.names)
    return pa.field(name, types.most_common(1)[0][0]) if types else None


def _stackable(first: pa.Field, second: pa.Field) -> bool:
    """Return whether rows of both files fit into one table, as the exemplars need."""
    try:
        pa.unify_schemas([pa.schema([first]), pa.schema([second])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


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
                moments = moments.merge(Moments.from_rows(batch.x))
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
        raise StageError(f"profile: {in_one_line(root_cause(error))}. The same command tries again.") from error


def _keys_or_none(lake: Lake, part: Slice, spec: InputSpec, bound: "Bound") -> npt.NDArray[np.void]:
    """Return the keys of the ids of a slice; none if reading them kills the process, as if they were unreadable."""
    with bound.attempt(part.name) as lost:
        if lost.beyond(bound.most) < 0:
            return duplicate_ids.slice_keys(lake, part, spec)
        bound.leave_out(part.name, lost, f"its {part.num_rows:,} ids are not compared")
        return duplicate_ids.no_keys()


def _collect(into: dict[str, str], problems: dict[str, str]) -> None:
    for uri, problem in problems.items():
        into[uri] = f"{into[uri]}; {problem}" if uri in into else problem


def refuse(data_problems: list[str], config_problems: list[str]) -> None:
    """Raise one error with every problem, if there is any."""
    problems = data_problems + config_problems
    if not problems:
        return
    listed = problems[:_MOST_LISTED]
    if len(problems) > len(listed):
        listed.append(f"and {len(problems) - len(listed)} more")
    text = listed[0] if len(listed) == 1 else f"{len(problems)} problems\n  " + "\n  ".join(listed)
    if data_problems:
        raise DataError(f"profile: {text}")
    raise ConfigError(text)
