"""The planted clusters of the benchmarks, and how a run's labels are judged by them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import planted


def label(folder, rows, shift) -> None:
    """Write labels beside planted rows: leaves are the clusters moved on by `shift`, groups follow the hierarchy."""
    folder.mkdir()
    for path in rows.glob("*.parquet"):
        cluster = pq.read_table(path)["label"].to_numpy()
        leaf = (cluster + shift) % planted.NUM_CLUSTERS
        columns = {"leaf": leaf, "level_10": leaf // 100, "level_100": leaf // 10}
        pq.write_table(
            pa.table({name: values.astype(np.int32) for name, values in columns.items()}), folder / path.name
        )


def test_rows_of_a_larger_set_begin_with_those_of_a_smaller_one_and_lie_around_their_centers(tmp_path):
    small = pq.read_table(planted.write(tmp_path / "small", 300, rows_per_file=200))
    large = pq.read_table(planted.write(tmp_path / "large", 400, rows_per_file=200))
    assert small["id"].to_pylist() == list(range(300))
    assert large.slice(0, 200) == small.slice(0, 200)
    x = np.stack(small["embedding"].to_numpy()).astype(np.float32)
    apart = x - planted.centers()[small["label"].to_numpy()]
    assert apart.std() == pytest.approx(1.5, rel=0.02)


def test_a_level_is_judged_by_the_planted_level_of_its_size(tmp_path):
    rows = planted.write(tmp_path / "rows", 3000, rows_per_file=1000)
    label(tmp_path / "same", rows, 100)
    same = planted.quality(tmp_path / "same", rows)
    assert set(same) == {"leaf", "level_100", "level_10"}
    for metrics in same.values():
        assert metrics["nmi"] == 1.0 and metrics["acc"] == 1.0
    # Leaves as before, but groups that lie across the planted ones.
    label(tmp_path / "across", rows, 5)
    across = planted.quality(tmp_path / "across", rows)
    assert across["leaf"]["nmi"] == 1.0
    assert 0.4 < across["level_100"]["purity"] < 0.7
