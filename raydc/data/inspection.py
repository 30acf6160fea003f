"""The input judged by its footers alone: types, widths, missing columns, every problem in one message.

Ray Data takes a schema from a few sampled files and silently bends the later ones to it, so every footer is read here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raydc.config import Config, digest
from raydc.data import ids
from raydc.data.embeddings import names_of, resolve
from raydc.data.footers import Footer, read_footers
from raydc.data.layouts import converted
from raydc.data.neighbor_cost import NeighborCost
from raydc.data.partitions import partition_values
from raydc.data.profile import Profile
from raydc.data.records import BadFile
from raydc.data.slices import InputSpec, plan_slices
from raydc.errors import ConfigError, DataError
from raydc.storage.lake import Lake, Listing
from raydc.storage.listing import PassedOver, passed_over_text

_MOST_LISTED = 20

_NOT_IN_DELTA = {"uint64", "uuid"}
_NOT_IN_ICEBERG = {"uint64", "uuid", "fixed_size_binary", "binary", "date32", "timestamp", "decimal128"}

_ID_TYPES = "integers, text, a UUID, bytes, a decimal, a date or a timestamp"


def inspect(config: Config, lake: Lake, listing: Listing | None = None) -> tuple[Profile | None, list[str], list[str]]:
    """Return what the footers say: the profile without its sample, the data's problems, the settings' problems."""
    section = config.input
    listing = lake.find_parquet(section.path) if listing is None else listing
    footers = read_footers(lake, listing.files)
    file_problems = {f.uri: f"cannot be read: {f.problem}" for f in footers if f.problem}
    readable = [f for f in footers if not f.problem]
    # A file without rows cannot hold wrong ones, whatever types its writer gave to empty columns.
    filled = [f for f in readable if f.num_rows] or readable
    embeddings = resolve(section.embedding_columns, filled, section.on_bad_rows, lake)
    contents = [[f.uri.rsplit("/", 1)[-1], f.size, f.digest, f.problem] for f in footers]
    fingerprint = digest(contents + embeddings.arrays)
    id_type, id_problems = _resolve_ids(section.id_column, filled)
    for problems in (embeddings.problems, id_problems):
        _collect(file_problems, problems)
    others = _other_columns(config, filled)
    general = [*embeddings.general, *others.problems]
    if embeddings.general and "*.npy" in listing.passed_over:
        general[0] += _arrays_hint(listing.passed_over["*.npy"])

    good = [f for f in readable if f.uri not in file_problems]
    num_rows = sum(f.num_rows for f in good)
    bad_files: list[BadFile] = []
    if section.on_bad_files == "quarantine" and num_rows:
        rows = {f.uri: f.num_rows if not f.problem else None for f in footers}
        bad_files = [{"uri": u, "problem": p, "rows": rows[u]} for u, p in sorted(file_problems.items())]
    elif file_problems:
        general += [f"{uri}: {problem}" for uri, problem in sorted(file_problems.items())]
        if section.on_bad_files == "fail":
            general[-1] += _remedy(general[-1], num_rows)
    if not general and num_rows == 0:
        general.append(f"input.path={section.path}: no rows in {len(footers)} files")
    settings = settings_problems(config, num_rows, sum(c.dim for c in embeddings.columns), id_type)
    if general or not embeddings.columns or id_type is None:
        return None, general, settings
    spec = InputSpec(
        columns=tuple(embeddings.columns),
        id_column=section.id_column,
        id_type=id_type,
        label_column=section.label_column,
        weight_column=section.weight_column,
        carry_columns=tuple(section.carry_columns),
        carry_as_text=others.carry_as_text,
        refuse_zero_norm=config.preprocess.method == "l2",
        on_bad_rows=section.on_bad_rows,
        on_bad_files=section.on_bad_files,
    )
    profile = Profile(
        spec=spec,
        slices=plan_slices(good, section.slice_bytes),
        fingerprint=fingerprint,
        bad_files=bad_files,
        notes=[*_notes(listing), *embeddings.notes, *others.notes],
        # .npy files beside the Parquet files are in no listing.
        listing="" if any(c.npy for c in embeddings.columns) else listing.digest,
    )
    cost = NeighborCost.of(config, profile)
    return profile, general, settings + (cost.problems(config) if cost is not None else [])


def _notes(listing: Listing) -> list[str]:
    """Return what to know of the place itself."""
    passed = passed_over_text(listing.passed_over)
    return [*([f"{passed}. Name them in input.path to include them"] if passed else []), *listing.notes]


def _arrays_hint(arrays: PassedOver) -> str:
    """Return what to set where rows may lie in .npy files beside the Parquet files."""
    return (
        f". {arrays.count} .npy files lie there, such as {arrays.example}: if they hold the rows in the same order, "
        "set input.embedding_columns={npy: 'FOLDER/NAME_{number}.npy'}"
    )


def _remedy(problem: str, num_rows: int) -> str:
    """Return what to do about files of which the last problem is given; "" where it says so itself."""
    if num_rows:
        return ". Fix the export, or set input.on_bad_files=quarantine"
    # Without a good file nothing would be left.
    if "input." in problem or "To convert" in problem:
        return ""
    named = "has no column" in problem
    return (
        ". Name the columns that are there in input.embedding_columns and input.id_column"
        if named
        else ". Fix the export"
    )


def settings_problems(config: Config, num_rows: int, dim: int, id_type: str | None) -> list[str]:
    """Return which settings do not fit the input, whose rows, width and id type these are."""
    problems = []
    if num_rows and config.cluster.num_leaves > num_rows:
        problems.append(
            f"cluster.num_leaves={config.cluster.num_leaves} exceeds the {num_rows} rows of the input. "
            "Lower num_leaves, or point input.path at more data."
        )
    shape = config.input.image_shape
    if dim and shape and int(np.prod(shape)) != dim:
        problems.append(f"input.image_shape={shape} does not hold {dim} values.")
    tables = {"delta": _NOT_IN_DELTA, "iceberg": _NOT_IN_ICEBERG}
    for form, strangers in tables.items():
        if id_type and getattr(config.publish, form) is not None and re.split(r"\W", id_type)[0] in strangers:
            line = converted("COLUMN::VARCHAR").replace("COLUMN", config.input.id_column)
            problems.append(f"publish.{form}: a table there holds no ids of type {id_type}. {line}")
    return problems


def _resolve_ids(name: str, footers: Sequence[Footer]) -> tuple[str | None, dict[str, str]]:
    problems: dict[str, str] = {}
    kinds: dict[str, str] = {}
    missing, doubles = [], []
    for f in footers:
        assert f.columns is not None
        if name not in f.columns.fields:
            problems[f.uri] = f"has no column {name!r} for the id (columns: {names_of(f.columns)})"
            continue
        found = f.columns.fields[name].type
        if pa.types.is_null(found):
            missing.append(f.uri)
        elif pa.types.is_floating(found):
            doubles.append(f.uri)
        elif kind := ids.id_type(found):
            kinds[f.uri] = kind
        else:
            line = converted("COLUMN::VARCHAR").replace("COLUMN", name)
            problems[f.uri] = f"id column {name!r} is {found}, expected {_ID_TYPES}. {line}"
    kind = _common_kind(set(kinds.values())) or (Counter(kinds.values()).most_common(1)[0][0] if kinds else None)
    if kind != "int64":
        # Beside integers these are integers of which one is missing, as pandas stores them.
        line = converted("COLUMN::BIGINT").replace("COLUMN", name)
        problems |= dict.fromkeys(doubles, f"id column {name!r} is double, expected {_ID_TYPES}. {line}")
    if kind is None:
        problems |= dict.fromkeys(missing, f"id column {name!r} holds no value")
        return None, problems
    wrong = {u: k for u, k in kinds.items() if _common_kind({k, kind}) != kind}
    problems |= {u: f"id column {name!r} is {k}, expected {kind}" for u, k in wrong.items()}
    return kind, problems


def _common_kind(kinds: set[str]) -> str | None:
    """Return the id type that holds the ids of all these types unchanged, if there is one."""
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds and all(k.startswith("decimal128(") for k in kinds):
        scales = {int(k.rstrip(")").split(", ")[1]) for k in kinds}
        return f"decimal128(38, {next(iter(scales))})" if len(scales) == 1 else None
    return "uuid" if kinds == {"uuid", "fixed_size_binary[16]"} else None


@dataclass
class _Others:
    """What the footers say of the label, the weight and the carried columns."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    carry_as_text: tuple[str, ...] = ()


def _other_columns(config: Config, footers: Sequence[Footer]) -> _Others:
    """Judge the optional columns. A file is never left out for one of them; a name that no file knows is refused."""
    section, found = config.input, _Others()
    uses = {"label": section.label_column, "weight": section.weight_column}
    named = [(use, name) for use, name in uses.items() if name] + [("carried", n) for n in section.carry_columns]
    as_text = []
    for use, name in named:
        types, absent = _types_of(name, footers)
        if not types and footers:
            assert footers[0].columns is not None
            found.problems.append(f"has no column {name!r} in any file (columns: {names_of(footers[0].columns)})")
            continue
        if absent:
            meaning = {"label": "their labels are missing", "weight": "their rows weigh 1", "carried": "left empty"}
            found.notes.append(
                f"{use} column {name!r} is not in {len(absent)} of {len(footers)} files, such as {absent[0]}: "
                f"{meaning[use]}"
            )
        wrong = [t for t in types if not _fits(use, t)]
        if len(wrong) == len(types) and wrong:
            expected = "numbers" if use == "weight" else "numbers or text"
            cast = "COLUMN::DOUBLE" if use == "weight" else "COLUMN::VARCHAR"
            line = converted(cast).replace("COLUMN", name)
            found.problems.append(f"{use} column {name!r} is {wrong[0]}, expected {expected}. {line}")
        elif wrong:
            effect = "those rows are bad (bad_weight)" if use == "weight" else "those are read as text"
            found.notes.append(f"{use} column {name!r} is {wrong[0]} in some files: {effect}")
        if use == "label" and all(pa.types.is_floating(t) for t in types):
            found.notes.append(f"label column {name!r} holds floating numbers: each different number is a class")
        if use == "carried" and not _stackable(types):
            as_text.append(name)
            found.notes.append(f"carried column {name!r} has types that do not fit together, written as text")
    found.carry_as_text = tuple(as_text)
    return found


def _types_of(name: str, footers: Sequence[Footer]) -> tuple[list[pa.DataType], list[str]]:
    """Return the types of a column over all files, each once, and the files that have it nowhere."""
    types: dict[str, pa.DataType] = {}
    absent = []
    for f in footers:
        assert f.columns is not None
        if name in f.columns.fields:
            found = f.columns.fields[name].type
            types[str(found)] = found
        elif name in partition_values(f.uri):
            types["string"] = pa.string()
        else:
            absent.append(f.uri)
    return list(types.values()), absent


def _fits(use: str, type_: pa.DataType) -> bool:
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    if use == "weight":
        number = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_decimal(plain)
        return number or pa.types.is_null(plain)
    return use == "carried" or not pa.types.is_nested(plain)


def _stackable(types: Sequence[pa.DataType]) -> bool:
    """Return whether rows of all files fit into one table, as the exemplars need."""
    try:
        pa.unify_schemas([pa.schema([pa.field("x", t)]) for t in types], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


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
