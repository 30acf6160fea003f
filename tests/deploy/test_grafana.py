"""The dashboard names exactly the gauges that a run sets, and each place that sets one uses a name that is there."""

import ast
import json
import re
from pathlib import Path

import raydc
from raydc.config.stages import STAGE_NAMES
from raydc.runtime.gauges import GAUGES

ROOT = Path(raydc.__file__).parents[1]
BOARD = json.loads((ROOT / "deploy/grafana.json").read_text())


def test_every_gauge_is_shown_and_every_name_shown_is_a_gauge():
    shown = re.findall(r"\bray_(raydc_\w+)", json.dumps([panel["targets"] for panel in BOARD["panels"]]))
    assert sorted(shown) == sorted(GAUGES)
    asked = re.findall(r"\bray_(raydc_\w+)", json.dumps(BOARD["templating"]))
    assert set(asked) <= set(GAUGES)


def test_the_code_sets_every_gauge_and_no_other():
    used: set[str] = set()
    for path in (ROOT / "raydc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "gauges.py" and not (isinstance(node, ast.keyword) and node.arg == "raydc_stage"):
                continue
            name = node.arg if isinstance(node, ast.keyword) else node.value if isinstance(node, ast.Constant) else None
            if isinstance(name, str) and re.fullmatch(r"raydc_[a-z_]+", name):
                used.add(name)
    assert used == set(GAUGES)


def test_the_stages_have_their_names_on_the_board():
    (mapping,) = BOARD["panels"][0]["fieldConfig"]["defaults"]["mappings"]
    assert [mapping["options"][str(n)]["text"] for n in range(1, len(STAGE_NAMES) + 1)] == list(STAGE_NAMES)


def test_the_page_explains_every_gauge():
    page = (ROOT / "docs/operations.md").read_text()
    assert [name for name in GAUGES if f"`{name}`" not in page] == []


def test_the_panels_do_not_overlap():
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in BOARD["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in BOARD["panels"]})
