"""Numbers and texts as they stand on the page."""

import pytest

from raydc.report import text as wording


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 00 s"), (75, "1 min 15 s"), (7260, "2 h 01 min")],
)
def test_a_duration_is_written_in_the_units_of_its_size(seconds, text):
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.946, "95 %"), (0.0123, "1.2 %"), (0, "0 %"), (None, "\u2013")]
)
def test_a_share_is_written_with_a_decimal_only_where_it_is_small(share, text):
    assert wording.percent(share) == text


def test_text_from_the_data_becomes_one_short_line():
    assert wording.clean("two\nlines\x00 and\ttabs") == "two lines and tabs"
    assert wording.clean("left \u202eright") == "left right"
    assert wording.clean("x" * 50, 10) == "x" * 9 + "\u2026"
    assert wording.clean(b"\x00\xff") == "00ff"
    assert wording.clean(None) == "None"
