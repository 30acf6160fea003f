"""What is noted of a label file when it is written."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.data import label_files


def test_the_record_of_a_file_holds_its_rows_bytes_checksums_and_ranges(tmp_path):
    table = pa.table(
        {
            "id": ["b", "a", "c", None],
            "leaf": pa.array([3, 1, 2, 2], pa.int32()),
            "distance": pa.array([0.5, np.nan, 2.5, 1.0], pa.float32()),
            "nothing": pa.array([None] * 4, pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    body = (tmp_path / "a.parquet").read_bytes()
    row = label_files.record("labels/a.parquet", tmp_path / "a.parquet").to_pylist()[0]
    assert (row["path"], row["rows"], row["bytes"]) == ("labels/a.parquet", 4, len(body))
    assert row["sha256"] == hashlib.sha256(body).hexdigest() and row["md5"] == hashlib.md5(body).hexdigest()
    facts = label_files.from_record(row)
    assert list(facts) == table.column_names
    ranges = {name: (f["least"], f["largest"], f["nulls"]) for name, f in facts.items()}
    assert ranges == {"id": ("a", "c", 1), "leaf": (1, 3, 0), "distance": (0.5, 2.5, 0), "nothing": (None, None, 4)}


def test_a_text_too_long_to_keep_bounds_nothing(tmp_path):
    pq.write_table(pa.table({"id": ["a", "z" * 1000]}), tmp_path / "a.parquet")
    facts = label_files.column_facts(pq.read_metadata(tmp_path / "a.parquet"))
    assert (facts["id"]["least"], facts["id"]["largest"]) == (None, None)


def test_a_file_without_statistics_says_nothing_of_its_columns(tmp_path):
    pq.write_table(pa.table({"leaf": [1, 2]}), tmp_path / "a.parquet", write_statistics=False)
    facts = label_files.column_facts(pq.read_metadata(tmp_path / "a.parquet"))["leaf"]
    assert (facts["nulls"], facts["least"], facts["largest"]) == (None, None, None) and facts["bytes"] > 0
