"""From the name of an objective to its module: the one place where all names are listed."""

from raydc.core.objectives.ae import Ae
from raydc.core.objectives.dcn import Dcn
from raydc.core.objectives.dec import Dec
from raydc.core.objectives.distill import Distill
from raydc.core.objectives.icon import Icon
from raydc.core.objectives.idec import Idec
from raydc.core.objectives.objective import Objective, ObjectiveInputs, Pass
from raydc.core.objectives.temi import Temi
from raydc.core.objectives.vade import UnitRange, Vade
from raydc.core.training.settings import FitSettings


def needs_autoencoder(name: str) -> bool:
    """Return whether an autoencoder is pretrained; otherwise the preprocessed rows are clustered as they are."""
    return name not in ("kmeans", "temi", "icon")


def check_inputs(settings: FitSettings) -> Pass | None:
    """Return a pass over all rows that comes before any training and refuses what the objective cannot take."""
    if settings.objective in ("vade", "vdc") and settings.vade.likelihood == "bernoulli":
        return UnitRange()
    return None


def build(name: str, inputs: ObjectiveInputs) -> Objective | None:
    """Return the objective of a name; None where nothing is left to train after k-means.

    Raises:
        ValueError: no objective has this name.
    """
    if name in ("kmeans", "autoencoder"):
        return None
    if name == "dec":
        return Dec.from_inputs(inputs)
    if name == "idec":
        return Idec.from_inputs(inputs)
    if name == "ae":
        # Without a code loss there is nothing beyond the pretraining: exactly the autoencoder's k-means.
        return Ae.from_inputs(inputs) if inputs.settings.refine.beta > 0 else None
    if name == "dcn":
        return Dcn.from_inputs(inputs)
    if name in ("vade", "vdc"):
        return Vade.from_inputs(inputs)
    if name == "distill":
        return Distill.from_inputs(inputs)
    if name == "temi":
        return Temi.from_inputs(inputs)
    if name == "icon":
        return Icon.from_inputs(inputs)
    raise ValueError(f"unknown objective {name!r}")
