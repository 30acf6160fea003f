"""What workers send one another in a step, and when more of them make an epoch slower: by hand."""

import pytest

from raydc.runtime.exchange import ASSUMED_BYTES_PER_SECOND, Exchange, exchanges, lake_passes
from raydc.runtime.plan import make_plan
from tests.runtime.test_plan import config, profile

# 17 MB of gradients, batches of 4,096 of a billion rows.
LARGE = Exchange(phase="pretrain", gradient_bytes=17_000_000, steps=244_141, batch_rows=4096, row_flop=25.5e6)


def test_the_gradients_of_a_billion_rows_on_32_workers_take_most_of_an_hour():
    # A ring sends them 2 * 31 / 32 times, at 20 Gbit/s.
    one_way = 244_141 * 17e6 / 2.5e9
    assert one_way / 60 == pytest.approx(27.7, abs=0.1)
    assert LARGE.epoch_seconds(32, 2.5e9) == pytest.approx(one_way * 2 * 31 / 32)
    assert LARGE.epoch_seconds(32, 2.5e9) / 60 == pytest.approx(54, abs=1)
    assert LARGE.epoch_seconds(1, 2.5e9) == 0


@pytest.mark.parametrize(("flop_per_second", "slower"), [(50e12, True), (1e12, False)])
def test_more_workers_help_only_where_a_step_takes_longer_than_its_gradients(flop_per_second, slower):
    def step(workers: int) -> float:
        return LARGE.step_seconds(flop_per_second) / workers + LARGE.step_bytes(workers) / 2.5e9

    # The rule is that of the sum: with every further worker it falls, or rises.
    times = [step(w) for w in (1, 2, 4, 32)]
    assert times == sorted(times, reverse=not slower)
    line = LARGE.line(32, 2.5e9, flop_per_second)
    assert ("more workers make an epoch SLOWER" in line) == slower
    assert LARGE.line(2, 2.5e9, None).endswith("if a step takes one alone above 13.6 ms")


def test_the_batch_that_it_names_is_the_least_that_helps():
    line = LARGE.line(32, 2.5e9, 50e12)
    rows = int(line.rsplit(" ", 1)[1].replace(",", ""))
    assert rows * LARGE.row_flop / 50e12 >= LARGE.least_step_seconds(2.5e9)
    assert (rows - 2) * LARGE.row_flop / 50e12 < LARGE.least_step_seconds(2.5e9)


def test_gradients_are_of_the_weights_that_a_phase_trains():
    # Encoder 8-16-4: 192 weights, decoder as many, 10 centers of 4.
    pretrain, refine = exchanges(config(fit={"objective": "idec"}), 1000, 8)
    assert (pretrain.gradient_bytes, pretrain.steps, pretrain.row_flop) == (4 * 384, 4, 6 * 384)
    assert (refine.gradient_bytes, refine.steps) == (4 * (384 + 40), 8)
    assert exchanges(config(fit={"objective": "dec"}), 1000, 8)[1].gradient_bytes == 4 * (192 + 40)
    assert exchanges(config(fit={"objective": "kmeans"}), 1000, 8) == []
    assert exchanges(config(fit={"objective": "temi"}, head={"num_heads": 3}), 1000, 8)[0].gradient_bytes == 4 * 3 * 80


def test_the_plan_of_several_workers_tells_of_their_gradients():
    plan = make_plan(config(fit={"objective": "dec", "num_workers": 2, "use_gpu": True}), profile())
    told = [line for line in plan.lines() if line.startswith("gradients   ")]
    assert [line.split()[1] for line in told] == ["pretrain:", "refine:"]
    assert all("more workers help if a step takes one alone above" in line and "10 Gbit/s" in line for line in told)
    assert not any(line.startswith("gradients") for line in make_plan(config(), profile()).lines())
    assert ASSUMED_BYTES_PER_SECOND * 8 == 10e9


def test_streamed_rows_are_read_for_every_pass():
    assert lake_passes(config(), streamed=False) == 1
    # Two samples and the codes, 3 epochs, 5 epochs with 2 refreshes each, the statistics.
    assert lake_passes(config(fit={"objective": "dec"}), streamed=True) == 3 + 3 + 5 * 3 + 1
    assert lake_passes(config(fit={"objective": "kmeans"}), streamed=True) == 1 + 7 + 1
