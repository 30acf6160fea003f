"""The teacher of a distillation: a finished run's model, checked against the settings before any worker starts."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from raydc.config import Config, digest
from raydc.core.models.autoencoder import perceptron
from raydc.core.models.mixture import Mixture
from raydc.core.models.preprocess import Preprocess
from raydc.core.models.teacher import Teacher
from raydc.errors import ConfigError, DataError
from raydc.model import HEAD, Model
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.storage.lake import Lake, join


@dataclass(frozen=True)
class Teaching:
    """A teacher and what a fit takes over from it."""

    teacher: Teacher
    preprocess: Preprocess
    fingerprint: str
    """Digest of the teacher's model, so that a fit does not go on under another teacher of the same place."""


def load_teacher(config: Config, dim: int, lake: Lake) -> Teaching | None:
    """Return the teacher that the settings name, or None.

    Args:
        config: checked settings.
        dim: width of the input's rows.
        lake: where the teacher is.

    Raises:
        DataError: there is no model at the place.
        ConfigError: it cannot teach this run; all problems in one message.
    """
    if config.fit.teacher is None:
        return None
    model = Model.load(config.fit.teacher, lake)
    problems = _problems(config, model, dim)
    decoder = _decoder(config.fit.teacher, model, lake)
    if decoder is None and model.encoder is not None and config.distill.reconstruction_weight > 0:
        problems.append(
            f"distill.reconstruction_weight={config.distill.reconstruction_weight} needs a decoder, and the teacher "
            f"{config.fit.teacher} has none that reconstructs rows. Set it to 0"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    teacher = Teacher(
        encoder=model.encoder,
        decoder=decoder,
        centers_ML=model.centers_KL,
        classes_M=torch.from_numpy(_classes(config, model)),
        predictor=model.predictor,
    )
    head = lake.read_json(join(Model.folder(config.fit.teacher, lake), HEAD))
    return Teaching(teacher, model.preprocess, digest(head))


def _problems(config: Config, model: Model, dim: int) -> list[str]:
    where, found = f"fit.teacher={config.fit.teacher}", []
    if model.dim != dim:
        found.append(f"{where} takes rows of width {model.dim}, the input has {dim}. Give a run of the same columns")
    elif model.encoder is not None and list(model.widths) != config.encoder_widths(dim):
        hidden, latent = list(model.widths[1:-1]), model.widths[-1]
        found.append(
            f"{where} has a network of widths {list(model.widths)}, the settings ask for {config.encoder_widths(dim)}. "
            f"Set autoencoder.hidden_dims={hidden} and autoencoder.latent_dim={latent}"
        )
    if model.preprocess.method != config.preprocess.method:
        found.append(
            f"{where} was fitted with preprocess.method={model.preprocess.method}, the settings say "
            f"{config.preprocess.method}. Set it to {model.preprocess.method}"
        )
    level = config.fit.teacher_level
    if level is not None and level not in model.levels:
        known = ", ".join(map(str, model.levels)) or "none"
        found.append(f"fit.teacher_level={level} is no level of the teacher's tree. Its levels: {known}")
        return found
    num_classes = int(_classes(config, model).max()) + 1
    if num_classes != config.cluster.num_leaves:
        what = "leaves" if level is None else f"groups at level {level}"
        found.append(
            f"{where} has {num_classes} {what}, cluster.num_leaves is {config.cluster.num_leaves}. "
            f"Set cluster.num_leaves={num_classes}"
        )
    return found


def _classes(config: Config, model: Model) -> np.ndarray:
    level = config.fit.teacher_level
    groups = np.arange(model.num_leaves) if level is None else model.levels[level]
    return groups.astype(np.int64)


def _decoder(uri: str, model: Model, lake: Lake) -> nn.Module | None:
    """Return the decoder of the teacher's run; None where it has none, or one that gives logits."""
    # That of a mixture model may be a Bernoulli decoder, and its code has noise: it is no autoencoder.
    if model.encoder is None or isinstance(model.predictor, Mixture):
        return None
    weights = artifacts.FIT_DECODER.read_if_there(Place(lake, Model.folder(uri, lake).rsplit("/", 1)[0]))
    if weights is None:
        return None
    decoder = perceptron(model.widths[::-1])
    try:
        decoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"fit.teacher={uri}: its decoder is damaged ({reason}). Restore the folder.") from None
    return decoder
