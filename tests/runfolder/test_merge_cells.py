"""The cells of merge: kept as they finish, not done again, and never mistaken for those of another round."""

from functools import partial

import numpy as np
import pytest

from raydc.core.tree.cells import run_here
from raydc.core.tree.linkage import agglomerate
from raydc.runfolder import artifacts, merge_cells
from raydc.runfolder.folder import RunDir
from raydc.runfolder.merge_cells import kept
from raydc.storage.lake import Lake

RNG = np.random.default_rng(5)
MEANS = (RNG.normal(size=(30, 6)) * 4)[RNG.integers(0, 30, 600)] + RNG.normal(size=(600, 6))
WEIGHTS = RNG.integers(1, 50, 600).astype(float)


class Counted:
    """A runner that counts the cells it merges and may fail after some."""

    def __init__(self, most=None):
        self.done, self.most = 0, most

    def __call__(self, step, state, numbers):
        def counting(*arguments):
            if self.done == self.most:
                raise KeyboardInterrupt
            self.done += 1
            return step.args[0](*arguments)

        return run_here(partial(step.func, counting, *step.args[1:]), state, numbers)


def build(run_cells, **options):
    return agglomerate(
        MEANS, WEIGHTS, **{"method": "certified", "cell_size": 60, "top_size": 50} | options, run_cells=run_cells
    )


@pytest.fixture
def run(tmp_path):
    return RunDir(Lake(), str(tmp_path), "r1")


@pytest.mark.parametrize("method", ["certified", "minibatch"])
def test_a_merge_that_was_broken_off_does_only_the_cells_that_are_left(run, method):
    whole = Counted()
    expected = build(kept(RunDir(run.lake, f"{run.root}-other", "r"), whole), method=method)
    with pytest.raises(KeyboardInterrupt):
        build(kept(run, Counted(most=4)), method=method)
    again = Counted()
    found = build(kept(run, again), method=method)
    assert again.done == whole.done - 4 > 0
    assert found.merges.tobytes() == expected.merges.tobytes()
    assert found.sse.tobytes() == expected.sse.tobytes()
    finished = Counted()
    build(kept(run, finished), method=method)
    assert finished.done == 0
    assert "clusters, " in run.progress["line"]


def test_cells_of_other_settings_or_leaves_are_not_taken(run):
    build(kept(run, run_here))
    for options in ({"eps": 0.5}, {"cell_size": 80}, {"seed": 1}):
        other = Counted()
        assert build(kept(run, other), **options).merges.tobytes() == build(run_here, **options).merges.tobytes()
        assert other.done > 0
    moved = Counted()
    agglomerate(
        MEANS + 1e-9 * RNG.normal(size=MEANS.shape),
        WEIGHTS,
        method="certified",
        cell_size=60,
        top_size=50,
        run_cells=kept(run, moved),
    )
    assert moved.done > 0


def test_a_cell_comes_back_as_it_was_written(run):
    seen = []

    def run_cells(step, state, numbers):
        made = [step.args[0](state, cell) for cell in numbers]
        for first in made:
            second = merge_cells.from_bytes(merge_cells.to_bytes(first), len(state.weight_M))
            for name in ("left_P", "right_P", "delta_P"):
                assert getattr(first, name).dtype == getattr(second, name).dtype
                np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
            assert [getattr(first, n) for n in merge_cells._COUNTS] == [getattr(second, n) for n in merge_cells._COUNTS]
            seen.append(first)
        return made

    build(kept(run, run_cells))
    assert seen
    assert not run.lake.exists(artifacts.CELLS.uri(run))
