"""Pretraining layer by layer: the loss of each pair, the hashed dropout, and the place of each layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.objectives.layer import LayerPair
from tests.core.objectives.minibatches import assert_same_gradients, forward_by_hand, network, weights_of
from tests.core.ranks import SETTINGS, fit_blobs, run_ranks

LAYERWISE = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, layerwise=True, num_epochs=1, layer_epochs=3))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_loss_of_a_pair_is_the_one_computed_by_hand(layer):
    net = network(hidden=(8, 7))
    x, w, keys = torch.randn(12, 6), torch.rand(12), torch.arange(12)
    pair = LayerPair(net, layer, share=0.0)
    ours = pair(x, w, keys, 3)["loss"]
    encoder, decoder = weights_of(net.encoder), weights_of(net.decoder)
    clean = forward_by_hand(x.double(), encoder[:layer], last_is_linear=False).detach()
    own = [encoder[layer], decoder[2 - layer]]
    h = forward_by_hand(clean, own[:1], last_is_linear=layer == 2)
    y = forward_by_hand(h, own[1:], last_is_linear=layer == 0)
    expected = (w.double() * ((y - clean) ** 2).mean(1)).sum()
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    trained = list(pair.parameters())
    assert {id(p) for p in trained} == {id(p) for m in (pair.down, pair.up) for p in m.parameters()}
    assert_same_gradients(ours, trained, expected, [p for pair in own for p in pair])


class Seen:
    """Records what a layer is given."""

    def __init__(self, layer):
        self.inputs = []
        layer.register_forward_pre_hook(lambda module, given: self.inputs.append(given[0].detach()))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_neither_the_rows_nor_the_code_are_dropped(layer):
    net = network(dim=6, hidden=(40, 50), latent=3)
    pair = LayerPair(net, layer, share=0.2)
    down, up = Seen(pair.down), Seen(pair.up)
    x, keys = torch.rand(300, 6) + 0.5, torch.arange(300)
    pair(x, torch.ones(300), keys, 3)
    clean = net.encoder[: 2 * layer](x).detach()
    hidden = net.encoder[: 2 * layer + 1](x).detach()
    given, answered = down.inputs[0], up.inputs[0]
    if layer == 0:
        torch.testing.assert_close(given, x)
    else:
        kept = given != 0
        torch.testing.assert_close(given[kept], (clean / 0.8)[kept])
        assert float((clean[~kept] != 0).sum() / (clean != 0).sum()) == pytest.approx(0.2, abs=0.02)
    if layer == 2:
        torch.testing.assert_close(answered, pair.down(given).detach())
    else:
        active = torch.relu(hidden if layer == 0 else pair.down(given).detach())
        share = float(((answered == 0) & (active > 0)).sum() / (active > 0).sum())
        assert share == pytest.approx(0.2, abs=0.02)


def test_the_dropout_follows_the_row_into_any_batch():
    net = network(hidden=(8,))
    pair = LayerPair(net, 1, share=0.2)
    x, w, keys = torch.randn(30, 6), torch.ones(30), torch.arange(30)
    order = torch.randperm(30)
    whole = pair(x, w, keys, 3)["loss"]
    parts = [pair(x[o], w[o], keys[o], 3)["loss"] for o in order.split(7)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    assert float(pair(x, w, keys, 4)["loss"].detach()) != float(whole.detach())


def test_each_layer_learns_in_its_own_epochs_and_then_all_of_them():
    result = run_ranks(1, fit_blobs, LAYERWISE)[0]
    layers = [h for h in result["history"] if h["phase"] == "layers"]
    assert [h["layer"] for h in layers] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [h["epoch"] for h in layers] == list(range(9))
    for first, last in ((0, 2), (3, 5), (6, 8)):
        assert layers[last]["loss"] < layers[first]["loss"]
    assert [h["phase"] for h in result["history"][9:11]] == ["pretrain", "kmeans"]


@pytest.mark.parametrize("stop_after", [2, 3, 5, 9])
def test_a_fit_stopped_in_a_layer_ends_as_an_unbroken_one(stop_after, tmp_path):
    whole = run_ranks(1, fit_blobs, LAYERWISE)[0]
    run_ranks(1, fit_blobs, LAYERWISE, False, tmp_path, stop_after)
    resumed = run_ranks(1, fit_blobs, LAYERWISE, False, tmp_path)[0]
    assert len(resumed["reports"]) == len(whole["reports"]) - stop_after
    np.testing.assert_array_equal(resumed["centers"], whole["centers"])
