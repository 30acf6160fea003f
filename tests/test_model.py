"""The saved artifact: the same labels after save and load, right ones, and nothing run from a crafted file."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch

from raydc.core.models.autoencoder import initialize, perceptron
from raydc.core.models.preprocess import Moments, Preprocess
from raydc.core.objectives.kernel import Kernel
from raydc.errors import DataError
from raydc.model import Model, Prediction
from raydc.storage.lake import Lake
from tests import shards


def rows(num: int = 500, dim: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)


def network_model(method: str = "standardize", num_leaves: int = 7) -> Model:
    widths = (12, 16, 3)
    encoder = perceptron(widths)
    initialize(encoder, torch.Generator().manual_seed(0))
    preprocess = Preprocess.fit(method, [(0, 8, 1.0), (8, 12, 0.5)], Moments.from_rows(rows()))
    with torch.no_grad():
        centers = encoder(preprocess(torch.from_numpy(rows(num_leaves, seed=3))))
    levels = {2: np.array([0, 0, 0, 1, 1, 1, 1], np.int32)[:num_leaves], 3: np.arange(num_leaves, dtype=np.int32) // 3}
    encoder.eval().requires_grad_(False)
    return Model(
        preprocess=preprocess,
        encoder=encoder,
        centers_KL=centers,
        kernel=Kernel(3.0, 0.7),
        widths=widths,
        levels=levels,
        details={"objective": "dec"},
    )


def assert_equal(first: Prediction, second: Prediction) -> None:
    for name in ("leaf", "confidence", "distance", "second_leaf", "second_distance"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert first.levels.keys() == second.levels.keys()
    for k in first.levels:
        assert np.array_equal(first.levels[k], second.levels[k])


def test_rows_are_labeled_by_hand():
    found = shards.corner_model().predict(np.array([[0.0, 1.0], [9.0, 6.0]]))
    assert found.leaf.tolist() == [0, 3]
    assert found.second_leaf.tolist() == [1, 2]
    np.testing.assert_allclose(found.distance, [1.0, 17**0.5], rtol=1e-6)
    np.testing.assert_allclose(found.second_distance, [9.0, 37**0.5], rtol=1e-6)
    assert found.levels[2].tolist() == [0, 1]
    # Student-t with alpha 1 and scale 4: 1 / (1 + d^2 / 4), normalized.
    similarity = 1 / (1 + np.array([1, 81, 101, 181]) / 4)
    assert found.confidence[0] == pytest.approx(similarity[0] / similarity.sum(), rel=1e-5)


def test_labels_have_the_types_of_the_label_files():
    found = network_model().predict(rows())
    assert [found.leaf.dtype, found.second_leaf.dtype, found.levels[2].dtype] == [np.int32] * 3
    assert [found.confidence.dtype, found.distance.dtype, found.second_distance.dtype] == [np.float32] * 3


@pytest.mark.parametrize("method", ["none", "l2", "standardize", "scale"])
def test_a_loaded_model_labels_as_the_saved_one(tmp_path, method):
    model = network_model(method)
    model.save(Lake(), str(tmp_path / "model"))
    back = Model.load(str(tmp_path / "model"))
    assert_equal(back.predict(rows()), model.predict(rows()))
    assert (back.widths, back.kernel, back.details) == (model.widths, model.kernel, model.details)
    assert back.preprocess.blocks == [tuple(b) for b in model.preprocess.blocks]
    assert not any(p.requires_grad for p in back.encoder.parameters())


def test_a_model_without_a_network_survives_too(tmp_path):
    shards.corner_model().save(Lake(), str(tmp_path))
    back = Model.load(str(tmp_path))
    assert back.encoder is None
    x, leaf = shards.near_corners(100)
    assert back.predict(x).leaf.tolist() == leaf.tolist()


def test_the_same_model_is_saved_as_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        network_model().save(Lake(), str(tmp_path / name))
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == [
        "centroids.safetensors",
        "config.json",
        "weights.safetensors",
    ]


def test_a_run_folder_may_be_given_for_its_model(tmp_path):
    network_model().save(Lake(), str(tmp_path / "run" / "model"))
    assert Model.load(str(tmp_path / "run")).num_leaves == 7


def test_predictions_equal_brute_force_in_float64():
    model = network_model(num_leaves=7)
    x = rows(1000, seed=5)
    z = model.encode(x).double().numpy()
    distances = np.linalg.norm(z[:, None] - model.centers_KL.double().numpy(), axis=2)
    order = np.argsort(distances, axis=1, kind="stable")
    found = model.predict(x)
    assert np.array_equal(found.leaf, order[:, 0])
    assert np.array_equal(found.second_leaf, order[:, 1])
    np.testing.assert_allclose(found.distance, np.sort(distances, axis=1)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found.second_distance, np.sort(distances, axis=1)[:, 1], rtol=1e-6)
    logits = -2.0 * np.log1p(distances**2 / (3.0 * 0.7))
    similarity = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.confidence, (similarity / similarity.sum(axis=1)[:, None]).max(axis=1), rtol=1e-4)


def test_centers_far_from_the_origin_are_told_apart():
    far = shards.corner_model(centers_KL=torch.from_numpy(shards.CORNERS + np.float32(1e5)))
    x, leaf = shards.near_corners(200)
    assert far.predict(x + np.float32(1e5)).leaf.tolist() == leaf.tolist()


def test_a_tie_goes_to_the_lower_leaf():
    found = shards.corner_model().predict(np.array([[5.0, 5.0], [0.0, 5.0]]))
    assert found.leaf.tolist() == [0, 0]
    assert found.second_leaf.tolist() == [1, 1]


@pytest.mark.parametrize("block_rows", [1, 7, 100, 10_000])
def test_labels_do_not_depend_on_the_block_size(block_rows):
    model, x = network_model(), rows()
    whole, blocks = model.predict(x), model.predict(x, block_rows=block_rows)
    assert np.array_equal(blocks.leaf, whole.leaf)
    assert np.array_equal(blocks.second_leaf, whole.second_leaf)
    np.testing.assert_allclose(blocks.distance, whole.distance, rtol=1e-4, atol=1e-5)


def test_labels_do_not_depend_on_the_rows_beside():
    model, x = network_model(), rows()
    order = np.random.default_rng(1).permutation(len(x))
    assert np.array_equal(model.predict(x[order]).leaf, model.predict(x).leaf[order])
    assert model.predict(x[17:18]).leaf[0] == model.predict(x).leaf[17]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_and_torch_of_every_float_type_are_taken(dtype):
    model, x = network_model(), rows().astype(np.float16).astype(dtype)
    expected = model.predict(x.astype(np.float32))
    assert_equal(model.predict(x), expected)
    assert_equal(model.predict(torch.from_numpy(x)), expected)
    assert_equal(model.predict(x.tolist()), expected)


def test_views_and_read_only_arrays_are_taken_without_a_warning():
    model, x = network_model(), rows()
    frozen = x.copy()
    frozen.flags.writeable = False
    expected = model.predict(x)
    assert_equal(model.predict(frozen), expected)
    assert_equal(model.predict(np.asfortranarray(x)), expected)
    assert np.array_equal(model.predict(x[::-1]).leaf, expected.leaf[::-1])
    assert np.array_equal(model.predict(torch.from_numpy(x)[::2]).leaf, expected.leaf[::2])


def test_a_tensor_with_gradients_is_taken():
    x = torch.from_numpy(rows(5)).requires_grad_(True)
    assert not network_model().encode(x).requires_grad


def test_no_rows_give_no_labels():
    found = network_model().predict(np.empty((0, 12), np.float32))
    assert found.leaf.shape == found.confidence.shape == found.second_distance.shape == (0,)
    assert found.levels[3].shape == (0,)


def test_a_model_of_one_leaf_labels_everything_with_it():
    one = shards.corner_model(centers_KL=torch.zeros(1, 2), levels={})
    found = one.predict(np.array([[3.0, 4.0]]))
    assert (found.leaf[0], found.second_leaf[0]) == (0, 0)
    assert (found.distance[0], found.second_distance[0], found.confidence[0]) == (5, 5, 1)


@pytest.mark.parametrize("shape", [(12,), (3, 11), (3, 12, 1)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected rows of shape \(N, 12\), got"):
        network_model().predict(np.zeros(shape, np.float32))


def test_a_reordered_model_has_the_same_clusters_under_new_names():
    model, x = network_model(), rows()
    order = [3, 0, 6, 1, 5, 2, 4]
    levels = {2: np.array([0, 1, 1, 0, 1, 0, 1], np.int32)}
    turned = model.reordered(order, levels)
    before, after = model.predict(x), turned.predict(x)
    assert np.array_equal(np.array(order)[after.leaf], before.leaf)
    assert np.array_equal(after.levels[2], levels[2][after.leaf])
    assert np.array_equal(after.distance, before.distance)
    assert model.num_leaves == turned.num_leaves == 7


def test_leaves_that_an_order_leaves_out_are_gone():
    model = shards.corner_model().reordered([2, 0], {})
    found = model.predict(shards.CORNERS)
    assert model.num_leaves == 2
    assert found.leaf.tolist() == [1, 1, 0, 0]


# What is refused.


def saved(folder) -> str:
    network_model().save(Lake(), str(folder))
    return str(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"model {tmp_path}: no model there. Give the model folder of a finished run"):
        Model.load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"format_version": 99},
            "config.json says format 'raydc-model', version 99; this raydc reads 'raydc-model', ver",
        ),
        ({"format": "onnx"}, "config.json says format 'onnx', version 1"),
    ],
)
def test_another_format_is_refused(tmp_path, change, text):
    uri = saved(tmp_path)
    head = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(head | change))
    with pytest.raises(DataError, match=text):
        Model.load(uri)


def test_a_model_of_the_first_format_is_loaded_from_the_folder_of_its_run(tmp_path):
    model = network_model()
    model.save(Lake(), str(tmp_path / "model"))
    head = json.loads((tmp_path / "model" / "config.json").read_text())
    assert head["format_version"] == 1
    old = {"run_id": "old", "format_version": 1, "config": {"neighbours": {"num": 3}}}
    (tmp_path / "run.json").write_text(json.dumps(old))
    rows = np.random.default_rng(0).normal(size=(20, model.dim)).astype(np.float32)
    np.testing.assert_array_equal(Model.load(str(tmp_path)).predict(rows).leaf, model.predict(rows).leaf)


@pytest.mark.parametrize("body", ["[1, 2]", '"raydc-model"', "{}"])
def test_a_head_that_is_no_model_is_refused(tmp_path, body):
    uri = saved(tmp_path)
    (tmp_path / "config.json").write_text(body)
    with pytest.raises(DataError, match="config.json says format None, version None"):
        Model.load(uri)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["weights.safetensors", "centroids.safetensors", "config.json"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_crafted_file_is_refused_and_runs_no_code(tmp_path, name, protocol):
    uri = saved(tmp_path / "model")
    trap = pickle.dumps(Trap(str(tmp_path / "sprung")), protocol)
    (tmp_path / "model" / name).write_bytes(trap)
    with pytest.raises(DataError, match=f"model {uri}: (damaged|no model there)"):
        Model.load(uri)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap).close()
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "centroids.safetensors"])
@pytest.mark.parametrize("how", ["gone", "empty", "truncated", "other tensors"])
def test_a_damaged_model_is_refused_with_its_folder(tmp_path, name, how):
    uri = saved(tmp_path)
    path = tmp_path / name
    body = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        other = safetensors.torch.save({"something": torch.zeros(2)})
        path.write_bytes({"empty": b"", "truncated": body[:-10], "other tensors": other}[how])
    with pytest.raises(DataError, match=rf"model {uri}: damaged \(\w+: .*\)?\. Restore the folder, or fit again"):
        Model.load(uri)


@pytest.mark.s3
def test_a_model_may_live_in_s3(bucket):
    model = network_model()
    model.save(Lake(), f"{bucket}/run/model")
    assert_equal(Model.load(f"{bucket}/run").predict(rows()), model.predict(rows()))
    with pytest.raises(DataError, match="no model there"):
        Model.load(f"{bucket}/none")


def bad_prediction(x) -> str:
    with pytest.raises(ValueError, match=r"row \d+ of ") as caught:
        shards.corner_model().predict(x)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not_finite"), (np.inf, "not_finite"), (1e20, "too_large"), (3e38, "too_large")]
)
def test_rows_that_a_run_would_refuse_are_refused(value, reason):
    x = np.zeros((5, 2), np.float32)
    x[3, 1] = x[4, 0] = value
    assert bad_prediction(x).startswith(f"row 3 of x is bad: {reason} (2 of 5 rows are). Leave them out first")
    assert bad_prediction(torch.from_numpy(x)) == bad_prediction(x)
    assert bad_prediction(x.astype(np.float64)) == bad_prediction(x)


def test_rows_without_direction_are_refused_under_l2():
    model = network_model("l2")
    x = rows(4)
    assert len(model.predict(x).leaf) == 4
    x[2, 8:] = 0
    with pytest.raises(ValueError, match="row 2 of x is bad: zero_norm"):
        model.predict(x)


def test_columns_and_tables_of_other_libraries_are_taken():
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    x = shards.near_corners(20)[0]
    column = {"name": "embedding", "dim": 2, "dtype": "float32", "weight": 1.0}
    model = shards.corner_model(details={"columns": [column]})
    expected = model.predict(x)
    series = pandas.Series(list(x))
    table = pa.table({"id": range(20), "embedding": shards.column(x)})
    for given in (
        x.tolist(), torch.from_numpy(x), series, series.to_numpy(), pandas.DataFrame(x), series.to_frame("embedding"),
        table, table["embedding"], table["embedding"].combine_chunks(), table.to_batches()[0], table.to_pandas(),
        polars.from_arrow(table), polars.from_arrow(table)["embedding"], pa.table({"0": x[:, 0], "1": x[:, 1]}),
        pa.array([str(row) for row in x.tolist()]),
    ):  # fmt: skip
        assert_equal(model.predict(given), expected)
    missing = pa.array([[1.0, 2.0], None, [1.0, 2.0]])
    assert "row 1 of the column is bad: missing (1 of 3 rows are)" in bad_prediction(missing)
    assert "row 1 of the column is bad: wrong_length" in bad_prediction(pandas.Series([[1.0, 2.0], [1.0]]))
    with pytest.raises(ValueError, match="expected a table with the columns"):
        model.predict(pa.table({"a": [1.0], "b": [2.0], "c": [3.0]}))


def test_one_row_must_be_given_as_a_matrix():
    with pytest.raises(ValueError, match=r"expected rows of shape \(N, 2\), got one row: give x\[None, :\]"):
        shards.corner_model().predict(np.zeros(2))


def test_a_model_is_loaded_from_a_path(tmp_path):
    shards.corner_model().save(Lake(), str(tmp_path / "model"))
    assert Model.load(tmp_path / "model").num_leaves == Model.load(str(tmp_path)).num_leaves == 4
