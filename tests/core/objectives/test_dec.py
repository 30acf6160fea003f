"""DEC and IDEC: the target, the divergence and its gradient, the kernel."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raydc.core.models.autoencoder import Autoencoder
from raydc.core.objectives.dec import Dec, Target, divergence, log_target, summed_divergence
from raydc.core.objectives.idec import Idec
from raydc.core.objectives.kernel import Kernel, calibrate, log_soft_assign, top_soft_assign
from raydc.core.objectives.objective import Minibatch, run_pass
from raydc.core.objectives.reconstruction import Reconstruction, corrupt
from raydc.core.search.nearest import SquaredDistances, squared_distances
from tests.core.objectives.minibatches import forward_by_hand, network, weights_of
from tests.core.ranks import blobs, make_rows, run_ranks

KERNEL = Kernel(alpha=3.0, scale=0.7)


def soft_assign_by_hand(z, centers, kernel):
    """Float64, by the definition."""
    squared = ((z[:, None, :].astype(np.float64) - centers[None]) ** 2).sum(-1)
    q = (1 + squared / (kernel.alpha * kernel.scale)) ** (-(kernel.alpha + 1) / 2)
    return q / q.sum(1, keepdims=True)


def target_by_hand(q):
    """The paper's target from the full N x K matrix."""
    p = q**2 / q.sum(0)
    return p / p.sum(1, keepdims=True)


def test_soft_assignment_of_three_points_and_two_centers():
    z = torch.tensor([[0.0], [1.0], [3.0]])
    q = log_soft_assign(z, torch.tensor([[0.0], [2.0]]), Kernel()).exp()
    # 1 / (1 + d^2): (1, 1/5), (1/2, 1/2), (1/10, 1/2), each divided by its sum.
    np.testing.assert_allclose(q, [[5 / 6, 1 / 6], [0.5, 0.5], [1 / 6, 5 / 6]], rtol=1e-6)


def streamed_target(ranks, x, centers, streamed):
    rows = make_rows(ranks, x, streamed=streamed)
    dec = Dec(nn.Identity(), torch.from_numpy(centers), KERNEL)
    run_pass(dec.refresh(0, 0, 8), (minibatch(b) for b in rows.blocks(128)), ranks.sum)
    targets = {}
    for step in rows.steps(64, epoch_seed=1):
        p = dec.log_target(minibatch(step.batch))(slice(None)).exp()
        targets |= dict(zip(step.batch.keys_N.tolist(), p.numpy(), strict=True))
    return targets, dec.snapshot.frequencies_K.numpy()


def minibatch(batch):
    return Minibatch(batch.keys_N, batch.x_ND, batch.weights_N, batch.positions_N, seed=0)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_target_from_a_snapshot_and_f_is_that_of_the_full_matrix(world_size, streamed):
    x, _ = blobs(500)
    centers = x[:7]
    q = soft_assign_by_hand(x, centers, KERNEL)
    expected = target_by_hand(q)
    targets: dict = {}
    for part, f in run_ranks(world_size, streamed_target, x, centers, streamed):
        targets |= part
        np.testing.assert_allclose(f, q.sum(0), rtol=1e-6)
    assert sorted(targets) == list(range(500))
    np.testing.assert_allclose(np.stack([targets[i] for i in range(500)]), expected, atol=1e-6)


def test_the_gradient_of_the_divergence_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    c = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    kernel = Kernel(alpha=2.5, scale=1.3)
    log_q = log_soft_assign(z, c, kernel)
    log_p = log_target(log_q.detach(), log_q.detach().exp().sum(0))
    summed_divergence(z, c, torch.ones(20, dtype=torch.float64), kernel, log_p.__getitem__).backward()
    unit = kernel.alpha * kernel.scale
    pull = (log_p.exp() - log_q.exp()) / (1 + squared_distances(z, c) / unit)
    apart = z[:, None, :] - c[None, :, :]
    factor = (kernel.alpha + 1) / unit
    torch.testing.assert_close(z.grad, factor * (pull[:, :, None] * apart).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c.grad, -factor * (pull[:, :, None] * apart).sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_summed_divergence_in_blocks_is_that_of_the_whole_batch(offset):
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(50, 6, generator=generator) + offset
    c = torch.randn(9, 6, generator=generator) + offset
    weights = torch.rand(50, generator=generator)
    log_p = torch.log_softmax(torch.randn(50, 9, generator=generator, dtype=torch.float64), dim=1)
    asked = []

    def log_p_of(rows):
        asked.append(rows)
        return log_p[rows].float()

    ours_z, ours_c = z.clone().requires_grad_(), c.clone().requires_grad_()
    ours = summed_divergence(ours_z, ours_c, weights, KERNEL, log_p_of, block_rows=11)
    (3.0 * ours).backward()
    assert len(asked) == 5
    z, c = z.double().requires_grad_(), c.double().requires_grad_()
    expected = (weights.double() * divergence(log_p, log_soft_assign(z, c, KERNEL))).sum()
    (3.0 * expected).backward()
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(ours_z.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_c.grad.double(), c.grad, rtol=1e-4, atol=1e-4)


def test_the_summed_divergence_keeps_nothing_of_rows_times_leaves():
    z, c = torch.randn(40, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    log_p = torch.log_softmax(torch.randn(40, 7), dim=1)
    total = summed_divergence(z, c, torch.ones(40), KERNEL, log_p.__getitem__)
    assert [tuple(kept.shape) for kept in total.grad_fn.saved_tensors] == [(40, 3), (7, 3)]


def test_the_divergence_is_zero_where_the_two_are_equal_and_positive_elsewhere():
    log_q = torch.log_softmax(torch.randn(50, 6), dim=1)
    assert divergence(log_q, log_q).abs().max() < 1e-6
    assert (divergence(log_target(log_q, torch.ones(6, dtype=torch.float64)), log_q) >= -1e-6).all()


def test_the_losses_and_their_gradients_are_those_computed_by_hand_in_float64():
    generator = torch.Generator().manual_seed(0)
    net = network()
    x, w = torch.randn(20, 6, generator=generator), torch.rand(20, generator=generator)
    centers = torch.randn(4, 3, generator=generator)
    p = torch.softmax(torch.randn(20, 4, generator=generator, dtype=torch.float64), dim=1)
    encoder, decoder, c = weights_of(net.encoder), weights_of(net.decoder), centers.double().requires_grad_()
    z = forward_by_hand(x.double(), encoder)
    similarity = (1 + ((z[:, None] - c[None]) ** 2).sum(-1) / (3.0 * 0.7)) ** -2.0
    q = similarity / similarity.sum(1, keepdim=True)
    kl = (w.double()[:, None] * p * (p / q).log()).sum()
    reconstruction = (w.double() * ((forward_by_hand(z, decoder) - x.double()) ** 2).mean(1)).sum()
    dec = Dec(net.encoder, centers, KERNEL)
    idec = Idec(net, centers, KERNEL, gamma=0.3)
    for model, expected, layers in ((dec, kl, encoder), (idec, reconstruction + 0.3 * kl, encoder + decoder)):
        ours = model.loss(x, w, p.log().float().__getitem__)["loss"]
        assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        trained = [*(t for m in linear for t in (m.weight, m.bias)), model.centers]
        by_hand = torch.autograd.grad(expected, [*(t for pair in layers for t in pair), c], retain_graph=True)
        for a, b in zip(torch.autograd.grad(ours, trained), by_hand, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_divergence_passes_finite_differences():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(torch.randn(8, 4, generator=generator, dtype=torch.float64), dim=1)
    weights = torch.rand(8, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z, c: summed_divergence(z, c, weights, KERNEL, log_p.__getitem__), (z, c))


def test_idec_with_gamma_zero_is_the_autoencoder():
    torch.manual_seed(0)
    autoencoder = Autoencoder(12, (16,), 3)
    x = torch.from_numpy(blobs(64)[0])
    weights = torch.rand(64)
    idec = Idec(autoencoder, torch.randn(4, 3), KERNEL, gamma=0.0)
    log_p = torch.log_softmax(torch.randn(64, 4), dim=1)
    ours = idec.loss(x, weights, log_p.__getitem__)
    gradients = torch.autograd.grad(ours["loss"], list(autoencoder.parameters()) + [idec.centers])
    plain = Reconstruction(autoencoder)(x, weights, x)
    expected = torch.autograd.grad(plain["loss"], list(autoencoder.parameters()))
    assert float(ours["loss"].detach()) == float(plain["loss"].detach())
    for a, b in zip(gradients[:-1], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not gradients[-1].any()


def test_gamma_multiplies_the_divergence_only():
    torch.manual_seed(0)
    autoencoder = Autoencoder(12, (16,), 3)
    x, weights = torch.from_numpy(blobs(64)[0]), torch.ones(64)
    centers, log_p = torch.randn(4, 3), torch.log_softmax(torch.randn(64, 4), dim=1)
    sums = Idec(autoencoder, centers, KERNEL, gamma=0.3).loss(x, weights, log_p.__getitem__)
    assert float(sums["loss"].detach()) == pytest.approx(float(sums["reconstruction"]) + 0.3 * float(sums["kl"]))
    assert float(sums["kl"]) == pytest.approx(
        float(Dec(autoencoder.encoder, centers, KERNEL).loss(x, weights, log_p.__getitem__)["kl"])
    )


def test_a_constant_of_norm_100_on_every_row_leaves_q_unchanged():
    generator = torch.Generator().manual_seed(3)
    z = F.normalize(torch.randn(500, 64, generator=generator), dim=1)
    centers = F.normalize(torch.randn(20, 64, generator=generator), dim=1)
    offset = F.normalize(torch.randn(64, generator=generator), dim=0) * 100.0
    kernel, _ = calibrate(z, centers, target_top_q=0.5)
    here = log_soft_assign(z, centers, kernel).exp()
    there = log_soft_assign(z + offset, centers + offset, kernel).exp()
    assert (here - there).abs().max() < 1e-4


def test_calibration_leaves_no_distances_behind():
    z, centers = torch.randn(333, 4), torch.randn(7, 4)
    gc.disable()
    try:
        calibrate(z, centers, target_top_q=0.5)
        left = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (333, 7)]
    finally:
        gc.enable()
    assert not left


def test_the_kernel_is_calibrated_where_alpha_one_has_no_signal():
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(1000, 384, generator=generator), dim=1)
    own = centers[torch.randint(1000, (4000,), generator=generator)]
    noise = F.normalize(torch.randn(4000, 384, generator=generator), dim=1)
    z = F.normalize(0.6 * own + 0.8 * noise, dim=1)
    uncalibrated = log_soft_assign(z, centers, Kernel()).exp().max(dim=1).values.mean()
    assert 0.001 < uncalibrated < 0.003
    kernel, reached = calibrate(z, centers, target_top_q=0.5)
    top = log_soft_assign(z, centers, kernel).exp().max(dim=1).values.mean()
    assert kernel.alpha > 1 and 0.3 <= top <= 0.7
    assert reached == pytest.approx(float(top), abs=1e-3)


@pytest.mark.parametrize("target", [0.15, 0.3, 0.8])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_calibrated_kernel_reaches_the_target_by_the_logarithms_in_float64(target, weighted):
    generator = torch.Generator().manual_seed(1)
    z, centers = torch.randn(3000, 10, generator=generator), torch.randn(10, 10, generator=generator)
    weights = torch.rand(3000, generator=generator) + 0.1 if weighted else torch.ones(3000)
    kernel, reached = calibrate(z, centers, target_top_q=target, weights_N=weights)
    top = log_soft_assign(z.double(), centers.double(), kernel).exp().max(dim=1).values
    assert float(top @ weights.double() / weights.sum()) == pytest.approx(target, abs=1e-5)
    assert reached == pytest.approx(target, abs=1e-6)


def test_a_single_leaf_has_a_similarity_of_1_whatever_the_kernel():
    z, centers = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3)
    kernel, reached = calibrate(z, centers, target_top_q=0.5)
    assert reached == 1.0 and kernel.scale > 0


def test_a_fixed_alpha_that_cannot_reach_the_target_gets_no_singular_kernel():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(300, 8, generator=generator)
    z = centers.repeat(10, 1) + 0.5 * torch.randn(3000, 8, generator=generator)
    kernel, reached = calibrate(z, centers, target_top_q=0.6, alpha=1.0)
    width = float(squared_distances(z, centers).min(dim=1).values.mean())
    assert kernel.alpha == 1.0 and kernel.scale == pytest.approx(0.1 * width, rel=1e-5)
    assert reached < 0.5


@pytest.mark.parametrize("alpha", [1.0, 3.0, 2.5, 0.5, 1023.0])
def test_the_largest_similarity_is_that_of_the_logarithms(alpha):
    generator = torch.Generator().manual_seed(5)
    z, centers = torch.randn(200, 16, generator=generator) + 3.0, torch.randn(7, 16, generator=generator) + 3.0
    kernel, distances = Kernel(alpha, 4.0), SquaredDistances(centers)
    exact = ((z[:, None].double() - centers.double()) ** 2).sum(dim=2)
    torch.testing.assert_close(distances(z), exact.float(), rtol=1e-5, atol=1e-5)
    log_q = torch.log_softmax(-(alpha + 1) / 2 * torch.log1p(exact / (alpha * 4.0)), dim=1)
    expected = log_q.max(dim=1).values.exp().float()
    torch.testing.assert_close(top_soft_assign(distances(z), kernel), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        log_soft_assign(z, centers, kernel).max(dim=1).values.exp(), expected, rtol=1e-3, atol=1e-5
    )
    assert top_soft_assign(distances(z[:0]), kernel).shape == (0,)
    with pytest.raises(ValueError, match="rows have 3 dimensions, centers 16"):
        distances(z[:, :3])


def test_far_rows_keep_finite_logarithms():
    z = torch.tensor([[1e6, 0.0], [0.0, 0.0]])
    log_q = log_soft_assign(z, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), Kernel(alpha=1.0, scale=1e-6))
    assert torch.isfinite(log_q).all()


def test_rows_and_centers_of_different_width_are_refused():
    with pytest.raises(ValueError, match="rows have 3 dimensions, centers 2"):
        log_soft_assign(torch.zeros(1, 3), torch.zeros(1, 2), Kernel())


def test_corruption_hits_its_share_and_follows_the_row():
    x = torch.ones(2000, 50)
    keys = torch.arange(2000)
    noisy = corrupt(x, keys, share=0.2, seed=5)
    assert 0.79 < float(noisy.mean()) < 0.81
    order = torch.randperm(2000)
    torch.testing.assert_close(corrupt(x, keys[order], share=0.2, seed=5), noisy[order])
    assert not torch.equal(corrupt(x, keys, share=0.2, seed=6), noisy)
    columns = noisy.mean(dim=0)
    assert float(columns.min()) > 0.74 and float(columns.max()) < 0.85


def test_the_target_with_exponents_and_sizes_is_the_formula():
    generator = np.random.default_rng(0)
    q = generator.random((30, 5))
    q /= q.sum(1, keepdims=True)
    sizes = np.array([5.0, 1.0, 2.0, 1.0, 1.0])
    ours = log_target(
        torch.from_numpy(q).log(),
        torch.from_numpy(q.sum(0)),
        exponent=3.0,
        frequency_exponent=0.5,
        log_prior_K=torch.from_numpy(sizes).log(),
    ).exp()
    p = q**3 * (sizes / q.sum(0)) ** 0.5
    np.testing.assert_allclose(ours, p / p.sum(1, keepdims=True), rtol=1e-9)


def test_without_the_frequencies_a_target_leaves_the_sizes_alone():
    q = torch.tensor([[0.6, 0.4], [0.4, 0.6]]).log()
    f = torch.tensor([9.0, 1.0], dtype=torch.float64)
    even = log_target(q, f, frequency_exponent=0.0).exp()
    torch.testing.assert_close(even, torch.tensor([[9.0, 4.0], [4.0, 9.0]]) / 13.0)
    with_sizes = log_target(q, f, log_prior_K=f.log()).exp()
    torch.testing.assert_close(with_sizes, even)


def test_given_sizes_go_to_the_leaves_by_rank():
    f = torch.tensor([10.0, 30.0, 20.0], dtype=torch.float64)
    assert Target(size_prior=[1.0, 4.0, 2.0]).log_prior(f).exp().tolist() == pytest.approx([1.0, 4.0, 2.0])
    assert Target(size_prior="kmeans").log_prior(f).exp().tolist() == pytest.approx([10.0, 30.0, 20.0])
    assert not Target(size_prior="uniform").log_prior(f).any()


def test_a_given_scale_of_the_kernel_is_kept_and_the_least_alpha_that_reaches_the_target_goes_with_it():
    z, centers = torch.from_numpy(blobs(400)[0]), torch.from_numpy(blobs(6)[0])
    kernel, top = calibrate(z, centers, target_top_q=0.9, alpha=1.0, scale=1.0)
    assert kernel == Kernel(1.0, 1.0)
    assert top == pytest.approx(float(log_soft_assign(z, centers, kernel).exp().max(1).values.mean()), abs=1e-5)
    chosen, reached = calibrate(z, centers, target_top_q=0.8, scale=1.0)
    below, missed = calibrate(z, centers, target_top_q=0.8, alpha=(chosen.alpha - 1) / 2, scale=1.0)
    assert chosen.scale == below.scale == 1.0 and missed < 0.8 <= reached
