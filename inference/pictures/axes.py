"""The axes of a grid: what changes from column to column and from row to row, and what a cell asks for then."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...adapters.titles import title_of
from ...configs.choices import did_you_mean
from ...configs.errors import UserError
from ...configs.paths import expanded
from ..checkpoint import checkpoints_of

MOST_CELLS = 10_000
"""Of a grid; its picture shows a few hundred."""
Values = Mapping[str, Any]
"""The keys of a request."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A name such as `weight:sks`, and its values."""

    name: str
    values: Sequence[Any]


def _plain(key: str, kind: Callable[[str], Any]) -> Callable[[Values, str, Any], Values]:
    return lambda request, which, value: {**request, key: kind(value) if isinstance(value, str) else value}


def _weight(request: Values, which: str, value: Any) -> Values:
    place, adapters = _adapter(request, which), [dict(each) for each in request.get("adapters", [])]
    adapters[place]["weight"] = float(value) if isinstance(value, str) else value
    return {**request, "adapters": adapters}


def _checkpoint(request: Values, which: str, value: Any) -> Values:
    adapters = [dict(each) for each in request.get("adapters", [])] or [{}]
    place = _adapter({"adapters": adapters}, which) if which else 0
    adapters[place]["file"] = str(value)
    return {**request, "adapters": adapters}


AXES: dict[str, Callable[[Values, str, Any], Values]] = {
    "checkpoint": _checkpoint,
    "weight": _weight,
    "prompt": _plain("prompt", str),
    "negative_prompt": _plain("negative_prompt", str),
    "seed": _plain("seed", int),
    "scheduler": _plain("scheduler", str),
    "guidance": _plain("guidance", float),
    "guidance_until": _plain("guidance_until", float),
    "steps": _plain("steps", int),
}
"""What can be an axis; `weight` and `checkpoint` may say of which adapter, as `weight:NAME` or `weight:1`."""


def axis_of(words: Sequence[Any]) -> Axis:
    """From `NAME VALUE VALUE ...`: words of the command line, or values of a file.

    A run folder among checkpoints stands for all of its checkpoints.
    """
    name, *values = words
    kind = name.partition(":")[0]
    if kind not in AXES:
        raise UserError(f"axis {name!r} is unknown{did_you_mean(kind, AXES)}; there are: {', '.join(AXES)}")
    if kind == "checkpoint":
        values = [each for value in values for each in _checkpoints(str(value))]
    if not values:
        raise UserError(f"axis {name!r} has no values; give some: {name} VALUE VALUE …")
    return Axis(name, values)


def axes_in(values: Any, where: str) -> list[Axis]:
    """The axes of a file: `{seed: [0, 1], "weight:sks": [0, 0.5]}`."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: should be axes with lists of values, such as {{seed: [0, 1]}}")
    return [axis_of([name, *(own if isinstance(own, list) else [own])]) for name, own in values.items()]


def _checkpoints(value: str) -> list[str]:
    value = expanded(value)
    found = checkpoints_of(Path(value))
    if Path(value).is_dir() and not found and (Path(value) / "checkpoints").is_dir():
        raise UserError(f"checkpoint {value}: the run has no checkpoints")
    return [str(path) for path in found] or [value]


@dataclass(frozen=True, slots=True)
class Line:
    """A column or a row: one value of each of its axes."""

    label: str
    chosen: Sequence[tuple[str, Any]]

    def applied(self, request: Values) -> Values:
        """The request with these values. UserError for a value that its axis cannot have."""
        for name, value in self.chosen:
            kind, _, which = name.partition(":")
            try:
                request = AXES[kind](request, which, value)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"axis {name}: {value!r} is no {kind}") from error
        return request


def lines(axes: Sequence[Axis]) -> list[Line]:
    """Every combination of the axes' values, the last axis fastest; one without a label when there are no axes."""
    if (count := math.prod(len(axis.values) for axis in axes)) > MOST_CELLS:
        raise UserError(f"the axes have {count:,} combinations, more than the {MOST_CELLS:,} of a grid")
    named = [
        [(label, (axis.name, value)) for label, value in zip(_labels(axis), axis.values, strict=True)] for axis in axes
    ]
    found = (zip(*chosen, strict=True) if chosen else ((), ()) for chosen in product(*named))
    return [Line(", ".join(labels), chosen) for labels, chosen in found]


def _labels(axis: Axis) -> list[str]:
    """Words for its values; of checkpoints and files that are called alike with as many folders as tell them apart."""
    kind, _, which = axis.name.partition(":")
    if kind in ("prompt", "negative_prompt"):
        return [str(value) for value in axis.values]
    if kind != "checkpoint":
        return [f"{which or kind} {value}" for value in axis.values]
    places = [[part for part in Path(str(value)).parts if part != "checkpoints"] for value in axis.values]
    runs = {tuple(place[:-1]) for place in places}
    depth, longest = 1 if len(runs) == 1 else 2, max(map(len, places))
    while depth < longest and len({tuple(place[-depth:]) for place in places}) < len(
        {tuple(place) for place in places}
    ):
        depth += 1
    return [" ".join(place[-depth:]).removesuffix(".safetensors") for place in places]


def cells(request: Values, columns: Sequence[Line], rows: Sequence[Line]) -> Iterator[Values]:
    """The requests of all cells, row by row. Checkpoints are put in first: weights are of what stands there."""
    if len(rows) * len(columns) > MOST_CELLS:
        cells = f"{len(rows):,} x {len(columns):,} cells"
        raise UserError(f"{cells} are more than the {MOST_CELLS:,} of a grid: give the axes fewer values")
    for row in rows:
        for column in columns:
            chosen = sorted([*column.chosen, *row.chosen], key=lambda pair: not pair[0].startswith("checkpoint"))
            yield Line("", chosen).applied(request)


def _adapter(request: Values, which: str) -> int:
    """The place of an adapter by its number, counted from 1, or its name: that of its file without the ending."""
    if not all(isinstance(each, dict) for each in request.get("adapters", [])):
        raise UserError("adapters: should be a list of mappings, each with its file: [{file: a.safetensors}]")
    names = [title_of(str(each.get("file", ""))) for each in request.get("adapters", [])]
    if not names:
        raise UserError("a weight axis needs an adapter: give --adapter FILE")
    if not which:
        return 0
    if which.isdigit() and 1 <= int(which) <= len(names):
        return int(which) - 1
    if names.count(which) > 1:
        raise UserError(f"several adapters are called {which!r}: say which by its number, from 1 to {len(names)}")
    if which in names:
        return names.index(which)
    raise UserError(f"there is no adapter {which!r}{did_you_mean(which, names)}; there are: {', '.join(names)}")
