"""The sum of the slices' statistics: each file counts once, whoever wrote it and however the sum is made."""

import numpy as np
import pyarrow as pa
import pytest

from raydc.data.slices import Slice
from raydc.data.statistics import Statistics, summed
from raydc.errors import DataError, StageError
from raydc.labeling.label_slice import completed, label_slice
from raydc.labeling.nearest_so_far import NearestSoFar
from raydc.runfolder import artifacts
from raydc.runfolder.formats import Place
from raydc.runfolder.lease import Looks
from raydc.runtime import slice_sums
from raydc.runtime.slice_sums import sum_of_files, sum_of_slices
from raydc.storage.lake import Lake
from tests import shards
from tests.labeling.test_label_slice import job, slices


@pytest.fixture
def labeled(tmp_path):
    """Forty slices of 30 rows, labeled; returns the labeling, the slices and their sum, one after the other."""
    for number in range(40):
        x, _ = shards.near_corners(30, seed=number)
        shards.write(tmp_path / "in" / f"part-{number:02}.parquet", shards.rows(x, 30 * number))
    done = job(tmp_path / "out", num_exemplars=5)
    parts = slices(tmp_path / "in")
    return done, parts, shards.label_all(done, parts)


def assert_same(one: Statistics, other: Statistics) -> None:
    assert (one.rows, one.labels, one.rejects) == (other.rows, other.labels, other.rejects)
    assert one.tallies.keys() == other.tallies.keys()
    for name, tally in one.tallies.items():
        assert np.array_equal(tally.rows_K, other.tallies[name].rows_K)
        assert np.allclose(tally.squared_K, other.tallies[name].squared_K, rtol=1e-12, atol=0)
    assert one.exemplars.equals(other.exemplars)


def test_the_sum_of_the_files_is_the_sum_of_the_slices(labeled):
    done, parts, total = labeled
    assert_same(sum_of_files(done.place, parts, 5), total)
    halves = [sum_of_files(done.place, parts[:13], 5), sum_of_files(done.place, parts[13:], 5)]
    assert_same(summed(halves, 5), total)


def test_a_sum_leaves_its_parts_as_they_are(labeled):
    done, parts, _ = labeled
    first = completed(done, parts[0])
    before = first.to_bytes()
    assert summed([first, first], 5).rows == 2 * first.rows
    assert first.to_bytes() == before


def test_an_actor_that_knows_the_nearest_rows_keeps_few_and_loses_no_exemplar(labeled):
    done, parts, total = labeled
    nearest, kept = NearestSoFar(5), []
    for part in parts:
        kept.append(label_slice(done, part, nearest=nearest).exemplars.num_rows)
    # All rows at first (four leaves, five each); later only what comes near enough.
    assert kept[0] > 15 and sum(kept[20:]) < 20 * 20 / 3
    assert_same(sum_of_files(done.place, parts, 5), total)


def test_a_slice_that_is_done_again_elsewhere_counts_once_and_loses_no_exemplar(labeled):
    done, parts, total = labeled
    first, second = NearestSoFar(5), NearestSoFar(5)
    for part in parts[:25]:
        label_slice(done, part, nearest=first)
    # The actor is gone; another one does some of its slices again, one of them twice, and the rest.
    for part in [*parts[20:], parts[20]]:
        label_slice(done, part, nearest=second)
    assert_same(sum_of_files(done.place, parts, 5), total)


def test_a_bound_is_of_other_rows_and_never_of_the_same_row_twice():
    exemplars = pa.table({"leaf": [0, 0], "distance": np.float32([1.0, 2.0])})
    nearest = NearestSoFar(2)
    assert nearest.may_hold(np.array([0, 1]), np.array([9.0, 9.0])).tolist() == [True, True]
    for _ in range(2):
        nearest.take("a", exemplars, 2)
    rows = np.array([0, 0, 0, 1]), np.float32([1.5, 2.0, 2.5, 9.0])
    assert nearest.may_hold(*rows).tolist() == [True, True, False, True]
    nearest.take("b", exemplars, 2)
    assert nearest.may_hold(*rows).tolist() == [False, False, False, True]


def test_a_missing_or_damaged_file_is_named(labeled):
    done, parts, _ = labeled
    done.lake.write_bytes(artifacts.SLICES.of(parts[7]).uri(done.place), b"no statistics")
    with pytest.raises(DataError, match=r"assign: slice part-07\.parquet: statistics of the labels: damaged"):
        sum_of_files(done.place, parts, 5)
    artifacts.SLICES.of(parts[7]).remove(done.place)
    with pytest.raises(StageError, match=r"slices/part-07\.npz was removed while the run went on"):
        sum_of_files(done.place, parts, 5)


def test_one_listing_tells_which_slices_are_left(labeled):
    done, parts, _ = labeled
    requests = []

    class Counting(Lake):
        def file_system(self, uri):
            requests.append(uri)
            return super().file_system(uri)

    place = Place(Counting(), done.output)
    assert artifacts.SLICES.incomplete(place, parts) == []
    artifacts.SLICES.of(parts[3]).remove(done.place)
    # Of another input, or of another name.
    done.lake.write_bytes(done.place.uri("slices", "part-03.npz.old"), b"")
    assert artifacts.SLICES.incomplete(place, parts) == [parts[3]]
    assert requests == [done.place.uri("slices")] * 2


def test_a_worker_looks_at_the_lease_now_and_then():
    times, looks = iter([0.0, 1.0, 4.9, 5.0, 9.0, 11.0]), []
    look = Looks(lambda: looks.append(1), 5.0, clock=lambda: next(times))
    found = []
    for _ in range(6):
        look()
        found.append(len(looks))
    assert found == [1, 1, 1, 2, 2, 3]


@pytest.mark.slow
def test_a_tree_of_tasks_gives_the_same_sum(ray_cluster, labeled):
    done, parts, total = labeled
    many: list[Slice] = [part for part in parts for _ in range(60)]
    assert len(many) > 2 * slice_sums.FEW
    found = sum_of_slices(done.place, many, 5)
    assert found.rows == 60 * total.rows
    assert np.array_equal(found.tallies["leaf"].rows_K, 60 * total.tallies["leaf"].rows_K)
