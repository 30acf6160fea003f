"""The one table of objectives: every line names a class, and the settings agree with what the class is."""

import subprocess
import sys

import pytest

from raydc.config import parse_config
from raydc.core.objectives.build import class_of
from raydc.core.objectives.objective import Objective
from raydc.core.objectives.table import OBJECTIVES, info
from raydc.core.training.settings import FitSettings, RefineSettings

LEAST = {"input": {"path": "data"}}
TRAINED = [name for name, about in OBJECTIVES.items() if about.is_trained]


@pytest.mark.parametrize("name", TRAINED)
def test_a_class_of_the_table_is_an_objective_that_makes_itself_from_inputs(name):
    found = class_of(name)
    assert issubclass(found, Objective)
    assert found.from_inputs.__func__ is not Objective.from_inputs.__func__


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_settings_and_the_core_read_the_same_line(name):
    config = parse_config(LEAST | {"fit": {"objective": name}})
    core = FitSettings(objective=name)
    assert config.learns == core.learns == info(name).needs_autoencoder
    assert config.refines == core.refines == (name in TRAINED)
    assert config.needs_neighbors == core.needs_pairs == ("neighbors" in config.stages)


def test_a_weight_of_zero_leaves_nothing_to_train():
    assert not FitSettings(objective="ae", refine=RefineSettings(code_weight=0.0)).refines
    assert FitSettings(objective="idec", refine=RefineSettings(code_weight=0.0)).refines


def test_an_objective_without_a_loss_has_no_class():
    assert class_of("kmeans") is None and class_of("autoencoder") is None


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="unknown objective 'som'. Choose one of dec, idec, ae"):
        info("som")
    with pytest.raises(ValueError, match="objective"):
        FitSettings(objective="som")


def test_the_table_is_read_without_torch():
    script = "import sys, raydc.core.training.settings; assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
