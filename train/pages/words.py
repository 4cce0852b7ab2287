"""What people read, on a page or in a terminal: numbers, counts, durations, and columns that stand in line."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...configs.plain import plain


def number(value: float, digits: int = 3) -> str:
    """A number for people: '0.0312', '5e-5', '1,200'."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return re.sub(r"\.?0*e-0*", "e-", f"{value:.{digits - 1}e}")
    return re.sub(r"e\+0*", "e", f"{value:.{digits}g}")


def in_words(value: Any) -> str:
    """A value of a config or a record as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """'41.2 s', '12 min 5 s' or '3 h 20 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shortened(text: str, width: int) -> str:
    """At most `width` characters: what is too long loses its middle, as paths and prompts differ at their ends."""
    if len(text) <= width:
        return text
    start = (width - 1) // 2
    return f"{text[:start]}…{text[len(text) - (width - 1 - start) :]}"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """A line for each row, its cells in columns; `sides` has `<` (left) or `>` (right) for each column.

    A row may have fewer cells than the others: its last one is then as long as it likes.
    """
    rows = [[plain(cell) for cell in row] for row in rows]
    whole = [row if len(row) == len(sides) else row[:-1] for row in rows]
    widths = [max((len(row[k]) for row in whole if k < len(row)), default=0) for k in range(len(sides))]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False))
        yield "  ".join(cells).rstrip()
