"""Settings that changed their name: the old one works for one version, with a warning."""

import warnings
from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, str] = {
    "neighbours": "neighbors",
    "evaluate.neighbour_rows": "evaluate.neighbor_rows",
    "evaluate.num_neighbours": "evaluate.num_neighbors",
    "evaluate.neighbour_queries": "evaluate.neighbor_queries",
    "refine.beta": "refine.code_weight",
    "refine.gamma": "refine.clustering_weight",
    "head.alpha": "head.debiasing",
    "head.beta": "head.pair_exponent",
}
"""Old name -> present name; a section, or `section.key`."""


def present_name(key: str) -> str:
    """Return the present name of a setting, `section.key`, and warn where the key is an old one."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            _warn(old, new)
            return new + key.removeprefix(old)
    return key


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with every old name replaced, and warn of each.

    Raises:
        ValueError: a setting is given by its old and its present name.
    """
    found = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
    for old, new in RENAMED.items():
        section, _, key = old.rpartition(".")
        # A section stands at the top, a key in its section.
        place = found.get(section) if section else found
        if not isinstance(place, dict) or key not in place:
            continue
        present = new.rpartition(".")[2]
        if present in place:
            raise ValueError(f"{old} is the old name of {new}, and both are given. Remove {old}.")
        _warn(old, new)
        place[present] = place.pop(key)
    return found


def _warn(old: str, new: str) -> None:
    # Python shows a warning once for each text.
    warnings.warn(f"{old} is now called {new}; the next version refuses the old name.", FutureWarning, stacklevel=3)
