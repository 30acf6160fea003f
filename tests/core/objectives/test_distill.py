"""Distillation: prototypes, the loss, ids over the epochs, a teacher and its cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.models.preprocess import Preprocess
from raydc.core.models.prototypes import Prototypes, log_classes
from raydc.core.models.teacher import Teacher
from raydc.core.objectives.distill import Distill, class_weights, direction_means
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, run_pass
from raydc.core.search.nearest import nearest
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from tests.core.ranks import (
    SETTINGS,
    PlainContext,
    blobs,
    fit_blobs,
    make_rows,
    order_of_leaves,
    run_ranks,
    with_objective,
)

DISTILL = with_objective("distill", refine=replace(SETTINGS.refine, num_epochs=3))


def losses(result):
    return np.array([h["loss"] for h in result["history"] if "loss" in h])


def prototypes(points, classes, cosine=0, width=0.5):
    points = torch.tensor(points)
    shift = torch.zeros(points.shape[1])
    return Prototypes(points, torch.tensor(classes), shift, torch.tensor(width), torch.tensor(cosine))


def test_a_class_has_the_logit_of_its_nearest_prototype():
    found = log_classes(
        torch.tensor([[1.0]]), torch.tensor([[0.0], [4.0], [3.0]]), torch.tensor([0, 1, 0]), torch.tensor(0.5)
    )
    # Squared distances 1, 9, 4: class 0 takes the 1, class 1 the 9; 2 * width is 1.
    expected = np.exp([-1.0, -9.0])
    np.testing.assert_allclose(found.exp(), [expected / expected.sum()], rtol=1e-6)


def test_classes_are_counted_in_their_own_order():
    points, classes = torch.tensor([[5.0], [0.0]]), torch.tensor([1, 0])
    assert log_classes(torch.tensor([[0.1]]), points, classes, torch.tensor(1.0)).argmax() == 0


def test_directions_are_compared_by_their_cosine():
    known = prototypes([[1.0, 0.0], [0.0, 1.0]], [0, 1], cosine=1, width=0.1)
    z = torch.tensor([[3.0, 0.0], [0.3, 0.4]])
    ids, probabilities = known.best(z, 2)
    np.testing.assert_array_equal(ids, [[0, 1], [1, 0]])
    logits = np.array([[1.0, 0.0], [0.6, 0.8]]) / 0.1
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, -np.sort(-expected, axis=1), rtol=1e-5)


def test_the_best_class_is_that_of_the_nearest_prototype_alone_and_in_a_crowd():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(12, 4, generator=generator)
    known = Prototypes(
        points, torch.arange(12) % 5, torch.randn(4, generator=generator), torch.tensor(0.3), torch.tensor(0)
    )
    z = torch.randn(500, 4, generator=generator)
    ids, top = known.best(z, 2)
    squared = ((z[:, None] - known.shift_L - points) ** 2).sum(2)
    per_class = np.stack([squared[:, c::5].min(dim=1).values.numpy() for c in range(5)], 1)
    np.testing.assert_array_equal(ids[:, 0], per_class.argmin(1))
    np.testing.assert_array_equal(ids[:, 1], per_class.argsort(1)[:, 1])
    alone = [known.best(z[i : i + 1], 2) for i in range(20)]
    assert torch.equal(torch.cat([i for i, _ in alone]), ids[:20])
    assert torch.equal(torch.cat([p for _, p in alone]), top[:20])


def test_reordered_prototypes_follow_their_classes():
    known = prototypes([[0.0], [1.0], [2.0], [3.0]], [0, 1, 2, 1])
    found = known.reordered(torch.tensor([2, 1]))
    np.testing.assert_array_equal(found.points_ML, [[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(found.classes_M, [1, 0, 1])


def test_class_weights_give_every_class_the_same_share():
    masses = torch.tensor([8.0, 2.0, 0.0], dtype=torch.float64)
    found = class_weights(masses)
    np.testing.assert_allclose(found, [10 / 16, 10 / 4, 0.0])
    assert float((found * masses).sum()) == pytest.approx(10.0)


def test_the_mean_of_no_direction_is_the_one_before():
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = direction_means(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64), before)
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 1.0]])


def small(**changes):
    torch.manual_seed(0)
    autoencoder = Autoencoder(6, (8,), 3)
    settings = replace(SETTINGS.distill, **changes)
    return Distill(autoencoder, torch.randn(4, 3), Kernel(), settings)


def test_the_loss_by_hand():
    model = small(metric="euclidean", reconstruction_weight=0.5)
    model.width.fill_(2.0)
    model.class_weights.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x, weights, ids = torch.rand(5, 6), torch.tensor([1.0, 1, 2, 1, 0.5]), torch.tensor([0, 3, 1, 1, 2])
    found = {name: float(value.detach()) for name, value in model.loss(x, weights, ids).items()}
    with torch.no_grad():
        z = model.encoder(x)
        y = model.decoder(z).numpy()
    entropy = reconstruction = 0.0
    for i in range(5):
        logits = -((z[i] - model.points.detach()) ** 2).sum(1).numpy().astype(np.float64) / 4.0
        log_p = logits - np.log(np.exp(logits).sum())
        entropy -= float(weights[i]) * float(model.class_weights[ids[i]]) * log_p[ids[i]]
        reconstruction += float(weights[i]) * float(((x[i].numpy() - y[i]) ** 2).mean())
    assert found["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["reconstruction"] == pytest.approx(reconstruction, rel=1e-5)
    assert found["loss"] == pytest.approx(entropy + 0.5 * reconstruction, rel=1e-5)
    assert "reconstruction" not in small(reconstruction_weight=0.0).loss(x, weights, ids)


def test_a_pass_moves_each_prototype_to_the_mean_direction_of_its_rows():
    model = small()
    x = torch.rand(200, 6)
    with torch.no_grad():
        z = model.encoder(x)
        model.initialize(z)
        u = torch.nn.functional.normalize(z - z.mean(0), dim=1)
    before = nearest(u, model.points.detach())[0][:, 0]
    batch = Minibatch(torch.arange(200), x, torch.ones(200), torch.arange(200), seed=0)
    seen = run_pass(model.refresh(0, 0, 4), [batch], lambda sums: sums)
    for c in range(4):
        expected = torch.nn.functional.normalize(u[before == c].sum(0), dim=0)
        np.testing.assert_allclose(model.points[c].detach(), expected, atol=1e-5)
    assert seen["changed"] == 1.0 and seen["empty"] == 0
    # The ids that teach are those of the moved prototypes.
    assert torch.equal(model.class_source.ids(batch), nearest(u, model.points.detach())[0][:, 0])
    assert not model.points.requires_grad
    model.settings = replace(model.settings, num_reclusterings=1)
    points = model.points.detach().clone()
    assert run_pass(model.refresh(1, 0, 4), [batch], lambda sums: sums)["changed"] == 0.0
    assert torch.equal(model.points, points)
    assert model.refresh(1, 1, 4) is None


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(1, fit_blobs, DISTILL)[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_loss_curve_is_the_same_on_any_number_of_ranks(world_size, on_one_rank):
    for result in run_ranks(world_size, fit_blobs, DISTILL):
        np.testing.assert_allclose(losses(result), losses(on_one_rank), rtol=1e-4)
        order = order_of_leaves(result, on_one_rank)
        np.testing.assert_allclose(result["weights"][order], on_one_rank["weights"], atol=1)
        found, expected = (r["predictor"]["points_ML"] for r in (result, on_one_rank))
        np.testing.assert_allclose(found[order], expected, atol=1e-3)


def test_streamed_rows_train_on_two_ranks():
    for result in run_ranks(2, fit_blobs, DISTILL, True):
        assert result["weights"].sum() == 1000
        assert np.isfinite(losses(result)).all()


@pytest.mark.parametrize("stop_after", [4, 5])
def test_a_resumed_fit_ends_like_an_unbroken_one(tmp_path, stop_after, on_one_rank):
    assert fit_blobs(Ranks(), DISTILL, folder=tmp_path, stop_after=stop_after)["stopped"]
    resumed = fit_blobs(Ranks(), DISTILL, folder=tmp_path)
    np.testing.assert_array_equal(losses(resumed), losses(on_one_rank))
    changed = [[h["changed"] for h in r["history"] if "changed" in h] for r in (resumed, on_one_rank)]
    assert changed[0] == changed[1]
    np.testing.assert_array_equal(resumed["centers"], on_one_rank["centers"])


def test_the_changed_share_of_a_pass_is_of_the_weight_not_of_the_rows():
    model = small(metric="euclidean")
    x, weights = torch.rand(4, 6), torch.tensor([5.0, 1.0, 1.0, 1.0])
    batch = Minibatch(torch.arange(4), x, weights, None, seed=0)
    assert run_pass(model.refresh(0, 0, 1), [batch], lambda sums: sums)["changed"] == 1.0
    # The source of the ids answers by the row: row 0, of weight 5, is another one now.
    model.settings = replace(model.settings, num_reclusterings=0)
    source = model.class_source
    known = source.ids(batch)
    prototypes = model.prototypes()
    moved = prototypes.points_ML.clone()
    others = [int(i) for i in known.unique() if i != known[0]] or [(int(known[0]) + 1) % 4]
    with torch.no_grad():
        moved[others[0]] = model.encoder(x[:1])[0]
        model.points.copy_(moved)
    now = nearest(model.encoder(x).detach(), moved)[0][:, 0]
    expected = float((weights * (now != known)).sum() / weights.sum())
    assert now[0] != known[0] and expected >= 5 / 8
    seen = run_pass(model.refresh(1, 0, 1), [batch], lambda sums: sums)
    assert seen["changed"] == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_prototypes_start_alike_from_a_row_of_weight_two_and_from_two_rows(metric):
    sample = torch.randn(80, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(80)
    weights[:30] = 2.0
    weighted, repeated = small(metric=metric), small(metric=metric)
    weighted.initialize(sample, weights)
    repeated.initialize(torch.cat([sample, sample[:30]]))
    for name in ("points", "shift", "width"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), rtol=1e-5, atol=1e-5)


def test_an_id_means_the_same_cluster_in_every_epoch():
    """Compared id by id, without a matching."""
    x = blobs()[0]
    labels = []
    for num_epochs in (0, 4):
        settings = replace(DISTILL, refine=replace(DISTILL.refine, num_epochs=num_epochs))
        fitted = fit(make_rows(Ranks(), x), Preprocess(), settings, PlainContext())
        with torch.no_grad():
            labels.append(fitted.clustering.assign(fitted.clustering.encoder(torch.from_numpy(x)))[0].numpy())
    assert (labels[0] == labels[1]).mean() > 0.9
    changed = [h["changed"] for h in fitted.history if "changed" in h]
    assert changed[0] == 1.0 and max(changed[1:]) < 0.1


def teacher(level=None):
    """A fitted autoencoder's clustering of the blobs as a teacher; `level` of its 6 leaves are kept apart."""
    fitted = fit(make_rows(Ranks(), blobs()[0]), Preprocess(), with_objective("autoencoder"), PlainContext())
    classes = torch.arange(6) if level is None else torch.tensor([0, 0, 1, 1, 2, 2])
    return Teacher(fitted.clustering.encoder, fitted.decoder, fitted.clustering.centers_KL, classes)


@pytest.mark.parametrize("level", [None, 3])
def test_without_epochs_the_labels_are_the_teachers(level):
    known, x = teacher(level), torch.from_numpy(blobs()[0])
    cluster = replace(SETTINGS.cluster, num_leaves=known.num_classes)
    for num_epochs in (0, 2):
        settings = replace(DISTILL, refine=replace(SETTINGS.refine, num_epochs=num_epochs), cluster=cluster)
        fitted = fit(make_rows(Ranks(), x.numpy()), Preprocess(), settings, PlainContext(), teacher=known)
        assert not [h for h in fitted.history if h["phase"] == "pretrain"]
        with torch.no_grad():
            found = fitted.clustering.assign(fitted.clustering.encoder(x))[0]
        agreement = float((found == known.classes(x)).double().mean())
        assert len(found.unique()) == (level or 6) == len(fitted.clustering.centers_KL)
        assert agreement == 1.0 if num_epochs == 0 else agreement > 0.95


def test_a_teacher_teaches_on_two_ranks_as_on_one():
    known = teacher(3)
    settings = replace(DISTILL, cluster=replace(SETTINGS.cluster, num_leaves=3))
    one = fit_blobs(Ranks(), settings, teacher=known)
    for result in run_ranks(2, fit_blobs, settings, False, None, None, None, known):
        np.testing.assert_allclose(losses(result), losses(one), rtol=1e-4)


def test_a_teacher_without_a_network_gives_the_prototypes_by_its_classes():
    x = blobs()[0]
    leaves = fit(make_rows(Ranks(), x), Preprocess(), with_objective("kmeans"), PlainContext()).clustering.centers_KL
    known = Teacher(None, None, leaves, torch.tensor([0, 1, 2, 0, 1, 2]))
    settings = replace(DISTILL, cluster=replace(SETTINGS.cluster, num_leaves=3))
    fitted = fit(make_rows(Ranks(), x), Preprocess(), settings, PlainContext(), teacher=known)
    assert [h["phase"] for h in fitted.history].count("pretrain") == 3
    rows = torch.from_numpy(x)
    with torch.no_grad():
        found = fitted.clustering.assign(fitted.clustering.encoder(rows))[0]
    assert float((found == known.classes(rows)).double().mean()) > 0.6
