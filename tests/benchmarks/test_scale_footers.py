"""The table of what a footer costs: both sides are real, and a footer keeps nothing of its columns."""

from benchmarks.scale_footers import measure, section


def test_the_table_of_footers_is_measured_for_each_width():
    few, many = measure(columns=(4, 40), num_files=20)
    assert (few.columns, many.columns) == (4, 40)
    assert 0 < few.footer_bytes < many.footer_bytes
    assert min(c.plain_ms for c in (few, many)) > 0
    # A schema that each footer kept would be ten times as large.
    assert 0 < many.kept_bytes < 1.2 * few.kept_bytes
    lines = section([few, many])
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["4", "40"]
