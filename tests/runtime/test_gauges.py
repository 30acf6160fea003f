"""Gauges of a run: set under run and stage, silent without Ray, cheap where they are set for each slice."""

import pickle

import pytest

from raydc.config.stages import STAGE_NAMES
from raydc.runtime.gauges import GAUGES, Gauges
from raydc.storage import written
from raydc.storage.lake import Lake


class Kept:
    """Keeps what a gauge was set to."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []

    def make(self, name: str) -> "_Gauge":
        return _Gauge(name, self.seen)


class _Gauge:
    def __init__(self, name: str, seen: list) -> None:
        self.name, self.seen = name, seen

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.seen.append((self.name, value, tags))


def test_values_carry_run_and_stage_and_none_is_left_out():
    kept = Kept()
    Gauges("r1", "fit", make=kept.make, is_on=lambda: True).set(raydc_loss=0.5, raydc_rows=None)
    assert kept.seen == [("raydc_loss", 0.5, {"run": "r1", "stage": "fit"})]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_stage_begins_with_nothing_done(stage):
    kept = Kept()
    Gauges("r1", stage, make=kept.make, is_on=lambda: True).begin()
    values = {name: value for name, value, _ in kept.seen}
    assert values.pop("raydc_stage") == STAGE_NAMES.index(stage) + 1
    assert set(values.values()) == {0.0} and set(values) <= set(GAUGES)


def test_nothing_happens_without_ray():
    kept = Kept()
    silent = Gauges("r1", "fit", make=kept.make, is_on=lambda: False)
    silent.begin()
    silent.set_at_times(raydc_rows=1)
    assert kept.seen == []


def test_what_comes_for_each_slice_is_set_now_and_then_and_the_end_always():
    kept = Kept()
    gauges = Gauges("r1", "assign", every_seconds=3600.0, make=kept.make, is_on=lambda: True)
    for rows in range(1000):
        gauges.set_at_times(raydc_rows=rows)
    gauges.set(raydc_rows=1000)
    assert [value for _, value, _ in kept.seen] == [0.0, 1000.0]


def test_gauges_travel_to_another_process():
    gauges = pickle.loads(pickle.dumps(Gauges("r1", "assign")))
    gauges.set(raydc_rows=1)


def test_what_is_written_through_the_door_is_counted(tmp_path):
    lake, before = Lake(), written.total()
    lake.write_bytes(f"{tmp_path}/a", b"12345")
    with lake.staged(f"{tmp_path}/b") as path:
        path.write_bytes(b"123")
    with pytest.raises(ValueError), lake.staged(f"{tmp_path}/c") as path:
        path.write_bytes(b"123")
        raise ValueError
    assert written.total() - before == 8
