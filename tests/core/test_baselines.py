"""scikit-learn's methods behind one call, and the rule for DBSCAN's radius."""

import numpy as np
import pytest

from raydc.core.baselines import METHODS, knee_distance
from raydc.core.metrics.scores import external
from tests.core.ranks import blobs


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_well_separated_blobs(name):
    x, labels = blobs(400, 8, 4)
    x = x + 8 * labels[:, None].astype(np.float32)
    found = METHODS[name](x, 4, 0)
    kept = found.groups_N >= 0
    assert kept.mean() > 0.8
    table = np.zeros((found.groups_N.max() + 1, 4), np.int64)
    np.add.at(table, (found.groups_N[kept], labels[kept]), 1)
    assert external(table)["ari"] > 0.95
    assert found.parameters


def test_the_knee_lies_between_the_distances_inside_and_outside():
    generator = np.random.default_rng(0)
    inside = generator.normal(size=(300, 2)) * 0.1
    outside = generator.uniform(-20, 20, size=(15, 2))
    x = np.concatenate([inside, outside]).astype(np.float32)
    assert 0.02 < knee_distance(x, 5) < 2.0
    assert knee_distance(np.zeros((20, 2), np.float32), 5) > 0
