"""TEMI and I-Con: the equations by hand, gradients, and the fit on 1, 2 and 4 ranks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.models.head import Head, HeadPredictor, calibrated_temperature
from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.heads import log_marginal
from raydc.core.objectives.icon import Icon, log_debiased, log_lift, negative_loss
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import Minibatch, ObjectiveInputs, run_pass
from raydc.core.objectives.temi import Temi, pair_loss, pair_weight
from raydc.core.search.knn import Neighbors, Shard, prepare, search
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.neighbor_pairs import NeighborPairs
from raydc.core.training.rows import Batch, ResidentRows
from raydc.core.training.settings import HeadSettings
from tests.core.ranks import SETTINGS, PlainContext, blobs, run_ranks, shard

HEAD = HeadSettings(learning_rate=5e-3, teacher_momentum=0.9, num_negatives=32)


def settings(objective, *, num_epochs=3, **changes):
    refine = replace(SETTINGS.refine, num_epochs=num_epochs, tolerance=0.0)
    return replace(SETTINGS, objective=objective, refine=refine, head=replace(HEAD, **changes))


def probabilities(num, leaves, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(leaves, 0.4), num)
    return p, torch.from_numpy(np.log(p))


def inputs(objective, dim=5, leaves=4, **changes):
    centers = torch.from_numpy(np.random.default_rng(0).normal(size=(leaves, dim)).astype(np.float32))
    return ObjectiveInputs(
        autoencoder=None,
        centers_KL=centers,
        kernel=Kernel(),
        settings=settings(objective, **changes),
        arithmetic="float32",
        num_rows=100,
        dim=dim,
    )


def minibatch(num=7, dim=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num, generator=generator) + 0.5
    x, x2 = torch.randn(num, dim, generator=generator), torch.randn(num, dim, generator=generator)
    second = Minibatch(torch.arange(num) + 50, x2, weights, None, 0)
    return Minibatch(torch.arange(num), x, weights, None, 0, positives=second)


def test_the_pair_loss_of_temi_is_the_formula_of_the_paper():
    (s, log_s), (t, log_t), (pk, log_pk) = (probabilities(n, 5, i) for i, n in enumerate((6, 6, 1)))
    expected = [-np.log(sum((s[i, c] * t[i, c]) ** 0.6 / pk[0, c] for c in range(5))) for i in range(6)]
    np.testing.assert_allclose(pair_loss(log_s, log_t, log_pk[0], beta=0.6), expected, rtol=1e-12)
    weights = [sum(s[i, c] * t[i, c] for c in range(5)) for i in range(6)]
    np.testing.assert_allclose(pair_weight(log_s, log_t), weights, rtol=1e-12)


def test_the_losses_of_icon_are_the_divergence_of_the_paper_up_to_a_constant():
    # All rows in one batch, each with two neighbors: KL(p~ || q~) with full N x N matrices in float64.
    num, leaves, alpha = 8, 3, 0.6
    phi, log_phi = probabilities(num, leaves, 3)
    neighbors = np.stack([(np.arange(num) + 1) % num, (np.arange(num) + 3) % num], axis=1)
    q = np.zeros((num, num))
    for i in range(num):
        for j in range(num):
            q[i, j] = sum(phi[i, c] * phi[j, c] / phi[:, c].sum() for c in range(leaves))
    np.testing.assert_allclose(q.sum(axis=1), 1.0)
    p = np.zeros((num, num))
    np.put_along_axis(p, neighbors, 0.5, axis=1)
    p, q = (1 - alpha) * p + alpha / num, (1 - alpha) * q + alpha / num
    expected = (p * np.log(p / q)).sum(axis=1)
    constant = (p * np.log(p * num)).sum(axis=1)

    pk = torch.from_numpy(phi.mean(axis=0))
    lifts = [log_debiased(log_lift(log_phi, log_phi[neighbors[:, m]], pk.log()), alpha) for m in range(2)]
    attraction = -(1 - alpha) * torch.stack(lifts).mean(dim=0)
    found = attraction + alpha * negative_loss(log_phi.exp(), log_phi.exp(), pk, alpha)
    np.testing.assert_allclose(found.numpy() + constant, expected, rtol=1e-10)


def test_without_debiasing_icon_is_temi_with_beta_one_and_a_teacher_that_is_the_student():
    icon, temi = Icon(inputs("icon", debiasing=0.0)), Temi(inputs("temi", pair_exponent=1.0))
    sample = torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
    icon.initialize(sample)
    temi.initialize(sample)
    batch = minibatch()
    ours, theirs = icon(batch)["loss"], temi(batch)["loss"]
    # TEMI weighs each pair by how surely the teacher joins it; I-Con weighs all alike.
    with torch.no_grad():
        weight = pair_weight(temi.teachers[0](batch.x_ND), temi.teachers[0](batch.positives.x_ND))
    again = replace(batch, weights_N=batch.weights_N / weight)
    torch.testing.assert_close(ours, temi(again)["loss"])
    assert not torch.allclose(ours, theirs)
    # Symmetrized, with one side of each pair held fast, TEMI has half of I-Con's gradient.
    ours.backward()
    temi.zero_grad()
    temi(again)["loss"].backward()
    torch.testing.assert_close(icon.heads[0].prototypes.grad, 2.0 * temi.heads[0].prototypes.grad)


@pytest.mark.parametrize(
    ("kind", "options"), [(Temi, {}), (Temi, {"num_heads": 3}), (Icon, {}), (Icon, {"debiasing": 0.0})]
)
@pytest.mark.parametrize("hidden", [(), (6, 4)])
def test_gradients_are_those_of_finite_differences(kind, options, hidden):
    name = kind.__name__.lower()
    objective = kind(inputs(name, hidden_dims=hidden, start="random" if hidden else "kmeans", **options))
    objective.initialize(torch.randn(60, 5, generator=torch.Generator().manual_seed(2)))
    objective = objective.double()
    batch = minibatch()
    pair = replace(batch.positives, x_ND=batch.positives.x_ND.double(), weights_N=batch.weights_N.double())
    batch = replace(batch, x_ND=batch.x_ND.double(), weights_N=batch.weights_N.double(), positives=pair)
    objective(batch)["loss"].backward()
    for parameter in [p for p in objective.parameters() if p.requires_grad]:
        flat, gradient = parameter.data.view(-1), parameter.grad.reshape(-1)
        for place in range(0, len(flat), max(1, len(flat) // 5)):
            values = []
            for step in (1e-6, -1e-6):
                before = float(flat[place])
                flat[place] = before + step
                values.append(float(objective(batch)["loss"].detach()))
                flat[place] = before
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_a_dead_leaf_and_a_sure_row_keep_the_loss_and_its_gradient_finite():
    log_s = torch.log_softmax(torch.tensor([[800.0, 0.0, -800.0], [0.0, 0.0, 0.0]]), dim=1).requires_grad_()
    log_t = torch.log_softmax(torch.tensor([[-800.0, 0.0, 800.0], [0.0, 0.0, 0.0]]), dim=1)
    log_pk = log_marginal(torch.tensor([1.0, 0.0, 0.0]))
    loss = pair_loss(log_s, log_t, log_pk, beta=0.6).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_s.grad).all()


def test_a_rank_without_rows_returns_zero_and_zero_gradients():
    for kind, name in ((Temi, "temi"), (Icon, "icon")):
        objective = kind(inputs(name))
        objective.initialize(torch.randn(60, 5, generator=torch.Generator().manual_seed(2)))
        nobody = minibatch(0)
        loss = objective(nobody)["loss"]
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(float(p.grad.abs().max()) == 0.0 for p in objective.parameters() if p.requires_grad)
        sums = objective.step_sums(nobody)
        assert float(sums.abs().max()) == 0.0


def test_the_marginals_follow_the_steps_and_the_best_head_has_the_least_loss():
    objective = Temi(inputs("temi", num_heads=2, marginal_momentum=0.5))
    objective.initialize(torch.randn(60, 5, generator=torch.Generator().manual_seed(2)))
    before, batch = objective.marginals.clone(), minibatch()
    objective(batch)
    w = batch.weights_N.double()
    with torch.no_grad():
        means = [w @ t(batch.x_ND).exp().double() / w.sum() for t in objective.labeling_heads()]
    objective.after_step(objective.step_sums(batch))
    torch.testing.assert_close(objective.marginals, 0.5 * before + 0.5 * torch.stack(means))
    for losses, best in ((torch.tensor([3.0, 2.0, 1.0]), 1), (torch.tensor([1.0, 2.0, 1.0]), 0)):
        objective.losses.copy_(losses)
        torch.testing.assert_close(
            objective.predictor().head.prototypes, objective.labeling_heads()[best].prototypes.data
        )


def by_hand(kind):
    """Return an objective of two leaves, toward (2, 1) and (-2, -1), and sharp probabilities."""
    objective = kind(inputs(kind.__name__.lower(), dim=2, leaves=2, debiasing=0.0))
    for head in (objective.labeling_heads()[0], objective.last_best):
        head.start_at_centers(torch.zeros(2), 0.01, torch.tensor([[2.0, 1.0], [-2.0, -1.0]]))
    return objective


@pytest.mark.parametrize("kind", [Temi, Icon])
def test_the_numbers_of_a_pass_are_shares_of_the_weight_not_of_the_rows(kind):
    objective = by_hand(kind)
    x, weights = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]), torch.tensor([3.0, 1.0, 0.5])
    first = run_pass(objective.refresh(0, 0, 1), [Minibatch(torch.arange(3), x, weights, None, 0)], lambda sums: sums)
    # Rows 0 and 2 share a leaf: 3.5 of 4.5.
    assert first["changed"] == 1.0 and first["empty"] == 0
    assert first["largest_share"] == pytest.approx(3.5 / 4.5) and first["top_q"] == pytest.approx(1.0)
    np.testing.assert_allclose(objective.marginals[0], [3.5 / 4.5, 1.0 / 4.5], atol=1e-12)
    # The leaves turn to (2, -1) and (-2, 1): row 0 alone goes to the other one, 3 of 4.5 by weight, one row of three.
    objective.labeling_heads()[0].start_at_centers(torch.zeros(2), 0.01, torch.tensor([[2.0, -1.0], [-2.0, 1.0]]))
    second = run_pass(objective.refresh(1, 0, 1), [Minibatch(torch.arange(3), x, weights, None, 0)], lambda sums: sums)
    assert second["changed"] == pytest.approx(3.0 / 4.5)
    assert second["largest_share"] == pytest.approx(4.0 / 4.5)


def test_a_leaf_whose_rows_weigh_nothing_is_empty():
    objective = by_hand(Icon)
    x, weights = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1.0, 0.0])
    numbers = run_pass(objective.refresh(0, 0, 1), [Minibatch(torch.arange(2), x, weights, None, 0)], lambda s: s)
    assert numbers["empty"] == 1 and numbers["largest_share"] == 1.0


def test_a_negative_of_weight_two_counts_as_two_rows():
    (phi, _), (others, _) = probabilities(5, 3, 1), probabilities(4, 3, 2)
    phi, others, pk = torch.from_numpy(phi), torch.from_numpy(others), torch.full((3,), 1 / 3, dtype=torch.float64)
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    weighted = negative_loss(phi, others, pk, 0.6, weights)
    torch.testing.assert_close(weighted, negative_loss(phi, torch.cat([others, others[:1]]), pk, 0.6))


@pytest.mark.parametrize("kind", [Temi, Icon])
def test_heads_start_alike_from_a_row_of_weight_two_and_from_two_rows(kind):
    sample = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    weights = torch.ones(60)
    weights[:20] = 2.0
    weighted, repeated = (kind(inputs(kind.__name__.lower())) for _ in range(2))
    weighted.initialize(sample, weights)
    repeated.initialize(torch.cat([sample, sample[:20]]))
    torch.testing.assert_close(weighted.heads[0].mean, repeated.heads[0].mean)
    torch.testing.assert_close(weighted.heads[0].temperature, repeated.heads[0].temperature, rtol=1e-4, atol=0)
    plain = kind(inputs(kind.__name__.lower()))
    plain.initialize(sample)
    assert not torch.allclose(weighted.heads[0].mean, plain.heads[0].mean, atol=1e-3)


def test_the_temperature_is_calibrated_to_the_mean_largest_probability():
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    head = Head(20, [], 50)
    head.start_at_centers(x.mean(dim=0), 1.0, x[:50])
    head.temperature.fill_(calibrated_temperature(head, x, target_top_p=0.4))
    assert float(head(x).exp().max(dim=1).values.mean().detach()) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("hidden", [(), (9, 6)])
def test_a_predictor_labels_a_row_alike_in_any_company_and_survives_saving(hidden):
    head = Head(12, hidden, 40)
    head.start_at_random(torch.full((12,), 0.1), 0.1, torch.Generator().manual_seed(0))
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    predictor = HeadPredictor(head)
    leaves, top = predictor.best(x, 2)
    expected = head.double()(x.double()).detach()
    np.testing.assert_array_equal(leaves, expected.topk(2, dim=1).indices)
    np.testing.assert_allclose(top, expected.topk(2, dim=1).values.exp(), rtol=1e-4)
    alone = torch.cat([predictor.best(x[i : i + 1], 2)[0] for i in range(200)])
    np.testing.assert_array_equal(alone, leaves)
    again = HeadPredictor.from_tensors({name: t.clone() for name, t in predictor.tensors().items()})
    np.testing.assert_array_equal(again.best(x, 2)[0], leaves)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    np.testing.assert_array_equal(order[predictor.reordered(order).best(x, 2)[0]], leaves)


def test_equal_prototypes_give_the_lower_leaf():
    head = Head(4, [], 3)
    head.start_at_centers(torch.zeros(4), 0.1, torch.ones(3, 4))
    leaves, top = HeadPredictor(head).best(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), 2)
    np.testing.assert_array_equal(leaves, np.tile([0, 1], (9, 1)))
    np.testing.assert_allclose(top, 1 / 3, rtol=1e-6)


def graph(x, num=5):
    """Return the keys of the neighbors of each row, the rows' keys being their numbers."""
    keys, rows = np.arange(len(x)), prepare(x, "cosine")
    return search(keys, rows, Shard.from_rows(keys, rows), Neighbors.none(len(x), num), metric="cosine").keys_QM


def paired_rows(ranks, x):
    mine = np.sort(shard(ranks, len(x)))
    whole = graph(x)
    chunks = [
        Batch(torch.from_numpy(p), torch.from_numpy(x[p]), torch.ones(len(p)), None, torch.from_numpy(whole[p]))
        for p in np.array_split(mine, 3)
    ]
    return ResidentRows.collect(iter(chunks), x.shape[1], torch.float32, ranks)


def fit_pairs(ranks, wanted, folder=None, stop_after=None):
    rows = paired_rows(ranks, blobs()[0])
    context = PlainContext(ranks.rank, ranks.world_size, folder, stop_after)
    try:
        fitted = fit(rows, Preprocess("l2", [(0, 12, 1.0)]), wanted, context, NeighborPairs(rows, ranks))
    except KeyboardInterrupt:
        return None
    refine = [h for h in fitted.history if h["phase"] == "refine"]
    return {
        "losses": np.array([h["loss"] for h in refine]),
        "changed": [h["changed"] for h in refine],
        "weights": fitted.leaves.weights_K.numpy(),
        "centers": fitted.clustering.centers_KL.numpy(),
        "tensors": {name: t.numpy() for name, t in fitted.clustering.predictor.tensors().items()},
        "baselines": sorted(fitted.baselines),
    }


OBJECTIVES = {"temi": settings("temi", num_heads=2), "icon": settings("icon")}


@pytest.fixture(scope="module")
def on_one_rank():
    return {name: run_ranks(1, fit_pairs, wanted)[0] for name, wanted in OBJECTIVES.items()}


@pytest.mark.parametrize("objective", ["temi", "icon"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_loss_curve_is_the_same_on_any_number_of_ranks(world_size, objective, on_one_rank):
    alone = on_one_rank[objective]
    results = run_ranks(world_size, fit_pairs, OBJECTIVES[objective])
    for result in results:
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=2e-4)
        # Sorted: heads that end alike have losses equal up to rounding, and either may be the best.
        np.testing.assert_allclose(np.sort(result["weights"]), np.sort(alone["weights"]), atol=2)
        np.testing.assert_array_equal(result["centers"], results[0]["centers"])
    assert alone["losses"][-1] < alone["losses"][0] and alone["changed"][0] == 1.0
    assert alone["weights"].sum() == 1000 and alone["baselines"] == ["raw_kmeans"]


@pytest.mark.parametrize("objective", ["temi", "icon"])
def test_a_resumed_fit_ends_as_an_unbroken_one(objective, on_one_rank, tmp_path):
    for stop_after in (1, 3):
        folder = tmp_path / str(stop_after)
        assert run_ranks(1, fit_pairs, OBJECTIVES[objective], folder, stop_after) == [None]
        resumed = run_ranks(1, fit_pairs, OBJECTIVES[objective], folder)[0]
        for name, tensor in on_one_rank[objective]["tensors"].items():
            np.testing.assert_array_equal(resumed["tensors"][name], tensor)
        np.testing.assert_array_equal(resumed["changed"], on_one_rank[objective]["changed"])


def test_leaves_are_those_of_the_blobs(on_one_rank):
    for result in on_one_rank.values():
        assert (np.sort(result["weights"]) > 100).all()


def positives_of(ranks, seed):
    rows = paired_rows(ranks, blobs()[0])
    pairs = NeighborPairs(rows, ranks)
    found = {}
    for step in rows.steps(64, 3):
        second = pairs(step.batch, seed)
        found |= dict(zip(step.batch.keys_N.tolist(), zip(second.keys_N.tolist(), second.x_ND.tolist(), strict=True)))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_positive_is_a_neighbor_and_the_same_one_on_any_number_of_ranks(world_size):
    x = blobs()[0]
    alone = positives_of(Ranks(), 9)
    assert len(alone) == 1000
    neighbors = graph(x)
    for key, (second, values) in alone.items():
        assert second in neighbors[key]
        np.testing.assert_array_equal(np.float32(values), x[second])
    together = {}
    for part in run_ranks(world_size, positives_of, 9):
        together |= part
    assert together == alone
    other = positives_of(Ranks(), 10)
    assert 0.1 < np.mean([other[k][0] == alone[k][0] for k in alone]) < 0.3  # one of five neighbors


def with_a_stranger(ranks):
    rows = paired_rows(ranks, blobs()[0])
    rows.neighbors_NM[:] = 5000
    try:
        for step in rows.steps(64, 3):
            NeighborPairs(rows, ranks)(step.batch, 0)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_neighbor_that_is_no_row_is_refused_on_all_ranks(world_size):
    for message in run_ranks(world_size, with_a_stranger):
        assert "key 5000: they were searched among other rows" in message


def test_rows_without_neighbors_are_refused():
    rows = ResidentRows(torch.ones(3, 2), torch.arange(3), torch.ones(3), Ranks())
    with pytest.raises(ValueError, match="without their neighbors"):
        NeighborPairs(rows, Ranks())


def test_rows_keep_their_neighbors_when_chunks_interleave():
    x, whole = blobs(60)[0], np.arange(120).reshape(60, 2)
    order = [np.arange(0, 60, 2), np.arange(1, 60, 2)]
    chunks = [
        Batch(torch.from_numpy(p), torch.from_numpy(x[p]), torch.ones(len(p)), None, torch.from_numpy(whole[p]))
        for p in order
    ]
    rows = ResidentRows.collect(iter(chunks), 12, torch.float32, Ranks())
    np.testing.assert_array_equal(rows.neighbors_NM, whole)


def test_heads_after_the_first_start_elsewhere():
    objective = Temi(inputs("temi", num_heads=3))
    objective.initialize(torch.randn(60, 5, generator=torch.Generator().manual_seed(2)))
    first, *others = (copy.deepcopy(h.prototypes.data) for h in objective.heads)
    assert all(not torch.allclose(first, other) for other in others)
