"""JSON schemas of the documents that a run writes; `python -m raydc.data.json_schema docs` writes them to docs/."""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from raydc.config.stages import StageName
from raydc.data import metrics, records

DOCUMENTS: dict[str, Any] = {
    "agreement": metrics.AgreementRecord,
    "level_statistics": dict[str, records.LevelRecord],
    "manifest": records.Manifest,
    "metrics": metrics.Metrics,
    "profile": records.ProfileRecord,
    "run": records.Header,
    "stage": records.StageMarker,
    "sweep": records.SweepRecord,
}
"""Type of each document, by the name of its schema."""


STAGE_METRICS: dict[StageName, Any] = {
    "profile": records.ProfileMetrics,
    "neighbors": metrics.NeighborsMetrics,
    "fit": metrics.FitMetrics,
    "merge": records.MergeMetrics,
    "assign": records.AssignMetrics,
    "evaluate": records.EvaluateMetrics,
    "report": records.ReportMetrics,
    "publish": records.PublishMetrics,
}
"""Type of what each stage returns, which its marker keeps under `metrics`."""


def schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a document of DOCUMENTS."""
    return schema_of(DOCUMENTS[name])


def schema_of(type_: Any) -> dict[str, Any]:
    """Return the JSON schema of a type of raydc.data.records."""
    body = TypeAdapter(type_).json_schema()
    for part in (body, *body.get("$defs", {}).values()):
        if "properties" in part:
            # A document has these keys and no others: a key that a stage adds must be written down here first.
            part["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | body


def text(name: str) -> str:
    """Return the schema of a document as the file in docs/ has it."""
    return json.dumps(schema(name), indent=1) + "\n"


def main(folder: str) -> None:
    """Write `<name>.schema.json` for every document."""
    for name in DOCUMENTS:
        (Path(folder) / f"{name}.schema.json").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
