"""From the name of an objective to what is trained, by the table of objectives."""

from importlib import import_module

from raydc.core.objectives.objective import Objective, ObjectiveInputs, Pass
from raydc.core.objectives.table import info
from raydc.core.training.settings import FitSettings


def class_of(name: str) -> type[Objective] | None:
    """Return the class of an objective; None where nothing is trained after k-means.

    Raises:
        ValueError: no objective has this name.
    """
    about = info(name)
    if about.module is None:
        return None
    kind: type[Objective] = getattr(import_module(f"raydc.core.objectives.{about.module}"), about.class_name)
    return kind


def check_inputs(settings: FitSettings) -> Pass | None:
    """Return a pass over all rows that comes before any training and refuses what the objective cannot take."""
    kind = class_of(settings.objective)
    return None if kind is None else kind.check_inputs(settings)


def build(name: str, inputs: ObjectiveInputs) -> Objective | None:
    """Return the objective of a name; None where nothing is left to train after k-means.

    Raises:
        ValueError: no objective has this name.
    """
    kind = class_of(name)
    return kind.from_inputs(inputs) if kind is not None and info(name).has_loss(inputs.settings.refine) else None
