"""Labels for new data, with the model of a finished run: `raydc assign`."""

from functools import partial

from raydc.config import Config, EmbeddingColumn
from raydc.errors import DataError
from raydc.labelling import Labelling
from raydc.lake import absolute
from raydc.model import Model
from raydc.pipeline import make_lake
from raydc.slices import InputSpec
from raydc.stages.assign import label_all
from raydc.stages.profile import profile_input


def label_new_rows(config: Config, model_uri: str, output: str) -> tuple[int, int, int]:
    """Write labels/ and rejects/ for the input of `config` below `output`; return rows, labels and rejects.

    The columns are those of the model unless the settings name others.

    Raises:
        DataError: the input cannot be read, or its rows are not as wide as the model's.
    """
    lake = make_lake(config)
    model = Model.load(absolute(model_uri), lake)
    columns = model.details.get("columns", [])
    if columns and "embedding_columns" not in config.input.model_fields_set:
        named = [EmbeddingColumn(name=c["name"], weight=c["weight"], dtype=c["dtype"]) for c in columns]
        section = config.input.model_copy(update={"embedding_columns": named})
        config = config.model_copy(update={"input": section})
    # K bounds the rows of a fit, not of a labelling.
    leaves = config.cluster.model_copy(update={"num_leaves": 2})
    profile = profile_input(config.model_copy(update={"cluster": leaves}), lake)
    if profile.spec.dim != model.dim:
        raise DataError(f"assign: rows are {profile.spec.dim} wide, the model expects {model.dim}.")
    load = partial(_load, config, model_uri, output, profile.spec)
    total = label_all(config, load, profile.slices, config.evaluate.num_exemplars)
    return total.rows, total.labels, total.rejects


def _load(config: Config, model_uri: str, output: str, spec: InputSpec) -> Labelling:
    lake = make_lake(config)
    model = Model.load(absolute(model_uri), lake)
    return Labelling(lake, absolute(output), spec, model, block_rows=config.assign.block_rows)
