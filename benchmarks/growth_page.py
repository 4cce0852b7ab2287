"""What `growth.py` measures, as the tables and plots of docs/growth.md."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .machine import machine_line

PAGE, PICTURE = Path("docs/growth.md"), Path("docs/growth.png")
LOW, HIGH = 0.1, 0.9  # of the rounds: what lies between is shown as the spread of a ratio


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table, measured."""

    name: str
    x: float  # number on the axis
    turns: Sequence[float]  # milliseconds of a step, by round: the median of each turn

    @property
    def milliseconds(self) -> float:
        """Of a step: the median over the rounds."""
        return statistics.median(self.turns)


@dataclass(frozen=True, slots=True)
class Growth:
    """A table and its plot."""

    title: str
    unit: str  # of the axis
    limit: str  # what limits it, in a sentence
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long a row took as the first one, and how far the rounds agree on it."""

    low: float
    middle: float
    high: float


def ratio(row: Row, first: Row) -> Ratio:
    """Of the turns of the same round; quantiles LOW and HIGH, and the median, over the rounds."""
    beside = [own / other for own, other in zip(row.turns, first.turns, strict=True)]
    return Ratio(*np.quantile(beside, [LOW, 0.5, HIGH]).tolist())


def table(growth: Growth) -> str:
    """Markdown."""
    lines = [
        f"## {growth.title}\n",
        f"{growth.limit}\n",
        f"| | {growth.unit} | ms | ratio | spread |",
        "|---" * 5 + "|",
    ]
    return "\n".join([*lines, *(_line(row, growth.rows[0]) for row in growth.rows)]) + "\n"


def _line(row: Row, first: Row) -> str:
    found = ratio(row, first)
    spread = "" if row is first else f"{found.low:.2f} .. {found.high:.2f}"
    took = f"{row.milliseconds:,.0f}" if row.milliseconds >= 100 else f"{row.milliseconds:.3g}"
    return f"| {row.name} | {row.x:,} | {took} | {found.middle:.2f} | {spread} |"


def page(found: Sequence[Growth]) -> str:
    """docs/growth.md."""
    return "\n".join(_lines(found))


def _lines(found: Sequence[Growth]) -> Iterator[str]:
    yield "# How the cost of a step grows\n"
    yield "Written by `python -m loraloom.benchmarks.growth --docs`: pocket, one thread, LoRA of rank 4 on attention, a"
    yield "batch of one at 64 px where nothing else is said.\n"
    yield f"{machine_line()}\n"
    yield f"The rows of a table took turns of a few steps, in {len(found[0].rows[0].turns)} rounds. `ms` is the median"
    yield "over the rounds; `ratio` is to the first row's turn in the same round, again the median, so that a machine"
    yield f"that slows down slows both; `spread` holds the ratios of {HIGH - LOW:.0%} of the rounds, without the lowest"
    yield "and the highest of them. A row whose spread holds 1.00 is not told apart from the first one here, nor are"
    yield "two whose spreads overlap.\n"
    yield f"![time against each of them]({PICTURE.name})\n"
    yield from map(table, found)


def draw(found: Sequence[Growth], file: Path) -> None:
    """All plots in one PNG; both axes from zero but that of images, which is logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(2, 4, figsize=(14, 6.4), layout="constrained")
    for place, growth in zip(places.flat, found, strict=False):
        xs, ys = [row.x for row in growth.rows], [row.milliseconds for row in growth.rows]
        place.plot(xs, ys, marker="o", color="#2563eb")
        place.set(title=growth.title, xlabel=growth.unit, ylabel="ms")
        place.set_ylim(0, 1.15 * max(ys))
        if max(xs) >= 1e6:
            place.set_xscale("log")
        else:
            place.set_xlim(left=0)
        place.grid(alpha=0.3)
    for place in places.flat[len(found) :]:
        place.set_axis_off()
    figure.savefig(file, dpi=80, format="png")
    pyplot.close(figure)
