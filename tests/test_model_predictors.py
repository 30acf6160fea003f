"""Models whose leaves are decided by more than the nearest center: saved, loaded, reordered."""

import numpy as np
import pytest
import torch

from raydc.core.models.mixture import Mixture
from raydc.core.models.prototypes import Prototypes
from raydc.model import Model
from raydc.storage.lake import Lake
from tests.shards import corner_model, near_corners


def mixture():
    generator = torch.Generator().manual_seed(0)
    weights = torch.log_softmax(torch.randn(4, generator=generator), dim=0)
    means = corner_model().centers_KL + torch.randn(4, 2, generator=generator)
    return Mixture(weights, means, torch.randn(4, 2, generator=generator))


def prototypes(cosine):
    points = torch.tensor([[0.0, 0], [0, 10], [10, 0], [10, 10], [5, 5]])
    points = torch.nn.functional.normalize(points - 4.0, dim=1) if cosine else points
    shift = torch.full((2,), 4.0 if cosine else 0.0)
    return Prototypes(
        points_ML=points,
        classes_M=torch.tensor([0, 1, 2, 3, 1]),
        shift_L=shift,
        width=torch.tensor(0.5),
        cosine=torch.tensor(cosine),
    )


PREDICTORS = {"mixture": mixture(), "nearest prototype": prototypes(0), "direction": prototypes(1)}


@pytest.fixture(params=PREDICTORS)
def model(request):
    return corner_model(predictor=PREDICTORS[request.param])


def same(first, second):
    for name in ("leaf", "second_leaf", "confidence", "distance", "second_distance"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_a_loaded_model_labels_as_the_saved_one(tmp_path, model):
    x, _ = near_corners(500)
    model.save(Lake(), str(tmp_path))
    loaded = Model.load(str(tmp_path))
    assert loaded.predictor.kind == model.predictor.kind
    same(loaded.predict(x), model.predict(x))


def test_labels_do_not_depend_on_the_block_size_or_the_rows_beside(model):
    x, _ = near_corners(300)
    whole = model.predict(x)
    same(model.predict(x, block_rows=7), whole)
    alone = [model.predict(x[i : i + 1]) for i in range(20)]
    np.testing.assert_array_equal([a.leaf[0] for a in alone], whole.leaf[:20])
    np.testing.assert_array_equal([a.confidence[0] for a in alone], whole.confidence[:20])


def test_a_reordered_model_has_the_same_clusters_under_new_names(model):
    x, _ = near_corners(500)
    order = [2, 0, 3, 1]
    before, after = model.predict(x), model.reordered(order, {}).predict(x)
    np.testing.assert_array_equal(np.array(order)[after.leaf], before.leaf)
    np.testing.assert_array_equal(np.array(order)[after.second_leaf], before.second_leaf)
    np.testing.assert_allclose(after.confidence, before.confidence, atol=1e-6)
    np.testing.assert_array_equal(after.distance, before.distance)


def test_leaves_that_an_order_leaves_out_get_no_row(model):
    x, _ = near_corners(500)
    before, after = model.predict(x), model.reordered([1, 3], {}).predict(x)
    kept = np.isin(before.leaf, [1, 3])
    assert kept.any()
    np.testing.assert_array_equal(np.array([1, 3])[after.leaf[kept]], before.leaf[kept])
    assert set(after.leaf) <= {0, 1}


def test_confidence_and_distances_belong_to_the_leaves_named(model):
    x, _ = near_corners(200)
    found, z = model.predict(x), torch.from_numpy(x)
    assert (found.leaf != found.second_leaf).all()
    assert ((found.confidence > 0.25) & (found.confidence <= 1)).all()
    for leaf, distance in ((found.leaf, found.distance), (found.second_leaf, found.second_distance)):
        expected = (z - model.centers_KL[torch.from_numpy(leaf).long()]).norm(dim=1)
        np.testing.assert_allclose(distance, expected, rtol=1e-5)
