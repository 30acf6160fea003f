"""The files of a run: named in one place, written and read back as the same values, all of them told to a new start."""

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import raydc
from raydc import pipeline
from raydc.config.stages import SECTIONS_OF_STAGE, STAGE_NAMES
from raydc.core.metrics.partition_stats import Tally
from raydc.data.json_schema import STAGE_METRICS
from raydc.data.slices import Slice
from raydc.data.statistics import Statistics
from raydc.runfolder import artifacts
from raydc.runfolder.artifacts import Artifact, Leaves
from raydc.runfolder.folder import RunDir
from raydc.runfolder.formats import BytesFile, Folder, JsonFile, Place, TableFile
from raydc.runtime.remedies import LESS_MEMORY
from raydc.storage.lake import Lake
from tests import shards

ROOT = Path(raydc.__file__).parent
NAMED = {name: value for name, value in vars(artifacts).items() if isinstance(value, Artifact)}
# The list itself, and the saved model's and the checkpoint's own files, which also stand outside of a run.
OWN_NAMES = {"runfolder/artifacts.py", "model.py", "core/training/checkpoint.py", "core/training/sweep.py"}


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(Lake(), str(tmp_path), "r1")


def literals(path: Path) -> set[str]:
    """Return the texts of a file."""
    constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def literal_places(path: Path) -> list[int]:
    """Return the lines on which a name is written into a call of `uri`."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    named = [n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr == "uri"]
    return [n.lineno for n in named if any(isinstance(argument, ast.Constant | ast.JoinedStr) for argument in n.args)]


def test_the_names_of_files_stand_in_one_place():
    names = {a.path for a in NAMED.values() if "." in a.path or "/" in a.path}
    names |= {path.rpartition("/")[2] for path in names if "." in path}
    assert len(names) > 25
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).as_posix() not in OWN_NAMES:
            assert not literals(path) & names, path
            assert not literal_places(path), path


def test_no_two_artifacts_share_a_path():
    paths = [a.path for a in NAMED.values()]
    assert len(set(paths)) == len(paths)


def test_the_lists_of_stages_are_one():
    assert tuple(stage.name for stage in pipeline.STAGES) == STAGE_NAMES
    assert tuple(SECTIONS_OF_STAGE) == tuple(artifacts.WRITES) == STAGE_NAMES
    assert tuple(STAGE_METRICS) == STAGE_NAMES
    assert set(LESS_MEMORY) < set(STAGE_NAMES)


def test_every_file_of_a_run_is_written_by_one_stage_or_by_the_run_itself():
    own = {artifacts.RUN, artifacts.STAGES, artifacts.LEASE, artifacts.ATTEMPTS}
    others = {artifacts.SWEEP, artifacts.SWEEP_PAGE, artifacts.SWEEP_FIGURE}
    others |= {artifacts.COMPARISON, artifacts.COMPARISON_PAGE, artifacts.LABELED_FROM}
    for artifact in set(NAMED.values()) - own - others:
        writers = [
            stage
            for stage, written in artifacts.WRITES.items()
            if any(artifact.path == w.path or artifact.path.startswith(f"{w.path}/") for w in written)
        ]
        assert len(writers) == 1, artifact


def test_a_new_start_of_assign_removes_the_sum_of_its_statistics():
    (assign,) = [stage for stage in pipeline.STAGES if stage.name == "assign"]
    assert "statistics.npz" in assign.writes


def test_leaves_come_back_as_they_were_written(run):
    leaves = Leaves(np.array([1.0, 3.0]), np.array([[0.0, 0.0], [4.0, 8.0]]), np.array([0.5, 0.25]))
    artifacts.LEAVES.write(run, leaves)
    back = artifacts.LEAVES.read(run)
    for name in ("weights_K", "means_KL", "sse_K"):
        np.testing.assert_array_equal(getattr(back, name), getattr(leaves, name))
    assert back.group_centers(np.array([0, 0], np.int32)).tolist() == [[3.0, 6.0]]
    assert back.taken(np.array([1])).sse_K.tolist() == [0.25]


def test_the_levels_come_back_coarsest_first(run):
    groups = {4: np.array([0, 1, 2, 3], np.int32), 2: np.array([0, 0, 1, 1], np.int32)}
    artifacts.LEVELS.write(run, 4, groups)
    back = artifacts.LEVELS.read(run)
    assert list(back) == [2, 4]
    assert {k: g.tolist() for k, g in back.items()} == {k: g.tolist() for k, g in groups.items()}


def test_the_linkage_comes_back(run):
    linkage = np.array([[0.0, 1.0, 2.5, 2.0]])
    artifacts.LINKAGE.write(run, linkage)
    np.testing.assert_array_equal(artifacts.LINKAGE.read(run), linkage)


def test_a_table_is_read_whole_or_by_columns_and_is_none_where_there_is_none(run):
    file = TableFile("some.parquet")
    assert file.read_if_there(run) is None
    file.write(run, pa.table({"a": [1, 2], "b": ["x", "y"]}))
    assert file.read(run, ["b"]).to_pydict() == {"b": ["x", "y"]}
    whole = file.read_if_there(run)
    assert whole is not None and whole.column_names == ["a", "b"]


def test_a_document_is_created_once(run):
    file = JsonFile[dict]("some.json")
    assert file.read_if_there(run) is None
    assert file.create(run, {"by": "one"})
    assert not file.create(run, {"by": "another"})
    assert file.read(run) == {"by": "one"}
    file.write(run, {"by": "another"})
    assert file.read_if_there(run) == {"by": "another"}


def test_the_sum_of_the_statistics_holds_counts_and_no_rows(run):
    total = Statistics(
        rows=3, labels=2, rejects=1, tallies={"leaf": Tally(num_groups=2)}, exemplars=pa.table({"leaf": [0]})
    )
    artifacts.STATISTICS.write(run, total)
    back = artifacts.STATISTICS.read(run, 2)
    assert (back.rows, back.labels, back.rejects, list(back.tallies)) == (3, 2, 1, ["leaf"])
    assert back.exemplars is None and total.exemplars is not None


def test_the_neighbors_of_a_slice_come_back_with_what_the_search_says_of_itself(run):
    part = Slice(
        index=0,
        name="day=1/part-0.parquet",
        uri="in/part-0.parquet",
        row_groups=(0,),
        first_row=0,
        first_key=0,
        num_rows=3,
        num_bytes=10,
    )
    keys, neighbors = np.array([0, 2]), np.array([[2, 1], [0, 1]])
    artifacts.NEIGHBORS.write(run, part, keys, neighbors, np.ones((2, 2), np.float32), {"exact": True})
    back = artifacts.NEIGHBORS.read(run, part)
    np.testing.assert_array_equal(back[0], keys)
    np.testing.assert_array_equal(back[1], neighbors)
    assert artifacts.NEIGHBORS.read_facts(run, part) == (2, {"exact": True})


def test_a_model_is_there_once_its_head_is(run):
    saved = artifacts.baseline("raw_kmeans")
    assert not saved.exists(run)
    saved.save(run, shards.corner_model())
    assert saved.exists(run)
    assert torch.equal(saved.load(run).centers_KL, shards.corner_model().centers_KL)


def test_the_weights_of_a_network_come_back(run):
    assert artifacts.FIT_DECODER.read_if_there(run) is None
    network = torch.nn.Linear(2, 3)
    artifacts.FIT_DECODER.write(run, network.state_dict())
    back = artifacts.FIT_DECODER.read_if_there(run)
    assert back is not None and torch.equal(back["weight"], network.weight)


def test_a_slice_has_a_file_of_its_name_in_each_folder():
    part = Slice(
        index=0,
        name="day=1/part-0.parquet",
        uri="in/part-0.parquet",
        row_groups=(0,),
        first_row=0,
        first_key=0,
        num_rows=3,
        num_bytes=10,
    )
    assert artifacts.LABELS.of(part).path == "labels/day=1/part-0.parquet"
    assert artifacts.SLICES.of(part).path == "slices/day=1/part-0.npz"


def test_a_folder_holds_what_lies_below_it():
    assert Folder("labels").holds("labels/part-0.parquet")
    assert not Folder("labels").holds("labels.json")


def test_a_file_is_removed_with_all_that_is_in_it_and_removing_nothing_is_no_error(tmp_path):
    place = Place(Lake(), str(tmp_path))
    BytesFile("a/b.bin").write(place, b"1")
    for _ in range(2):
        Folder("a").remove(place)
        assert not Folder("a").exists(place)
