"""Labels for new data, with the model of a finished run: `raydc assign`."""

import hashlib
from functools import partial

from raydc.config import Config, EmbeddingColumn, digest
from raydc.data.sample import profile_input
from raydc.data.slices import InputSpec
from raydc.errors import DataError, StageError
from raydc.labeling.label_slice import Labeling
from raydc.model import Model
from raydc.pipeline import make_lake
from raydc.stages.assign import label_all
from raydc.storage.lake import Lake, absolute, join


def label_new_rows(config: Config, model_uri: str, output: str) -> tuple[int, int, int]:
    """Write labels/ and rejects/ for the input of `config` below `output`; return rows, labels and rejects.

    The columns are those of the model unless the settings name others.

    Raises:
        DataError: the input cannot be read, or its rows are not as wide as the model's.
        StageError: the output folder holds labels of another model or input.
    """
    lake = make_lake(config)
    model = Model.load(absolute(model_uri), lake)
    columns = model.details.get("columns", [])
    if columns and "embedding_columns" not in config.input.model_fields_set:
        named = [EmbeddingColumn(name=c["name"], weight=c["weight"], dtype=c["dtype"]) for c in columns]
        section = config.input.model_copy(update={"embedding_columns": named})
        config = config.model_copy(update={"input": section})
    # K bounds the rows of a fit, not of a labeling.
    leaves = config.cluster.model_copy(update={"num_leaves": 2})
    profile = profile_input(config.model_copy(update={"cluster": leaves}), lake)
    if profile.spec.dim != model.dim:
        raise DataError(f"assign: rows are {profile.spec.dim} wide, the model expects {model.dim}.")
    _claim(lake, absolute(output), {"model": _model_digest(lake, model_uri), "input": profile.fingerprint})
    load = partial(_load, config, model_uri, output, profile.spec)
    total = label_all(config, load, profile.slices, config.evaluate.num_exemplars)
    return total.rows, total.labels, total.rejects


def _claim(lake: Lake, output: str, made_from: dict[str, str]) -> None:
    """Write down what the labels are made from; slices that are complete are skipped, so it must stay the same."""
    uri = join(output, "labels.json")
    if lake.exists(uri):
        before = lake.read_json(uri)
        changed = [name for name in made_from if before.get(name) != made_from[name]]
        if changed:
            raise StageError(
                f"assign: {output} holds labels made from another {' and '.join(changed)}. Use another --output."
            )
    lake.write_json(uri, made_from)


def _model_digest(lake: Lake, model_uri: str) -> str:
    found = Model.folder(absolute(model_uri), lake)
    names = ("config.json", "weights.safetensors", "centroids.safetensors")
    return digest([hashlib.sha256(lake.read_bytes(join(found, name))).hexdigest() for name in names])


def _load(config: Config, model_uri: str, output: str, spec: InputSpec) -> Labeling:
    lake = make_lake(config)
    model = Model.load(absolute(model_uri), lake)
    return Labeling(lake, absolute(output), spec, model, block_rows=config.assign.block_rows)
