"""The JSON schemas in docs/: made from the types of the documents, and strict about keys."""

import dataclasses
from pathlib import Path

import jsonschema
import pytest

from raydc.core.metrics.choose_k import Recommendation, Vote
from raydc.core.metrics.verdict import Criterion
from raydc.core.tree.levels import LevelStatistics
from raydc.data import json_schema, metrics, records
from raydc.data.slices import Column, InputSpec, Slice

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", json_schema.DOCUMENTS)
def test_the_schemas_in_docs_are_those_of_the_types(name):
    written = (DOCS / f"{name}.schema.json").read_text(encoding="utf-8")
    assert written == json_schema.text(name), "run `python -m raydc.data.json_schema docs`"


def test_every_schema_in_docs_has_its_type():
    assert {p.name.removesuffix(".schema.json") for p in DOCS.glob("*.schema.json")} == set(json_schema.DOCUMENTS)


@pytest.mark.parametrize("name", json_schema.DOCUMENTS)
def test_the_schemas_are_valid_ones(name):
    jsonschema.Draft202012Validator.check_schema(json_schema.schema(name))


@pytest.mark.parametrize(
    ("record", "made_from"),
    [
        (records.SpecRecord, InputSpec),
        (records.ColumnRecord, Column),
        (records.SliceRecord, Slice),
        (records.LevelRecord, LevelStatistics),
        (records.RecommendationRecord, Recommendation),
        (records.VoteRecord, Vote),
        (metrics.CriterionRecord, Criterion),
    ],
)
def test_a_record_that_is_made_from_a_dataclass_has_its_fields(record, made_from):
    assert set(record.__annotations__) == {field.name for field in dataclasses.fields(made_from)}


def test_a_key_that_no_type_has_is_refused():
    rows = {"input": 2, "labels": 1, "rejects": 1}
    manifest = {"format_version": 1, "run_id": "r", "finished": "", "input_fingerprint": "", "files": [], "tables": []}
    jsonschema.validate(manifest | {"rows": rows}, json_schema.schema("manifest"))
    with pytest.raises(jsonschema.ValidationError, match="'lost' was unexpected"):
        jsonschema.validate(manifest | {"rows": rows | {"lost": 0}}, json_schema.schema("manifest"))


def test_the_schemas_are_written_into_a_folder(tmp_path):
    json_schema.main(str(tmp_path))
    assert len(list(tmp_path.glob("*.schema.json"))) == len(json_schema.DOCUMENTS)
