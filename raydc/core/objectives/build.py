"""From the name of an objective to its module: the one place where all names are listed."""

from raydc.core.objectives.ae import Ae
from raydc.core.objectives.dcn import Dcn
from raydc.core.objectives.dec import Dec
from raydc.core.objectives.distill import Distill
from raydc.core.objectives.icon import Icon
from raydc.core.objectives.idec import Idec
from raydc.core.objectives.objective import Objective, Parts, Pass
from raydc.core.objectives.temi import Temi
from raydc.core.objectives.vade import UnitRange, Vade
from raydc.core.training.settings import FitSettings


def uses_autoencoder(name: str) -> bool:
    """Return whether an autoencoder is pretrained; otherwise the preprocessed rows are clustered as they are."""
    return name not in ("kmeans", "temi", "icon")


def first_look(settings: FitSettings) -> Pass | None:
    """Return a pass over all rows that comes before any training and refuses what the objective cannot take."""
    if settings.objective in ("vade", "vdc") and settings.vade.likelihood == "bernoulli":
        return UnitRange()
    return None


def build(name: str, parts: Parts) -> Objective | None:
    """Return the objective of a name; None where nothing is left to train after k-means.

    Raises:
        ValueError: no objective has this name.
    """
    if name in ("kmeans", "autoencoder"):
        return None
    if name == "dec":
        return Dec.of(parts)
    if name == "idec":
        return Idec.of(parts)
    if name == "ae":
        # Without a code loss there is nothing beyond the pretraining: exactly the autoencoder's k-means.
        return Ae.of(parts) if parts.settings.refine.beta > 0 else None
    if name == "dcn":
        return Dcn.of(parts)
    if name in ("vade", "vdc"):
        return Vade.of(parts)
    if name == "distill":
        return Distill.of(parts)
    if name == "temi":
        return Temi(parts)
    if name == "icon":
        return Icon(parts)
    raise ValueError(f"unknown objective {name!r}")
