"""The report stage on small run folders, made by hand: what is on the page, and what it survives."""

import html.parser
import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.cluster.hierarchy import linkage

from raydc.config import parse_config
from raydc.core.tree import order
from raydc.core.tree.levels import levels as cut_levels
from raydc.errors import StageError
from raydc.report import page
from raydc.runfolder.folder import RunDir
from raydc.stages import report
from raydc.storage.lake import Lake

SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(2)>'


def lists(rows):
    """Return an (N, D) array as a list column."""
    rows = np.asarray(rows, dtype=np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def make_run(
    folder, *, num_leaves=6, levels=(2, 3), labeled=True, baselines=True, images=False, map_rows=20, objective="dec",
    label=lambda leaf: f"kind {leaf % 4}", **changes,
):  # fmt: skip
    """Write the folder of a run with two dimensional leaves and return its config and RunDir."""
    rng = np.random.default_rng(0)
    settings = {
        "input": {"path": "rows", **({"image_shape": [4, 4]} if images else {"carry_columns": ["caption"]})},
        "cluster": {"num_leaves": num_leaves},
        "merge": {"levels": list(levels)},
        "fit": {"objective": objective},
        "refine": {"target_top_q": 0.6},
    }
    config = parse_config(settings)
    run = RunDir(Lake(), str(folder), changes.get("run_id", "r1"))
    run.lake.write_json(
        run.uri("run.json"),
        {"started": "2024-05-01T12:00:00Z", "seed": 0, "commit": "0123456789abcdef", "versions": {"python": "3.11"},
         "config": config.model_dump(mode="json")},
    )  # fmt: skip
    centers = rng.normal(size=(num_leaves, 3))
    merges = linkage(centers, "ward")
    merges = order.relabel(merges, order.leaf_order(merges))
    rows = 5 + np.arange(num_leaves) * 7 % 20
    groups = cut_levels(merges, list(levels), rows)
    columns = {f"level_{k}": groups[k] for k in groups}
    write_tree(run, merges, columns)
    names = [label(leaf) for leaf in range(num_leaves)]
    write(run, "leaves.parquet", {
        "leaf": np.arange(num_leaves, dtype=np.int32), "rows": rows, "mean_distance": np.full(num_leaves, 1.25),
        "silhouette": np.full(num_leaves, 0.5), "majority_label": pa.array(names if labeled else [None] * num_leaves),
        "majority_share": pa.array([0.75 if labeled else None] * num_leaves, pa.float64()), **columns,
    })  # fmt: skip
    leaf = np.repeat(np.arange(num_leaves, dtype=np.int32), 3)
    exemplars = {
        "leaf": leaf, "rank": np.tile(np.arange(3), num_leaves),
        "id": pa.array([changes.get("id", f"row-{i}") for i in range(len(leaf))]),
        "distance": np.linspace(0, 1, len(leaf), dtype=np.float32),
    }  # fmt: skip
    if labeled:
        exemplars["label"] = pa.array([names[i] for i in leaf])
    if images:
        exemplars["embedding"] = lists(rng.uniform(size=(len(leaf), 16)))
    else:
        exemplars[changes.get("carry", "caption")] = pa.array([changes.get("caption", "a caption")] * len(leaf))
    write(run, "exemplars.parquet", exemplars)
    at = rng.integers(0, num_leaves, map_rows)
    before = centers[at] + rng.normal(size=(map_rows, 3)) * 0.3
    write(run, "map_rows.parquet", {
        "id": np.arange(map_rows), "leaf": at.astype(np.int32),
        "label": pa.array([names[i] if labeled else None for i in at], pa.string()),
        "before": lists(before), "after": lists(before if objective == "kmeans" else 2 * before + 1),
    })  # fmt: skip
    run.lake.write_json(run.uri("metrics.json"), metrics(rows, list(groups), labeled, baselines, objective))
    for stage, seconds in (("profile", 1.0), ("fit", 75.0)):
        run.mark_done(stage, {}, seconds, {})
    return config, run


def metrics(rows, levels, labeled, baselines, objective):
    """Return a metrics.json."""
    quality = {"acc": 0.91, "nmi": 0.87654, "ami": 0.86, "ari": 0.8, "purity": 0.92}
    raw = {"rows": int(rows.sum()), "silhouette": 0.2, **({"acc": 0.7, "nmi": 0.65432} if labeled else {})}
    inside = {"silhouette": 0.4, "davies_bouldin": None, "size_cv": 0.1, "size_max_over_mean": 1.5, "num_empty": 0}
    history = [{"phase": "pretrain", "epoch": e, "loss": 1 / (e + 1)} for e in range(4)]
    history.append({"phase": "kmeans", "epoch": 0, "inertia": 123.4, "iterations": 3, "alpha": 1.0, "scale": 2.0})
    history += [{"phase": "refine", "epoch": e, "loss": 0.5, "changed": 0.1 / 10**e, "top_q": 0.5} for e in range(3)]
    return {
        "rows": {"input": int(rows.sum()) + 3, "labels": int(rows.sum()), "rejects": 3},
        **({"quality": {"leaf": quality, "levels": {str(k): quality for k in levels}, "dendrogram_purity": 0.777}}
           if labeled else {}),
        "internal": {"leaf": inside, "levels": {str(k): inside for k in levels}},
        "baselines": {"raw_kmeans": raw} if baselines else {},
        "stages": {"profile": {"seconds": 1.0}, "assign": {"seconds": 2.0}},
        "fit": {"objective": objective, "num_workers": 2, "device": "cpu", "precision": "float32",
                "rows_per_second": 1234.5, "history": [] if objective == "kmeans" else history},
        "warnings": [],
    }  # fmt: skip


def write_tree(run, merges, columns):
    """Write the folder tree/."""
    buffer = io.BytesIO()
    np.save(buffer, merges)
    run.lake.write_bytes(run.uri("tree", "linkage.npy"), buffer.getvalue())
    write(run, "tree/levels.parquet", {"leaf": np.arange(len(merges) + 1, dtype=np.int32), **columns})


def write(run, name, columns):
    """Write a Parquet file of the run."""
    with run.lake.staged(run.uri(name)) as path:
        pq.write_table(pa.table(columns), path)


def edit(run, **changes):
    """Replace parts of the run's metrics.json."""
    run.lake.write_json(run.uri("metrics.json"), run.lake.read_json(run.uri("metrics.json")) | changes)


class Checker(html.parser.HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        """Note an element."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        """Note a text."""
        self.texts.append(data)

    @property
    def text(self):
        """Return all text with single spaces."""
        return " ".join(" ".join(self.texts).split())


def page_of(config, run):
    """Run the stage and return its page, parsed."""
    report.run(config, run)
    checker = Checker()
    checker.feed(run.lake.read_bytes(run.uri("report", "index.html")).decode())
    checker.close()
    return checker


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Return the RunDir and the page of a run whose rows are images."""
    config, run = make_run(tmp_path_factory.mktemp("pictured"), images=True)
    return run, page_of(config, run)


def test_the_page_holds_the_numbers_of_the_run(pictured):
    text = pictured[1].text
    assert "is better than k-means on the raw rows: NMI 0.877 against 0.654, ACC 0.910 against 0.700." in text
    assert "75 rows in 6 leaves, which the tree groups into 2 and 3." in text
    assert "78 rows read = 75 labeled + 3 rejected" in text
    assert "fit 1 min 15 s" in text and "total 1 min 18 s" in text
    assert "Dendrogram purity 0.777" in text
    assert "2 workers on cpu in float32, 1,234 rows a second." in text
    assert "k-means start: inertia 123.4 after 3 iterations." in text
    assert "Level 3 3 75 0.910" in text
    assert "Leaf 5 20 rows mostly kind 1 (75 %)" in text
    assert "seed 0, started 2024-05-01T12:00:00Z, commit 0123456789ab" in text
    assert "num_leaves: 6" in text


def test_figures_are_written_beside_the_page_and_counted(tmp_path):
    config, run = make_run(tmp_path)
    found = report.run(config, run)
    names = ["changed", "confidence", "dendrogram", "leaf_sizes", "map", "pretrain_loss", "refine_loss"]
    stored = {f.uri.rsplit("/", 1)[1]: f.size for f in run.lake.find(run.uri("report"))}
    assert sorted(stored) == sorted([*(f"{name}.png" for name in names), "index.html"])
    assert found == {"figures": 7, "bytes": stored["index.html"], "leaves_shown": 6}


def test_the_page_needs_nothing_from_outside(pictured):
    run, found = pictured
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    loading = [value for _, name, value in found.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loading and all(value.startswith(("#", "data:image/png;base64,")) for value in loading)
    body = run.lake.read_bytes(run.uri("report", "index.html")).decode()
    assert "http://" not in body and "https://" not in body and "@import" not in body
    assert re.findall(r"url\(([^#])", body) == []
    policy = [value for tag, _, value in found.attributes if tag == "meta"]
    assert any("default-src 'none'" in value for value in policy)


@pytest.mark.parametrize(
    "payload", [SCRIPT + "$\\frac{", IMAGE + "{{ 7 * 7 }}", "' onload=</title></style></svg>" + SCRIPT]
)
def test_text_from_the_data_is_shown_and_never_obeyed(tmp_path, payload):
    config, run = make_run(
        tmp_path, id=payload, caption=payload, carry=payload, label=lambda leaf: payload + str(leaf), run_id="r1"
    )
    edit(run, warnings=[payload], fit={"objective": payload, "device": payload, "num_workers": 1, "history": []})
    header = run.lake.read_json(run.uri("run.json"))
    header["config"]["input"]["path"] = header["versions"]["python"] = payload
    run.lake.write_json(run.uri("run.json"), header | {"commit": payload, "started": payload})
    found = page_of(config, run)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    # Id, carried column and its name, label, warning, setting, version.
    assert found.text.count(payload) > 6


def test_labels_in_pictures_titles_are_escaped(tmp_path):
    config, run = make_run(tmp_path, images=True, id=IMAGE, label=lambda leaf: IMAGE)
    found = page_of(config, run)
    assert {v[:22] for t, n, v in found.attributes if (t, n) == ("img", "src")} == {"data:image/png;base64,"}
    assert any(tag == "li" and name == "title" and IMAGE in value for tag, name, value in found.attributes)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


def test_rows_that_are_images_are_drawn_one_picture_per_leaf(pictured):
    found = pictured[1]
    assert found.tags.count("img") == 6
    alternatives = [value for tag, name, value in found.attributes if (tag, name) == ("img", "alt")]
    assert alternatives[0] == "The 3 rows nearest to the center of leaf 0"


def test_without_labels_and_neighbors_the_page_says_that_nothing_can_be_said(tmp_path):
    text = page_of(*make_run(tmp_path, labeled=False)).text
    assert "Nothing says whether the learned space is better" in text
    assert "By label" not in text and "mostly" not in text and "ACC" not in text and "Dendrogram purity" not in text


def test_without_baselines_the_page_says_so(tmp_path):
    text = page_of(*make_run(tmp_path, baselines=False)).text
    assert "k-means on the raw rows was not measured" in text


def test_a_space_that_was_not_refined_is_drawn_once(tmp_path):
    config, run = make_run(tmp_path, objective="kmeans")
    text = page_of(config, run).text
    assert "The space was not refined, so there is one map instead of two." in text
    assert "after refinement" not in text
    assert "No space was learned" in text


@pytest.mark.parametrize(("num_leaves", "levels"), [(2, ()), (6, (3,)), (40, (2, 12))])
def test_any_number_of_levels_is_shown(tmp_path, num_leaves, levels):
    text = page_of(*make_run(tmp_path, num_leaves=num_leaves, levels=levels)).text
    assert f"in {num_leaves} leaves" in text
    assert ("without coarser levels" in text) == (not levels)
    assert text.count("of level") == (levels[0] if levels else 0)


def test_a_tree_of_one_leaf_has_no_drawing(tmp_path):
    config, run = make_run(tmp_path, num_leaves=2, levels=())
    write_tree(run, np.zeros((0, 4)), {})
    leaves = pq.read_table(run.uri("leaves.parquet")).slice(0, 1)
    write(run, "leaves.parquet", {name: leaves[name] for name in leaves.column_names})
    write(run, "map_rows.parquet", {"leaf": np.zeros(0, np.int32), "before": lists([[0.0]]).slice(1),
                                    "after": lists([[0.0]]).slice(1)})  # fmt: skip
    text = page_of(config, run).text
    assert "There is one leaf, so there is no tree." in text
    assert "so there is no map" in text


def test_fifteen_hundred_leaves_make_a_page_of_the_largest_two_hundred(tmp_path):
    config, run = make_run(tmp_path, num_leaves=1500, levels=(10, 100), images=True, map_rows=100)
    found = page_of(config, run)
    assert found.tags.count("img") == 200
    assert "The 200 largest leaves are shown; 1,300 smaller ones are left out to keep this page light" in found.text
    assert run.lake.size(run.uri("report", "index.html")) < 3_000_000


def test_missing_exemplars_and_map_leave_the_rest_of_the_page(tmp_path):
    config, run = make_run(tmp_path)
    run.lake.remove(run.uri("exemplars.parquet"))
    run.lake.remove(run.uri("map_rows.parquet"))
    text = page_of(config, run).text
    assert "so there is no map" in text
    assert "Leaf 5 20 rows" in text


def test_rows_with_codes_that_are_not_finite_are_left_out_of_the_map(tmp_path):
    config, run = make_run(tmp_path)
    rows = pq.read_table(run.uri("map_rows.parquet"))
    after = page.matrix(rows["after"]).copy()
    after[3] = np.nan
    columns = {name: rows[name] for name in rows.column_names} | {"after": lists(after)}
    write(run, "map_rows.parquet", columns)
    assert "t-SNE of a sample of 19 rows." in page_of(config, run).text


def test_rows_that_do_not_add_up_are_said_at_the_top(tmp_path):
    config, run = make_run(tmp_path)
    edit(run, rows={"input": 80, "labels": 75, "rejects": 3}, warnings=["look here"])
    text = page_of(config, run).text
    assert "Rows are missing: 80 were read, but 75 were labeled and 3 rejected." in text
    assert "this does not add up" in text and "look here" in text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    config, run = make_run(tmp_path)
    report.run(config, run)
    first = {f.uri: run.lake.read_bytes(f.uri) for f in run.lake.find(run.uri("report"))}
    # As in a second attempt: this stage's own marker is there by then.
    run.mark_done("report", {}, 12.0, {})
    report.run(config, run)
    assert {f.uri: run.lake.read_bytes(f.uri) for f in run.lake.find(run.uri("report"))} == first


def test_a_run_that_was_not_evaluated_is_refused_with_the_files_that_are_missing(tmp_path):
    config, run = make_run(tmp_path)
    run.lake.remove(run.uri("metrics.json"))
    run.lake.remove(run.uri("leaves.parquet"))
    with pytest.raises(StageError, match="report: run 'r1' has no metrics.json, leaves.parquet. Delete the markers"):
        report.run(config, run)
