"""The fit on 1, 2 and 4 ranks, resident and streamed, unbroken and resumed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydc.core.models.autoencoder import perceptron, precision
from raydc.core.models.preprocess import Preprocess
from raydc.core.objectives.snapshot import compact
from raydc.core.training.collectives import Ranks
from raydc.core.training.fit import fit
from raydc.core.training.pretrain import learning_rate
from raydc.core.training.rows import Batch, ResidentRows, RowStore
from tests.core.ranks import (
    SETTINGS,
    PlainContext,
    blobs,
    fit_blobs,
    make_rows,
    order_of_leaves,
    run_ranks,
    shard,
    with_objective,
)


def losses(result):
    return np.array([h["loss"] for h in result["history"] if "loss" in h])


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(1, fit_blobs)[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_loss_curve_is_the_same_on_any_number_of_ranks(world_size, on_one_rank):
    results = run_ranks(world_size, fit_blobs)
    for result in results:
        np.testing.assert_allclose(losses(result), losses(on_one_rank), rtol=1e-4)
        np.testing.assert_array_equal(result["centers"], results[0]["centers"])
        order = order_of_leaves(result, on_one_rank)
        np.testing.assert_allclose(result["weights"][order], on_one_rank["weights"], atol=1)


def test_the_same_seed_gives_the_same_bytes(on_one_rank):
    again = run_ranks(1, fit_blobs)[0]
    np.testing.assert_array_equal(again["centers"], on_one_rank["centers"])
    for name, weights in on_one_rank["encoder"].items():
        np.testing.assert_array_equal(again["encoder"][name], weights)


def test_another_seed_gives_other_weights(on_one_rank):
    other = run_ranks(1, fit_blobs, replace(SETTINGS, seed=1))[0]
    assert not np.array_equal(other["centers"], on_one_rank["centers"])


@pytest.mark.parametrize("objective", ["dec", "idec", "autoencoder", "kmeans"])
def test_streamed_rows_train_on_two_ranks_and_count_every_row(objective):
    results = run_ranks(2, fit_blobs, with_objective(objective), True)
    for result in results:
        assert result["weights"].sum() == 1000
        assert np.isfinite(losses(result)).all()
        np.testing.assert_array_equal(result["centers"], results[0]["centers"])
    if objective != "kmeans":
        assert losses(results[0])[2] < losses(results[0])[0]


def keys_of_an_epoch(ranks, streamed):
    rows = make_rows(ranks, blobs()[0], streamed=streamed)
    steps = list(rows.steps(64, epoch_seed=3))
    return torch.cat([s.batch.keys_N for s in steps]).numpy(), len(steps), float(sum(s.total_weight for s in steps))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_row_is_in_exactly_one_step_and_all_ranks_take_the_same_number(world_size, streamed):
    results = run_ranks(world_size, keys_of_an_epoch, streamed)
    keys = np.sort(np.concatenate([keys for keys, _, _ in results]))
    np.testing.assert_array_equal(keys, np.arange(1000))
    assert len({steps for _, steps, _ in results}) == 1
    assert all(total == 1000.0 for _, _, total in results)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_steps_of_an_epoch_are_of_one_size(world_size):
    sizes = run_ranks(world_size, sizes_of_an_epoch)
    assert set(np.sum(sizes, axis=0)) <= {62, 63}


def sizes_of_an_epoch(ranks):
    return [len(step.batch) for step in make_rows(ranks, blobs()[0]).steps(64, epoch_seed=3)]


def test_batches_do_not_depend_on_the_number_of_ranks():
    def of(ranks_rows):
        return [set(s.batch.keys_N.tolist()) for s in ranks_rows.steps(64, epoch_seed=3)]

    x, _ = blobs()
    whole = of(make_rows(Ranks(), x))
    order = np.random.default_rng(1).permutation(len(x))
    shuffled = [
        Batch(torch.from_numpy(np.sort(order[:400])), torch.from_numpy(x[np.sort(order[:400])]), torch.ones(400))
    ]
    shuffled += [Batch(torch.from_numpy(order[400:]), torch.from_numpy(x[order[400:]]), torch.ones(600))]
    again = of(ResidentRows.collect(iter(shuffled), 12, torch.float32, Ranks()))
    assert whole == again
    assert sum(map(len, whole)) == 1000


@pytest.mark.parametrize("expected_rows", [0, 100, 1000, 2000])
def test_rows_are_named_by_their_keys_however_they_arrive_and_however_many(expected_rows):
    x, _ = blobs()
    order = np.random.default_rng(2).permutation(len(x))
    parts = np.split(order, [0, 130, 131, 700])
    chunks = [Batch(torch.from_numpy(p), torch.from_numpy(x[p]), torch.from_numpy(p).float()) for p in parts]
    rows = ResidentRows.collect(iter(chunks), 12, torch.float32, Ranks(), expected_rows=expected_rows)
    assert rows.num_local == rows.num_rows == len(x)
    assert torch.equal(rows.keys_N, torch.arange(len(x)))
    blocks = list(rows.blocks(300))
    np.testing.assert_array_equal(torch.cat([b.x_ND for b in blocks]), x)
    np.testing.assert_array_equal(torch.cat([b.weights_N for b in blocks]), np.arange(len(x)))
    some = rows.take(torch.tensor([7, 3, 999]))
    np.testing.assert_array_equal(some.x_ND, x[[7, 3, 999]])
    assert some.positions_N.tolist() == some.keys_N.tolist() == [7, 3, 999]


@pytest.mark.parametrize("stop_after", [1, 2, 4, 5])
def test_a_resumed_fit_ends_as_an_unbroken_one(stop_after, on_one_rank, tmp_path):
    stopped = run_ranks(1, fit_blobs, SETTINGS, False, tmp_path, stop_after)[0]
    assert stopped["stopped"]
    resumed = run_ranks(1, fit_blobs, SETTINGS, False, tmp_path)[0]
    assert len(resumed["reports"]) == len(on_one_rank["reports"]) - stop_after
    np.testing.assert_array_equal(resumed["centers"], on_one_rank["centers"])
    np.testing.assert_allclose(losses(resumed), losses(on_one_rank), rtol=1e-6)
    for name, centers in on_one_rank["baselines"].items():
        np.testing.assert_array_equal(resumed["baselines"][name], centers)


def test_a_fit_resumes_on_another_number_of_ranks(on_one_rank, tmp_path):
    run_ranks(1, fit_blobs, SETTINGS, False, tmp_path, 5)
    resumed = run_ranks(2, fit_blobs, SETTINGS, False, tmp_path)[0]
    np.testing.assert_allclose(losses(resumed), losses(on_one_rank), rtol=1e-4)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run_ranks(1, fit_blobs, SETTINGS, False, tmp_path, 2)
    with pytest.raises(ValueError, match="other settings"):
        run_ranks(1, fit_blobs, replace(SETTINGS, fingerprint="other"), False, tmp_path)


def test_a_loss_that_is_not_finite_stops_with_phase_step_and_rank():
    x, _ = blobs()
    x[17] = 1e38
    with pytest.raises(FloatingPointError, match=r"pretrain epoch 1: the loss is not finite at step \d+ on rank 0"):
        fit(make_rows(Ranks(), x), Preprocess(), SETTINGS, PlainContext())


def stopped_by_a_bad_row(ranks):
    x, _ = blobs()
    x[17] = 1e38
    context = PlainContext(ranks.rank, ranks.world_size)
    try:
        fit(make_rows(ranks, x), Preprocess(), SETTINGS, context)
    except FloatingPointError as error:
        return str(error)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_with_the_same_message():
    (holder,) = [r for r in (0, 1) if 17 in shard(Ranks(r, 2), 1000)]
    first, second = run_ranks(2, stopped_by_a_bad_row)
    assert first == second
    assert f"on rank {holder}" in first and "pretrain epoch 1" in first


def test_a_bound_on_the_gradients_of_pretraining_changes_nothing_until_it_is_met(on_one_rank):
    far, near = (
        run_ranks(1, fit_blobs, replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, max_grad_norm=bound)))[0]
        for bound in (1000.0, 1e-3)
    )
    np.testing.assert_array_equal(losses(far), losses(on_one_rank))
    assert not np.array_equal(losses(near), losses(on_one_rank))


def test_fewer_rows_than_leaves_are_refused():
    with pytest.raises(ValueError, match="6 leaves need at least as many rows, there are 4"):
        fit(make_rows(Ranks(), blobs()[0][:4]), Preprocess(), SETTINGS, PlainContext())


def test_a_row_of_weight_two_counts_as_two_rows():
    x, _ = blobs(300)
    twice = np.concatenate([x, x[:50]])
    weights = torch.ones(300)
    weights[:50] = 2.0
    settings = with_objective("kmeans")
    weighted = fit(
        ResidentRows(torch.from_numpy(x), torch.arange(300), weights, Ranks()), Preprocess(), settings, PlainContext()
    )
    repeated = fit(make_rows(Ranks(), twice), Preprocess(), settings, PlainContext())
    assert float(weighted.leaves.weights_K.sum()) == float(repeated.leaves.weights_K.sum()) == 350


def test_the_refinement_stops_when_few_rows_change_their_leaf():
    settings = replace(SETTINGS, refine=replace(SETTINGS.refine, num_epochs=5, tolerance=0.99))
    history = run_ranks(1, fit_blobs, settings)[0]["history"]
    # The first refresh has nothing to compare with; the second, half an epoch later, is below the tolerance.
    assert [h["epoch"] for h in history if h["phase"] == "refine"] == [0]
    assert history[-1]["changed"] < 0.99 and history[-1]["steps"] < 16


@pytest.mark.parametrize("learning", [False, True])
def test_the_layers_meet_few_sizes_of_batches_in_bf16(learning):
    encoder = perceptron([5, 8, 3])
    sizes = []
    encoder[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    x = torch.randn(70, 5)
    with torch.set_grad_enabled(learning), precision(torch.device("cpu"), "bf16"):
        answers = [encoder(x[:n]) for n in (0, 1, 31, 32, 33, 70)]
    assert sizes == [0, 32, 32, 32, 64, 96]
    assert [len(z) for z in answers] == [0, 1, 31, 32, 33, 70]
    for z in answers[1:]:
        torch.testing.assert_close(z.float(), encoder(x[: len(z)]), rtol=0.05, atol=0.02)


def test_bf16_training_ends_near_float32(on_one_rank):
    result = run_ranks(1, fit_blobs, replace(SETTINGS, precision="bf16"))[0]
    np.testing.assert_allclose(losses(result), losses(on_one_rank), rtol=0.05)


def test_the_learning_rate_rises_then_falls_to_zero():
    plan = replace(SETTINGS.pretrain, learning_rate=2.0, warmup_steps=10)
    rates = [learning_rate(plan, step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0) and rates[10] == max(rates)
    assert rates[-1] < 0.001
    assert learning_rate(replace(plan, schedule="constant"), 150, 200) == 2.0


def test_a_store_grows_and_loses_nothing_when_a_wider_type_comes_in():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 3, generator=generator).bfloat16() for n in (5, 1, 9)]
    parts.append(torch.randn(4, 3, generator=generator))
    parts.append(torch.randn(6, 3, generator=generator).bfloat16())
    for expected in (0, 4, 100):
        store = RowStore([3], torch.bfloat16, expected)
        for part in parts:
            store.add(part)
        assert torch.equal(store.take(), torch.cat(parts))
    only = RowStore([3], torch.bfloat16, 0)
    for part in parts[:3]:
        only.add(part)
    assert only.take().dtype == torch.bfloat16


def test_codes_are_kept_in_half_the_memory_where_that_loses_nothing():
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    assert compact(z) is z
    rounded = z.bfloat16().float()
    kept = compact(rounded)
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept.float(), rounded)
    broken = rounded.clone()
    broken[0, 0] = torch.nan
    assert compact(broken) is broken
