"""The watch for collapse: the effective rank by hand, on any number of ranks, and the signs of it."""

import math

import pytest
import torch
from torch import nn

from raydc.core.training.collapse import SpaceWatch, WatchSettings, effective_rank, signs
from raydc.core.training.collectives import Ranks
from tests.core.ranks import fit_blobs, run_ranks

SETTINGS = WatchSettings(min_effective_rank=1.5, min_rank_share=0.3, max_empty_share=0.2, max_largest_share=0.5)


def sums_of(z):
    """Return the sum of v v^T over rows v = (1, z)."""
    v = torch.cat([torch.ones(len(z), 1), z], dim=1).double()
    return v.T @ v


def test_the_effective_rank_by_hand():
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert effective_rank(sums_of(corners)) == pytest.approx(2.0)
    # Variances 4 and 1: shares .8 and .2.
    expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert effective_rank(sums_of(corners * torch.tensor([2.0, 1.0]) + 100)) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(sums_of(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))) == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(sums_of(torch.full((5, 3), 0.1))) == 0.0


def test_only_training_steps_are_watched():
    layer = nn.Linear(3, 2)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    with SpaceWatch(layer) as watch:
        z = layer(x).detach()
        with torch.no_grad():
            layer(100 * x)
    layer(100 * x)
    assert watch.effective_rank(Ranks()) == pytest.approx(effective_rank(sums_of(z)))
    assert SpaceWatch(layer).effective_rank(Ranks()) is None
    assert SpaceWatch(None).effective_rank(Ranks()) is None


def test_of_many_steps_every_nth_is_watched_also_where_some_have_no_rows():
    layer = nn.Linear(3, 2)
    batches = torch.randn(260, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()
    batches = [x[:0] if n % 3 == 1 else x for n, x in enumerate(batches)]
    with SpaceWatch(layer, num_steps=260) as watch:
        codes = [layer(x).detach() for x in batches]
    watched = torch.cat(codes[::4])
    assert watch.effective_rank(Ranks()) == pytest.approx(effective_rank(sums_of(watched)))


def test_every_epoch_of_a_fit_has_the_rank_of_its_space_on_any_number_of_ranks():
    histories = [run_ranks(n, fit_blobs)[0]["history"] for n in (1, 2)]
    one, two = ([h["effective_rank"] for h in history if h["phase"] != "kmeans"] for history in histories)
    assert len(one) == 5 and all(1.0 < rank <= 5.0 for rank in one)
    assert two == pytest.approx(one, rel=1e-3)


def entry(phase, epoch, **values):
    """Return a history entry."""
    return {"phase": phase, "epoch": epoch, **values}


def test_a_healthy_history_has_no_signs():
    history = [entry("pretrain", 0, effective_rank=5.0), entry("kmeans", 0), entry("refine", 0, effective_rank=4.0)]
    history += [entry("refine", 1, effective_rank=4.0, empty=1, largest_share=0.3)]
    assert signs(history, 10, SETTINGS) == []
    assert signs([], 10, SETTINGS) == []
    # Of two leaves, one may well hold most rows.
    assert signs([entry("refine", 0, largest_share=0.9)], 2, SETTINGS) == []


def test_each_sign_names_the_epoch_in_which_it_is_worst():
    history = [entry("pretrain", 0, effective_rank=8.0), entry("refine", 0, effective_rank=2.0, empty=4)]
    history += [entry("refine", 1, effective_rank=3.0, empty=3, largest_share=0.62)]
    assert signs(history, 10, SETTINGS) == [
        "the effective rank of the space fell from 8.0 to 2.0 in refine epoch 1",
        "4 of 10 leaves were empty in refine epoch 1",
        "one leaf held 62 % of the rows in refine epoch 2",
    ]
    flat = [entry("pretrain", 0, effective_rank=1.1)]
    assert signs(flat, 10, SETTINGS) == ["the space has an effective rank of 1.10 in pretrain epoch 1"]
