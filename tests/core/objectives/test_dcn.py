"""DCN: its loss, its two ways to move the centers, and leaves that die."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.objectives.dcn import FIRST_COUNT, Dcn
from raydc.core.objectives.kernel import Kernel
from raydc.core.objectives.objective import run_pass
from tests.core.objectives.minibatches import assert_same_gradients, forward_by_hand, minibatch, network, weights_of
from tests.core.ranks import SETTINGS, blobs, fit_blobs, run_ranks, with_objective


def settings(**changes):
    return with_objective("dcn", refine=replace(SETTINGS.refine, **changes))


def plain_dcn(centers, **changes):
    """Return a DCN whose code is the row itself."""
    net = network()
    net.encoder, net.decoder = torch.nn.Identity(), torch.nn.Identity()
    return Dcn(net, centers, Kernel(), replace(SETTINGS.refine, **changes))


def test_the_loss_and_its_gradients_are_those_computed_by_hand_in_float64():
    generator = torch.Generator().manual_seed(0)
    net = network()
    x, w = torch.randn(20, 6, generator=generator), torch.rand(20, generator=generator)
    centers = torch.randn(4, 3, generator=generator)
    dcn = Dcn(net, centers, Kernel(), replace(SETTINGS.refine, distance_weight=0.3))
    ours = dcn(minibatch(x, w))
    encoder, decoder = weights_of(net.encoder), weights_of(net.decoder)
    z = forward_by_hand(x.double(), encoder)
    squared = ((forward_by_hand(z, decoder) - x.double()) ** 2).sum(1)
    apart = ((z[:, None] - centers.double()[None]) ** 2).sum(-1).min(1).values
    expected = (w.double() * (squared + 0.3 * apart)).sum() / 6
    assert float(ours["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parts = float(ours["reconstruction"]) + 0.3 * float(ours["distance"])
    assert float(ours["loss"].detach()) == pytest.approx(parts, rel=1e-6)
    by_hand = [p for pair in encoder + decoder for p in pair]
    assert_same_gradients(ours["loss"], list(net.parameters()), expected, by_hand)
    assert not any(name == "centers" for name, _ in dcn.named_parameters())


def step(dcn, x, w=None):
    dcn.after_step(dcn.step_sums(minibatch(x, w)))


def test_counted_centers_move_as_if_one_row_came_after_the_other():
    x, labels = blobs(60)
    centers = np.stack([x[labels == k].mean(0) for k in range(6)]).astype(np.float32) + 0.1
    dcn = plain_dcn(torch.from_numpy(centers), centroid_update="counts")
    expected, counts = centers.astype(np.float64), np.full(6, FIRST_COUNT)
    for part in (x[:30], x[30:]):
        step(dcn, torch.from_numpy(part))
        for row in part.astype(np.float64):
            k = ((row - expected) ** 2).sum(1).argmin()
            counts[k] += 1
            expected[k] -= (expected[k] - row) / counts[k]
    np.testing.assert_allclose(dcn.means.numpy(), expected, rtol=1e-9)
    np.testing.assert_array_equal(dcn.moving.numpy(), counts)


def test_averaged_centers_of_three_rows_by_hand():
    dcn = plain_dcn(torch.tensor([[0.0], [10.0]]), centroid_decay=0.5, batch_rows=4)
    rows = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    run_pass(dcn.refresh(0, 0, 1), [minibatch(rows)], lambda sums: sums)
    # The averages start from all rows: means 1 and 11, two rows each in an average step of four.
    assert dcn.centers.flatten().tolist() == [1.0, 11.0]
    assert dcn.moving.tolist() == [2.0, 2.0]
    step(dcn, torch.tensor([[3.0], [5.0], [5.0]]), torch.tensor([1.0, 1.0, 2.0]))
    # Weight .5 * 2 + .5 * 4 = 3, sum .5 * 2 + .5 * 18 = 10. The other leaf got no row: it stays, its weight halves.
    assert dcn.centers[0].item() == pytest.approx(10 / 3)
    assert dcn.centers[1].item() == 11.0
    assert dcn.moving.tolist() == [3.0, 1.0]


def test_a_row_of_weight_two_moves_a_center_like_two_rows():
    x, _ = blobs(40)
    once, twice = (plain_dcn(torch.from_numpy(x[:5]), centroid_update="counts") for _ in range(2))
    weights = torch.ones(40)
    weights[7] = 2.0
    step(once, torch.from_numpy(x), weights)
    step(twice, torch.from_numpy(np.concatenate([x, x[7:8]])))
    torch.testing.assert_close(once.means, twice.means, rtol=1e-12, atol=0)


def sums_of_a_shard(ranks, centers, x):
    dcn = plain_dcn(torch.from_numpy(centers), num_epochs=10, recluster_epochs=None)
    dcn.refresh(0, 0, 1)
    dcn.after_step(ranks.sum(dcn.step_sums(minibatch(torch.from_numpy(x[ranks.rank :: ranks.world_size])))))
    dcn.refresh(1, 0, 1)
    return dcn.centers.numpy()


def test_a_dead_leaf_gets_the_same_new_center_on_every_rank():
    x, _ = blobs(200)
    centers = x[:4].copy()
    centers[2] = 1e3
    alone = run_ranks(1, sums_of_a_shard, centers, x)[0]
    assert np.abs(alone[2]).max() < 100
    for found in run_ranks(2, sums_of_a_shard, centers, x):
        np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_no_leaf_gets_a_new_center_in_the_last_epochs():
    x, _ = blobs(200)
    dcn = plain_dcn(torch.cat([torch.from_numpy(x[:3]), torch.full((1, 12), 1e3)]), num_epochs=10)
    dcn.refresh(0, 0, 1)
    step(dcn, torch.from_numpy(x))
    dcn.refresh(8, 0, 1)
    assert float(dcn.centers[3].min()) == 1e3


def test_lloyd_moves_the_centers_every_so_many_epochs_and_has_the_last_word():
    result = run_ranks(1, fit_blobs, settings(num_epochs=4, recluster_epochs=2, distance_weight=30.0))[0]
    refine = [h for h in result["history"] if h["phase"] == "refine"]
    # A pass over all rows starts the averages in the first epoch and after k-means in the third.
    assert ["empty" in h for h in refine] == [True, False, True, False]
    assert (result["weights"] > 0).all()
    assert refine[-1]["distance"] < refine[0]["distance"]
