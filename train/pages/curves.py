"""From the entries of a history to the curves of a chart."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .chart import Series

Entries = Sequence[dict[str, Any]]


def curve(entries: Entries, key: str, name: str, colour: int | None = None) -> Series:
    """The values of a key over the steps; null is a value that was not finite."""
    known = [entry for entry in entries if key in entry]
    values = [math.nan if entry[key] is None else float(entry[key]) for entry in known]
    return Series(name, [int(entry["step"]) for entry in known], values, colour)


def names_of(entries: Iterable[dict[str, Any]], group: str) -> list[str]:
    """Every name of a key `group/<name>`, in the order in which they come."""
    keys = dict.fromkeys(key for entry in entries for key in entry if key.startswith(f"{group}/"))
    return [key.removeprefix(f"{group}/") for key in keys]
