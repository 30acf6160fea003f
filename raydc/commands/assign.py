"""Labels for new data, with the model of a finished run: `raydc assign`."""

import hashlib
import logging
from dataclasses import asdict, replace
from typing import Any, get_args

from raydc.config import Config, ElementType, EmbeddingColumn, digest
from raydc.data.profile import Profile
from raydc.data.sample import profile_input
from raydc.data.schema import FORMAT_VERSION
from raydc.errors import ConfigError, DataError, StageError
from raydc.labeling.label_slice import Labeling
from raydc.model import CENTROIDS, HEAD, PREDICTOR, WEIGHTS, Model
from raydc.pipeline import make_lake
from raydc.runfolder.lease import acquire
from raydc.runfolder.ownership import LABELS, OwnedFolder, overlaps
from raydc.runfolder.signals import stoppable
from raydc.runtime import session
from raydc.runtime.board import bounded
from raydc.stages.assign import label_all, shared
from raydc.storage.lake import Lake, absolute, join

log = logging.getLogger(__name__)

_MADE_FROM = {"model": "model", "predictor": "model", "input": "input", "columns": "choice of columns"}
"""Keys of labels.json that must stay the same, and what they are called."""


def label_new_rows(config: Config, model_uri: str, output: str) -> tuple[int, int, int]:
    """Write labels/ and rejects/ for the input of `config` below `output`; return rows, labels and rejects.

    The columns are those of the model unless the settings name others. The folder has one driver, and a file
    labels.json that says what the labels are made from; the same call continues where it stopped.

    Args:
        config: the input, the storage and the cluster.
        model_uri: a run folder, or its model/.
        output: folder of the labels: empty, or of an earlier call with the same model and input.

    Raises:
        ConfigError: the output, the input and the model lie within one another.
        DataError: the input cannot be read, or its rows are not as wide as the model's.
        StageError: the output folder is somebody else's, or holds labels of another model or input.
    """
    lake = make_lake(config)
    folder = OwnedFolder(lake, absolute(output), LABELS)
    _check_places(config, model_uri, folder.root)
    folder.read_owner()
    model = Model.load(absolute(model_uri), lake)
    profile = _profile(config, model, lake)
    made_from = {
        **_model_digests(lake, model_uri),
        "input": profile.fingerprint,
        "columns": digest(asdict(profile.spec)),
    }
    _refuse_others(folder, made_from)
    lease = acquire(lake, folder.root, progress=folder.progress, **config.lease.model_dump())
    folder.fence = lease.fence

    def give_back() -> None:
        lease.release("stopped by SIGTERM")
        log.error("assign: stopped by SIGTERM; the same command continues")

    job = Labeling(lake=lake, output=folder.root, spec=profile.spec, model=model, block_rows=config.assign.block_rows)
    with lease, stoppable(lease):
        # Another driver may have worked here since the first look.
        _refuse_others(folder, made_from)
        folder.write_owner({"format_version": FORMAT_VERSION, **made_from})
        # Twice, because joining a cluster installs Ray's own handler.
        with (
            session.connected(config),
            stoppable(lease, give_back),
            bounded("assign", config, folder, folder.tell, stall_seconds=config.assign.stall_seconds) as bound,
        ):
            total = label_all(config, shared(job), profile.slices, config.evaluate.num_exemplars, bound, folder)
    return total.rows, total.labels, total.rejects


def _check_places(config: Config, model_uri: str, output: str) -> None:
    problems = overlaps("--input ", config.input.path, "--output ", output)
    # A model's run folder is listed in its manifest, and cleared by its stages.
    run = absolute(model_uri).rstrip("/").removesuffix("/model")
    problems += overlaps("--model ", run, "--output ", output)
    if problems:
        raise ConfigError("\n".join(problems))


def _profile(config: Config, model: Model, lake: Lake) -> Profile:
    columns = model.details.get("columns", [])
    if columns and "embedding_columns" not in config.input.model_fields_set:
        named = [_as_setting(c) for c in columns]
        section = config.input.model_copy(update={"embedding_columns": named})
        config = config.model_copy(update={"input": section})
    # K bounds the rows of a fit, not of a labeling.
    leaves = replace(config.cluster, num_leaves=2)
    profile = profile_input(config.model_copy(update={"cluster": leaves}), lake, model.preprocess)
    if profile.spec.dim != model.dim:
        raise DataError(
            f"assign: rows are {profile.spec.dim} wide, the model expects {model.dim}. Give input of "
            "the model's columns, or name them in input.embedding_columns."
        )
    return profile


def _as_setting(column: dict[str, Any]) -> EmbeddingColumn:
    """Return the setting that reads a column as the model's run did."""
    dtype = column["dtype"] if column["dtype"] in get_args(ElementType) else None
    if column.get("npy") is not None:
        # Its arrays are those of the rows that the model was fitted on.
        raise ConfigError(
            "assign: the rows of the model's run came from .npy files. Say where those of the new rows are: --set "
            "'input.embedding_columns={npy: \"FOLDER/NAME_{number}.npy\"}'."
        )
    given = {"dtype": dtype, "columns": list(column.get("parts", ())), "scale": column.get("scale", 1.0)}
    return EmbeddingColumn(name=column["name"], weight=column["weight"], **given)


def _refuse_others(folder: OwnedFolder, made_from: dict[str, Any]) -> None:
    """Return if the labels in the folder, if any, are made from the same: slices that are complete are skipped.

    Raises:
        StageError: they are not, or the folder is somebody else's.
    """
    before = folder.read_owner() or {}
    # What an earlier version did not write down is not compared.
    changed = [name for key, name in _MADE_FROM.items() if key in before and before[key] != made_from.get(key)]
    if changed:
        raise StageError(
            f"assign: {folder.root} holds labels made from another {' and '.join(dict.fromkeys(changed))}. Use another "
            "--output."
        )


def _model_digests(lake: Lake, model_uri: str) -> dict[str, str | None]:
    found = Model.folder(absolute(model_uri), lake)

    def checksum(name: str) -> str:
        return hashlib.sha256(lake.read_bytes(join(found, name))).hexdigest()

    return {
        "model": digest([checksum(name) for name in (HEAD, WEIGHTS, CENTROIDS)]),
        "predictor": digest(checksum(PREDICTOR)) if lake.exists(join(found, PREDICTOR)) else None,
    }
