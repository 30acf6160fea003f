"""The end of a labelling that fails: its error is told, and nothing of Ray Data lives on to break the driver's end."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from raydc import cluster
from raydc.errors import DataError
from raydc.labelling import Labelling
from raydc.lake import Lake
from raydc.stages.assign import label_all
from raydc.stages.profile import profile_input
from tests import shards


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("iter_threaded", "StreamingExecutor"))]


def test_no_reader_outlives_a_labelling_that_fails(ray_cluster, tmp_path):
    for number in range(24):
        x, _ = shards.near_corners(50, seed=number)
        shards.write(tmp_path / "in" / f"part-{number:02}.parquet", shards.rows(x, 50 * number))
    config = shards.settings(tmp_path / "in", assign={"num_actors": 1})
    profile = profile_input(config, Lake())
    (tmp_path / "in" / "part-01.parquet").write_bytes(b"no parquet")

    def load() -> Labelling:
        return Labelling(Lake(), str(tmp_path / "out"), profile.spec, shards.corner_model(), shards.group_centers())

    # Slices enough for more than a minute are left when the error comes.
    slow: Any = SimpleNamespace(check_owner=lambda: time.sleep(3), tell=lambda line: None)
    with pytest.raises(DataError, match=r"part-01\.parquet") as caught:
        label_all(config, load, profile.slices, 3, slow)
    # The traceback is alive, as it is while a command leaves its cluster.
    assert caught.tb is not None
    cluster.await_readers()
    assert readers() == []
