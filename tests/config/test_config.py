"""Settings: every problem in one message, near names for unknown keys, and what a fingerprint covers."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydc.config import (
    Config,
    apply_override,
    difference,
    digest,
    dump,
    load_config,
    parse_config,
)
from raydc.config.presets import PRESETS
from raydc.core.training.settings import FitSettings
from raydc.errors import ConfigError

LEAST = {"input": {"path": "data"}}


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    return str(caught.value)


def test_a_path_is_all_that_a_config_needs():
    config = parse_config(LEAST)
    assert config.cluster.num_leaves == 1000
    assert config.levels == [10, 100]
    assert [c.name for c in config.input.embedding_columns] == ["embedding"]


def test_embedding_columns_may_be_plain_names():
    one = parse_config({"input": {"path": "data", "embedding_columns": "image"}})
    assert [(c.name, c.weight) for c in one.input.embedding_columns] == [("image", 1.0)]
    mixed = parse_config({"input": {"path": "data", "embedding_columns": ["image", {"name": "text", "weight": 0.5}]}})
    assert [(c.name, c.weight) for c in mixed.input.embedding_columns] == [("image", 1.0), ("text", 0.5)]


def test_levels_are_sorted_and_counted_once():
    assert parse_config(LEAST | {"merge": {"levels": [100, 10, 10]}}).levels == [10, 100]
    assert parse_config(LEAST | {"cluster": {"num_leaves": 10}}).levels == []


def test_an_unknown_key_is_refused_with_the_nearest_one():
    assert refusal(LEAST | {"cluster": {"num_leafs": 3}}) == (
        "cluster.num_leafs: unknown setting. Did you mean num_leaves?"
    )


def test_an_unknown_section_is_refused_with_the_nearest_one():
    assert "clusters: unknown setting. Did you mean cluster?" in refusal(LEAST | {"clusters": {}})


def test_an_unknown_key_like_no_other_lists_those_that_exist():
    text = refusal(LEAST | {"assign": {"zzz": 1}})
    assert (
        text
        == "assign.zzz: unknown setting. Known keys: block_rows, cpus_per_actor, num_actors, stall_seconds, use_gpu."
    )


def test_an_unknown_key_of_an_optional_section_is_compared_with_those_of_that_section():
    text = refusal(LEAST | {"publish": {"delta": {"urii": "x"}}})
    assert text == "publish.delta.urii: unknown setting. Did you mean uri?"


def test_a_section_that_is_no_mapping_is_refused_by_its_name():
    assert refusal(LEAST | {"cluster": 5, "merge": "ward"}).splitlines() == [
        "cluster=5: expected a mapping of settings, such as {key: value}.",
        "merge='ward': expected a mapping of settings, such as {key: value}.",
    ]


def test_an_unknown_key_in_a_list_of_columns_names_its_place():
    text = refusal({"input": {"path": "data", "embedding_columns": [{"name": "a", "wieght": 2}]}})
    assert text == "input.embedding_columns.0.wieght: unknown setting. Did you mean weight?"


def test_all_problems_are_in_one_message():
    text = refusal({"input": {}, "cluster": {"num_leaves": 1}, "pretrain": {"num_epoch": 3}, "seed": -1})
    assert text.splitlines() == [
        "input.path: required, but not set.",
        "seed=-1: Input should be greater than or equal to 0.",
        "pretrain.num_epoch: unknown setting. Did you mean num_epochs?",
        "cluster.num_leaves=1: Input should be greater than or equal to 2.",
    ]


def test_a_setting_of_several_types_is_named_without_them():
    assert set(refusal({"input": {"path": 5}}).splitlines()) == {
        "input.path=5: Input should be a valid string.",
        "input.path=5: Input should be a valid list.",
    }
    assert "refine.alpha=-1.0: Input should be greater than 0." in refusal(LEAST | {"refine": {"alpha": -1.0}})


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"embedding_columns": ["a", "a"]}, r"embedding_columns names a column twice: \['a', 'a'\]"),
        ({"embedding_columns": []}, "input.embedding_columns=.*at least 1 item"),
        ({"embedding_columns": [{"name": "a", "weight": 0}]}, "embedding_columns.0.weight=0: .*greater than 0"),
        ({"label_column": "id"}, "label_column='id' is already the id or an embedding column"),
        ({"label_column": "embedding"}, "label_column='embedding' is already the id or an embedding column"),
        ({"on_bad_rows": "drop"}, "on_bad_rows='drop': Input should be 'fail' or 'quarantine'"),
        ({"image_shape": [8]}, "image_shape=.*at least 2 items"),
    ],
)
def test_input_settings_that_cannot_work_are_refused(section, text):
    with pytest.raises(ConfigError, match=text):
        parse_config({"input": {"path": "data", **section}})


def test_levels_that_do_not_group_the_leaves_are_refused():
    with pytest.raises(ConfigError, match=r"merge.levels=\[10, 12\] must be below cluster.num_leaves=10"):
        parse_config(LEAST | {"cluster": {"num_leaves": 10}, "merge": {"levels": [5, 10, 12]}})


def test_linkage_metric_and_method_are_checked_together():
    with pytest.raises(ConfigError, match="merge.metric=cosine does not go with merge.linkage=ward"):
        parse_config(LEAST | {"merge": {"metric": "cosine"}})
    with pytest.raises(ConfigError, match="merge.linkage=single holds all distances and takes at most 20000 leaves"):
        parse_config(LEAST | {"cluster": {"num_leaves": 20_001}, "merge": {"linkage": "single"}})
    assert "merge.eps" in refusal(LEAST | {"merge": {"eps": -1}})
    assert "merge.method='centroid'" in refusal(LEAST | {"merge": {"method": "centroid"}})
    section = parse_config(LEAST | {"merge": {"linkage": "average", "metric": "pearson", "method": "certified"}}).merge
    assert (section.linkage, section.metric, section.method) == ("average", "pearson", "certified")


def test_a_kernel_target_that_means_no_signal_is_refused():
    two = LEAST | {"cluster": {"num_leaves": 2}}
    with pytest.raises(ConfigError, match=r"target_top_q=0.5 must be above 1 / cluster.num_leaves=0.5.*Set it to 0.75"):
        parse_config(two | {"refine": {"target_top_q": 0.5}})
    assert parse_config(two).refine.target_top_q == 0.75
    assert parse_config(LEAST | {"cluster": {"num_leaves": 3}}).refine.target_top_q == 0.5
    assert parse_config(two | {"fit": {"objective": "kmeans"}}).cluster.num_leaves == 2
    assert parse_config(two | {"refine": {"target_top_q": 0.9}}).refine.target_top_q == 0.9


def test_a_seed_beyond_63_bits_is_refused():
    assert parse_config(LEAST | {"seed": 2**63 - 1}).seed == 2**63 - 1
    with pytest.raises(ConfigError, match="seed=9223372036854775808: Input should be less than"):
        parse_config(LEAST | {"seed": 2**63})


def test_overrides_are_read_as_yaml_and_need_no_quotes():
    values: dict = {"merge": None}
    for override in (
        "merge.levels=[2, 5]",
        "input.path=s3://bucket/a=b",
        "seed=7",
        "fit.max_rows=null",
        "ray.num_cpus=2",
    ):
        apply_override(values, override)
    assert values["input"] == {"path": "s3://bucket/a=b"}
    assert values["merge"] == {"levels": [2, 5]}
    assert values["seed"] == 7
    assert values["fit"] == {"max_rows": None}


def test_an_override_that_is_not_yaml_is_taken_as_text():
    values: dict = {}
    apply_override(values, "input.path=[a")
    assert values == {"input": {"path": "[a"}}


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match="expected section.key=value"):
        apply_override({}, override)


def test_an_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="--set 'seed.x=1': seed is not a section"):
        apply_override({"seed": 3}, "seed.x=1")


def test_a_file_and_its_overrides_make_a_config(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("input: {path: data}\npretrain:\n  learning_rate: 1e-4\n")
    config = load_config(path, ["cluster.num_leaves=20", "input.path=other"])
    assert (config.input.path, config.cluster.num_leaves, config.pretrain.learning_rate) == ("other", 20, 1e-4)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"input: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- a\n- b\n", "expected a mapping of sections, found list"),
        (b"", "input: required, but not set"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, body, text):
    path = tmp_path / "job.yaml"
    path.write_bytes(body)
    with pytest.raises(ConfigError, match=text):
        load_config(path)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: No such file or directory. Give an existing YAML file"):
        load_config(tmp_path / "none.yaml")


def test_settings_never_change_after_the_check():
    config = parse_config(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        config.merge.linkage = "average"
    with pytest.raises(FrozenInstanceError):
        config.cluster.num_leaves = 3


def test_a_config_survives_its_json():
    config = parse_config(LEAST | {"merge": {"levels": [3]}, "fit": {"objective": "idec"}})
    assert parse_config(config.model_dump(mode="json")) == config


def test_the_number_of_workers_is_one_number_or_the_fewest_and_the_most():
    def fit(num_workers):
        return parse_config(LEAST | {"fit": {"num_workers": num_workers}}).fit

    assert (fit(3).fewest_workers, fit(3).most_workers) == (3, 3)
    elastic = fit([1, 4])
    assert (elastic.num_workers, elastic.fewest_workers, elastic.most_workers) == ((1, 4), 1, 4)
    assert parse_config(LEAST | {"fit": dump(elastic)}).fit == elastic
    for wrong in ([4, 1], [0, 2], [1, 2, 3], 0, "many"):
        with pytest.raises(ConfigError, match="num_workers"):
            fit(wrong)
    with pytest.raises(ConfigError, match=r"the fewest comes first, then the most. Set it to \[1, 4\]"):
        fit([4, 1])


def test_operational_settings_leave_every_fingerprint_alone():
    base = parse_config(LEAST)
    other = parse_config(
        LEAST
        | {
            "output": "elsewhere",
            "fit": {"num_workers": [2, 4], "resident_bytes": 0, "use_gpu": True},
            "assign": {"block_rows": 7},
            "ray": {"num_cpus": 3},
            "storage": {"region": "eu-west-1"},
        }
    )
    for stage in ("profile", "fit", "merge", "assign", "evaluate", "report", "publish"):
        assert base.fingerprint(stage) == other.fingerprint(stage)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"input": {"path": "data", "id_column": "key"}}, "profile"),
        ({"preprocess": {"method": "l2"}}, "profile"),
        ({"seed": 1}, "fit"),
        ({"autoencoder": {"latent_dim": 11}}, "fit"),
        ({"merge": {"levels": [7]}}, "merge"),
    ],
)
def test_a_setting_changes_its_stage_and_those_after_it(change, first):
    base, other = parse_config(LEAST), parse_config(LEAST | change)
    stages = ["profile", "fit", "merge", "assign", "evaluate", "report", "publish"]
    changed = [s for s in stages if base.fingerprint(s) != other.fingerprint(s)]
    assert changed == stages[stages.index(first) :]


def test_every_section_belongs_to_a_stage_or_is_operational():
    covered = set(parse_config(LEAST | {"fit": {"objective": "icon"}}).settings("publish"))
    assert set(Config.model_fields) - covered == {"output", "storage", "watch", "sweep", "lease", "ray"}


def test_the_difference_names_each_setting_with_both_values():
    old = {"a": {"b": 1, "c": [1, 2]}, "seed": 0}
    new = {"a": {"b": 2, "c": [1, 2]}, "seed": 0, "d": "x"}
    assert difference(old, new) == ["a.b was 1, is 2", "d was None, is 'x'"]
    assert difference(old, old) == []


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers()), max_size=5))
def test_a_digest_does_not_depend_on_the_order_of_keys(values):
    turned = dict(reversed(values.items()))
    assert digest(values) == digest(turned)
    assert len(digest(values)) == 16


# The core's settings.


def test_the_fit_takes_the_very_sections_of_the_config():
    config = parse_config(LEAST | {"seed": 3, "fit": {"objective": "temi"}, "evaluate": {"baseline_rows": 77}})
    found = config.fit_settings("input")
    for name in ("autoencoder", "pretrain", "cluster", "refine", "vade", "distill", "head"):
        assert getattr(found, name) is getattr(config, name)
    assert (found.objective, found.seed, found.baseline_rows) == ("temi", 3, 77)
    assert found.fingerprint == f"{config.fingerprint('fit')}-input"


def test_the_defaults_of_a_config_are_those_of_the_core():
    assert parse_config(LEAST).fit_settings("x") == FitSettings(
        fingerprint=parse_config(LEAST).fit_settings("x").fingerprint
    )


# Presets.


def test_a_preset_fills_in_what_is_not_given_and_nothing_else():
    given = {"refine": {"learning_rate": 0.5}, "pretrain": {"layer_epochs": 3}, "fit": {"preset": "paper"}}
    config = parse_config(LEAST | given)
    assert (config.refine.learning_rate, config.pretrain.layer_epochs) == (0.5, 3)
    assert (config.refine.optimizer, config.refine.alpha, config.refine.scale) == ("sgd", 1.0, 1.0)
    assert config.pretrain.layerwise and config.preprocess.method == "scale"
    plain = parse_config(LEAST)
    assert (plain.refine.optimizer, plain.pretrain.layerwise) == ("adam", False)


@pytest.mark.parametrize(("objective", "name"), [(o, n) for o, table in PRESETS.items() for n in table])
def test_every_preset_is_made_of_valid_settings(objective, name):
    config = parse_config(LEAST | {"fit": {"objective": objective, "preset": name}})
    for section, values in PRESETS[objective][name].items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value
    # What a run writes down is read back as the same settings.
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_preset_that_an_objective_does_not_have_is_refused():
    text = refusal(LEAST | {"fit": {"objective": "kmeans", "preset": "paper"}})
    assert text == "fit.preset=paper: fit.objective=kmeans has no such preset, only: none."
    assert "fit.preset='best': Input should be 'paper' or 'scale'" in refusal(LEAST | {"fit": {"preset": "best"}})


def test_sizes_must_be_as_many_as_leaves():
    few = LEAST | {"cluster": {"num_leaves": 3}, "merge": {"levels": []}, "refine": {"size_prior": [2.0, 1.0]}}
    assert "refine.size_prior has 2 numbers for cluster.num_leaves=3; give one for each leaf" in refusal(few)
    assert "refine.size_prior" in refusal(LEAST | {"refine": {"size_prior": "large"}})


def test_directions_are_refused_where_there_is_no_code():
    with pytest.raises(
        ConfigError, match=r"cluster.space=directions is of codes, and fit.objective=kmeans learns none"
    ):
        parse_config({"input": {"path": "x"}, "fit": {"objective": "kmeans"}, "cluster": {"space": "directions"}})
    parse_config({"input": {"path": "x"}, "fit": {"objective": "idec"}, "cluster": {"space": "directions"}})
