"""Folders from a stranger: whatever they hold, it runs no code, takes no memory, and ends in a clear error."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from raydc.core.metrics.contingency import Contingency
from raydc.core.metrics.partition_stats import Tally
from raydc.core.training import checkpoint
from raydc.core.tree.cells import CellMerges
from raydc.data.statistics import Statistics
from raydc.errors import DataError
from raydc.model import Model
from raydc.runfolder import artifacts, merge_cells
from raydc.runfolder.artifacts import Leaves
from raydc.runfolder.formats import Place
from raydc.storage.lake import Lake
from tests import shards


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def npy(value, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def header_of(shape: tuple) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def crafted_arrays(trap) -> dict[str, bytes]:
    objects = np.array([Trap(trap)], object)
    return {
        "pickle": pickle.dumps(Trap(trap)),
        "objects": npy(objects, allow_pickle=True),
        "huge": header_of((2**50,)),
        "negative": header_of((-5,)),
        "beyond": header_of((2**70,)),
        "code in the header": b"\x93NUMPY\x01\x00"
        + struct.pack("<H", 40)
        + b"__import__('os').system('true')".ljust(40),
        "cut": npy(np.zeros(100))[:-40],
        "empty": b"",
    }


@pytest.mark.parametrize("how", crafted_arrays("x"))
def test_a_crafted_array_is_refused_and_runs_no_code(tmp_path, how):
    (tmp_path / "linkage.npy").write_bytes(crafted_arrays(tmp_path / "sprung")[how])
    with pytest.raises(DataError, match="linkage.npy: not a whole array of numbers .*Restore the file"):
        Lake().read_array(str(tmp_path / "linkage.npy"))
    assert not (tmp_path / "sprung").exists()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name, body in members.items():
            out.writestr(name, body)
    return buffer.getvalue()


@pytest.mark.parametrize("how", [*crafted_arrays("x"), "no archive", "a name that leads out", "half"])
def test_crafted_statistics_are_refused_and_run_no_code(tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = Statistics(rows=3, labels=2, rejects=1).to_bytes()
    assert Statistics.from_bytes(good).rows == 3
    if how == "no archive":
        body = pickle.dumps(Trap(tmp_path / "sprung"))
    elif how == "half":
        body = good[: len(good) // 2]
    elif how == "a name that leads out":
        body = zipped({"../../escaped.npy": npy(np.zeros(3)), "/tmp/escaped.npy": npy(np.zeros(3))})
    else:
        body = zipped({"counts.npy": crafted_arrays(tmp_path / "sprung")[how], "tallies.npy": npy(np.array(["leaf"]))})
    with pytest.raises(DataError, match="statistics of the labels: damaged"):
        Statistics.from_bytes(body, 4)
    assert list(tmp_path.parent.glob("escaped*")) == [] and list(tmp_path.iterdir()) == []


def peak_bytes(call) -> int:
    """Return the most memory that Python and numpy took while `call` ran into a DataError."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="damaged"):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def statistics_of(num_groups: int, **changes: np.ndarray) -> bytes:
    arrays = {f"leaf.{name}": np.zeros(num_groups) for name in ("distance", "squared", "silhouette")}
    arrays |= {"leaf.rows": np.zeros(num_groups, np.int64), "leaf.classes": np.array(["a"])}
    arrays |= {"leaf.class_pairs": np.zeros(1, np.int64), "leaf.class_rows": np.ones(1, np.int64)}
    arrays |= {"counts": np.array([3, 2, 1]), "tallies": np.array(["leaf"])}
    return zipped({f"{name}.npy": npy(array) for name, array in (arrays | changes).items()})


def test_a_small_file_that_claims_a_lot_is_refused_before_memory_is_taken():
    bomb = statistics_of(2**22)
    assert len(bomb) < 2**18 and 4 * 8 * 2**22 > 100 * 2**20
    assert peak_bytes(lambda: Statistics.from_bytes(bomb, 1000)) < 2**22
    # A model that has so many groups may count in them.
    assert Statistics.from_bytes(bomb, 2**22).tallies["leaf"].num_groups == 2**22
    many = zipped({f"{number}.npy": npy(np.zeros(2**20)) for number in range(16)})
    assert peak_bytes(lambda: Statistics.from_bytes(many, 1000)) < 2**22


def test_an_entry_that_holds_more_than_it_claims_is_refused():
    body = statistics_of(4, **{"leaf.rows": np.zeros(2**22, np.int64)})
    size = struct.pack("<I", len(npy(np.zeros(2**22, np.int64))))
    lying = body.replace(size, struct.pack("<I", len(npy(np.zeros(4, np.int64)))))
    assert lying.count(size) == 0 and len(lying) == len(body)
    assert peak_bytes(lambda: Statistics.from_bytes(lying, 4)) < 2**22


def test_a_zip_of_another_compression_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as out:
        out.writestr("counts.npy", npy(np.zeros(3)))
    with pytest.raises(DataError, match="in a way that numpy never writes"):
        Statistics.from_bytes(buffer.getvalue(), 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"leaf.distance": np.zeros(3)}, "its sums are of different numbers of groups"),
        ({"leaf.rows": np.zeros((2, 2), np.int64)}, "its sums are of different numbers of groups"),
        ({"leaf.class_pairs": np.array([2**40])}, "counts of classes that it does not have"),
        ({"leaf.class_rows": np.zeros(3, np.int64)}, "counts of classes that it does not have"),
        ({"leaf.classes": np.frombuffer(b"5", np.uint8)}, "not iterable|no list of names|len"),
        ({"tallies": np.array(["leaf", "leaf.x"])}, "KeyError"),
    ],
)
def test_statistics_whose_arrays_disagree_are_refused(changes, reason):
    assert Statistics.from_bytes(statistics_of(4), 4).tallies["leaf"].classes.names == ["a"]
    with pytest.raises(DataError, match=reason):
        Statistics.from_bytes(statistics_of(4, **changes), 4)
    with pytest.raises(DataError, match="4 groups are counted, the model has 3"):
        Statistics.from_bytes(statistics_of(4), 3)


def test_long_names_of_classes_take_their_own_room():
    tally = Tally(num_groups=2)
    names = ["x" * 100_000, *map(str, range(2000))]
    tally.classes = Contingency(2, names, 2 * np.arange(len(names)), np.ones(len(names), np.int64))
    # As an array of text they would take 800 MB, which a file of this size may not claim.
    stored = Statistics(tallies={"leaf": tally}).to_bytes()
    assert Statistics.from_bytes(stored, 2).tallies["leaf"].classes.names == names


def test_leaves_and_trees_of_odd_shapes_are_refused(tmp_path):
    place = Place(Lake(), str(tmp_path))
    artifacts.LEAVES.write(place, Leaves(np.ones(3), np.ones((2, 4)), np.ones(3)))
    with pytest.raises(DataError, match="tree/leaves.safetensors: damaged .*different numbers of leaves"):
        artifacts.LEAVES.read(place)
    for linkage in (np.ones((3, 3)), np.ones(4), np.ones((3, 4), np.float32)):
        artifacts.LINKAGE.write(place, linkage)
        with pytest.raises(DataError, match="tree/linkage.npy: damaged .*is no linkage matrix"):
            artifacts.LINKAGE.read(place)


def cell_merges(number: int) -> CellMerges:
    left, right, delta = np.zeros(number, np.int64), np.zeros(number, np.int64), np.zeros(number)
    return CellMerges(
        left_P=left, right_P=right, delta_P=delta, num_rounds=1, num_pairs=2, num_searches=3, num_exact_searches=4
    )


def test_the_merges_of_a_cell_claim_no_more_than_its_round_has():
    few = cell_merges(3)
    assert len(merge_cells.from_bytes(merge_cells.to_bytes(few), 4).delta_P) == 3
    many = cell_merges(2**20)
    with pytest.raises(ValueError, match="claim 25166.*, 4192 are expected at most"):
        merge_cells.from_bytes(merge_cells.to_bytes(many), 4)


def tensors_with(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


CRAFTED_TENSORS = {
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a tensor of 2^50 bytes": tensors_with({"centers": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}}),
    "offsets before the file": tensors_with({"centers": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
    "a shape that lies": tensors_with({"centers": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 16]}}),
}


@pytest.mark.parametrize("how", CRAFTED_TENSORS)
def test_crafted_leaves_decoders_and_trees_of_a_run_are_refused(tmp_path, how):
    place = Place(Lake(), str(tmp_path))
    for file in (artifacts.LEAVES, artifacts.FIT_DECODER):
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).write_bytes(CRAFTED_TENSORS[how])
    with pytest.raises(DataError, match="tree/leaves.safetensors: damaged"):
        artifacts.LEAVES.read(place)
    with pytest.raises(DataError, match="fit/decoder.safetensors: damaged"):
        artifacts.FIT_DECODER.read_if_there(place)


@pytest.mark.parametrize("name", ["weights.safetensors", "centroids.safetensors"])
@pytest.mark.parametrize("how", CRAFTED_TENSORS)
def test_a_model_with_crafted_tensors_is_refused(tmp_path, name, how):
    shards.corner_model().save(Lake(), str(tmp_path))
    (tmp_path / name).write_bytes(CRAFTED_TENSORS[how])
    with pytest.raises(DataError, match=rf"model {tmp_path}: damaged"):
        Model.load(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [2, 10**6, 10**6, 2], "encoder": "perceptron"},
        {"widths": [2, -5, 2], "encoder": "perceptron"},
        {"widths": ["2", "__import__('os')"], "encoder": "perceptron"},
        {"levels": ["../../etc/passwd"]},
        {"levels": 5},
        {"kernel": {"alpha": 1, "scale": 1, "surprise": 2}},
        {"kernel": None},
        {"preprocess": []},
        {"preprocess": {"method": "none", "blocks": [[0, 1e400, 1]]}},
    ],
)
def test_a_model_whose_head_lies_is_refused_before_memory_is_taken(tmp_path, change):
    shards.corner_model().save(Lake(), str(tmp_path))
    head = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(head | change))
    with pytest.raises(DataError, match=rf"model {tmp_path}: damaged"):
        Model.load(str(tmp_path))


def test_json_as_deep_as_a_stack_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="no model there"):
        Model.load(str(tmp_path))
    with pytest.raises(DataError, match="config.json: not valid JSON"):
        Lake().read_json(str(tmp_path / "config.json"))


@pytest.mark.parametrize("how", ["pickle", "torch", "cut", "json", "gone"])
def test_a_crafted_checkpoint_is_refused_and_runs_no_code(tmp_path, how):
    folder, trap = tmp_path / "checkpoint", tmp_path / "sprung"
    checkpoint.save(folder, {"a": torch.zeros(3)}, {"phase": "pretrain"})
    assert checkpoint.load(folder)[1] == {"phase": "pretrain"}
    path = folder / "state.safetensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap(trap)))
    elif how == "torch":
        torch.save({"a": Trap(trap)}, path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "json":
        (folder / "state.json").write_text("{")
    else:
        path.unlink()
    with pytest.raises(ValueError, match="the last checkpoint is damaged"):
        checkpoint.load(folder)
    assert not trap.exists()


def test_a_file_of_tensors_is_no_way_to_another_file(tmp_path):
    body = safetensors.torch.save({"../../escaped": torch.zeros(2)})
    shards.corner_model().save(Lake(), str(tmp_path / "model"))
    (tmp_path / "model" / "weights.safetensors").write_bytes(body)
    Model.load(str(tmp_path / "model"))
    assert not list(tmp_path.parent.glob("escaped*"))
