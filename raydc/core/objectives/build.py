"""From the name of an objective to its module: the one place where all names are listed."""

from raydc.core.objectives.dec import Dec
from raydc.core.objectives.idec import Idec
from raydc.core.objectives.objective import Objective, Parts


def uses_autoencoder(name: str) -> bool:
    """Return whether an autoencoder is pretrained; otherwise the preprocessed rows are clustered as they are."""
    return name not in ("kmeans",)


def build(name: str, parts: Parts) -> Objective | None:
    """Return the objective of a name; None where k-means is the last step.

    Raises:
        ValueError: no objective has this name.
    """
    if name in ("kmeans", "autoencoder"):
        return None
    if name == "dec":
        return Dec.of(parts)
    if name == "idec":
        return Idec.of(parts)
    raise ValueError(f"unknown objective {name!r}")
