"""Settings that changed their name: the old name works, with a warning, until both are given."""

import warnings

import pytest

from raydc.config import Config, apply_override, fields_of, load_config, parse_config
from raydc.config.renamed import RENAMED
from raydc.errors import ConfigError

LEAST = {"input": {"path": "data"}}


def values_of(key: str, value) -> dict:
    section, _, name = key.rpartition(".")
    return LEAST | ({section: {name: value}} if section else {name: value})


def value_for(old: str):
    return {"num": 7} if old == "neighbours" else 20 if "neighbour" in old else 0.25


def read(config: Config, key: str):
    found = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_means_the_present_one_and_warns(old, new):
    with pytest.warns(FutureWarning, match=f"{old} is now called {new}; the next version refuses the old name"):
        config = parse_config(values_of(old, value_for(old)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config == parse_config(values_of(new, value_for(old)))
    assert config != parse_config(LEAST)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_beside_the_present_one_is_refused(old, new):
    values = values_of(old, value_for(old))
    section, _, name = new.rpartition(".")
    values = values | ({section: values[section] | {name: 0.5}} if section else {name: {"num": 3}})
    with pytest.raises(ConfigError, match=f"{old} is the old name of {new}, and both are given. Remove {old}"):
        parse_config(values)


def test_an_override_by_either_name_replaces_the_value_of_the_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("input: {path: data}\nrefine: {gamma: 0.3}\nneighbors: {num: 3}\n")
    with pytest.warns(FutureWarning):
        config = load_config(path, ["refine.clustering_weight=0.4", "neighbours.num=4"])
    assert (config.refine.clustering_weight, config.neighbors.num) == (0.4, 4)


def test_a_file_with_both_names_is_refused_with_its_path(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("input: {path: data}\nrefine: {gamma: 0.3, clustering_weight: 0.2}\n")
    with pytest.raises(
        ConfigError, match=r"job.yaml: refine.gamma is the old name of refine.clustering_weight, and bo"
    ):
        load_config(path)


def test_the_values_that_were_given_are_left_as_they_are():
    given = LEAST | {"head": {"alpha": 0.1}}
    with pytest.warns(FutureWarning):
        parse_config(given)
    assert given == LEAST | {"head": {"alpha": 0.1}}


def test_a_name_that_only_begins_like_an_old_one_is_not_replaced():
    values: dict = {}
    apply_override(values, "neighboursx.num=1")
    assert values == {"neighboursx": {"num": 1}}


def test_every_present_name_is_a_setting_and_no_old_one_is():
    for old, new in RENAMED.items():
        for key, known in ((old, False), (new, True)):
            section, _, name = key.rpartition(".")
            fields = fields_of(fields_of(Config)[section].annotation if section else Config)
            assert (name in fields) == known
