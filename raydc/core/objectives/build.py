"""From the name of an objective to what is trained, by the table of objectives."""

from raydc.core.objectives.objective import Objective, Parts, Pass
from raydc.core.objectives.table import info
from raydc.core.training.settings import FitSettings


def check_inputs(settings: FitSettings) -> Pass | None:
    """Return a pass over all rows that comes before any training and refuses what the objective cannot take."""
    found = info(settings.objective)
    return found.load().check_inputs(settings) if found.is_trained else None


def build(name: str, parts: Parts) -> Objective | None:
    """Return the objective of a name; None where nothing is left to train after k-means.

    Raises:
        ValueError: no objective has this name.
    """
    return info(name).load().from_parts(parts) if info(name).has_loss(parts.settings.refine) else None
