"""`--set`: a text setting takes the text as it is."""

import pytest

from raydc.config import apply_override, load_config, parse_config
from raydc.errors import ConfigError


def after(*overrides: str) -> dict:
    values: dict = {}
    for override in overrides:
        apply_override(values, override)
    return values


@pytest.mark.parametrize(
    "text",
    ["/x/set #2", "on", "off", "null", "2024", "2024-01-01", "a: b", "1e3", "- a", "", "&x", "%TAG", "[a", "*.pq"],
)
def test_a_text_setting_takes_the_text_as_it_is(text):
    values = after(f"input.path={text}", f"output={text}")
    assert values == {"input": {"path": text}, "output": text}


def test_a_setting_that_may_be_unset_is_unset_by_null():
    assert after("input.label_column=null") == {"input": {"label_column": None}}
    assert after("input.label_column=2024") == {"input": {"label_column": "2024"}}
    assert after("input.label_column='null'") == {"input": {"label_column": "null"}}


def test_a_list_of_texts_holds_texts():
    assert after("input.path=[/a, '/b #2', 2024]") == {"input": {"path": ["/a", "/b #2", "2024"]}}
    assert after("input.carry_columns=[on, 2024, null]") == {"input": {"carry_columns": ["on", "2024", "null"]}}
    assert after("input.embedding_columns=2024") == {"input": {"embedding_columns": "2024"}}
    with pytest.raises(ConfigError, match=r"--set input.carry_columns=\[a: not valid YAML \(.*\). Put quotes around"):
        after("input.carry_columns=[a")


def test_other_settings_are_read_as_yaml():
    values = after("seed=3", "fit.use_gpu=on", "refine.scale=2.5", "refine.scale=auto", "merge.levels=[2, 3]")
    assert values == {"seed": 3, "fit": {"use_gpu": True}, "refine": {"scale": "auto"}, "merge": {"levels": [2, 3]}}
    assert after("refine.scale=2.5", "refine.size_prior=[0.5, 0.5]") == {
        "refine": {"scale": 2.5, "size_prior": [0.5, 0.5]}
    }
    assert after("publish.iceberg.properties.uri=http://x/#y: z") == {
        "publish": {"iceberg": {"properties": {"uri": "http://x/#y: z"}}}
    }


def test_messages_of_wrong_settings_stay_short(tmp_path):
    with pytest.raises(ConfigError) as caught:
        parse_config({"input": {"path": "x"}, "cluster": {"num_leaves": "x" * 20_000}})
    assert len(str(caught.value)) < 400
    path = tmp_path / "a.yaml"
    path.write_text("input: {path: [" + "a, " * 5000 + "\noutput: x\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: .* in line \d+, column \d+$") as caught:
        load_config(path)
    assert len(str(caught.value)) < 400
