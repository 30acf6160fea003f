"""How numbers and texts are written in the report."""

import unicodedata
from typing import Any

MISSING = "\u2013"

# Characters that reverse the text after them; a label with one would garble the line around it.
_REVERSALS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def count(number: float | None) -> str:
    """Return a whole number with thousands separators."""
    return MISSING if number is None else f"{round(number):,}"


def score(number: float | None) -> str:
    """Return a metric with three decimals."""
    return MISSING if number is None else f"{number:.3f}"


def short_score(number: float | None) -> str:
    """Return a number of secondary interest with two decimals."""
    return MISSING if number is None else f"{number:.2f}"


def change(number: float) -> str:
    """Return a difference of two metrics with its sign."""
    return f"{number:+.3f}".replace("-", "\u2212")


def percent(share: float | None) -> str:
    """Return a share as a percentage, with a decimal only below 10 %."""
    if share is None:
        return MISSING
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %"


def duration(seconds: float) -> str:
    """Return a time in the two units that a person would use."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Return a number with its noun: `1 leaf`, `10 leaves`."""
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"


def clean(value: Any, most: int = 200) -> str:
    """Return a value from the data as one line of text, cut to `most` characters; escaping is the template's part."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    # Four times: control characters count before they are taken out, and a caption may be a megabyte.
    line = "".join(" " if unicodedata.category(c) == "Cc" or c in _REVERSALS else c for c in text[: 4 * most])
    line = " ".join(line.split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 1].rstrip() + "\u2026"
