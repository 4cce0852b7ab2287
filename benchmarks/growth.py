"""How the cost of a step grows: with rank, targets, resolution, batch, images, adapters and processes, on pocket.

    python -m loraloom.benchmarks.growth                          prints the tables, in about five minutes
    python -m loraloom.benchmarks.growth --only rank batch        two of them
    python -m loraloom.benchmarks.growth --docs                   also writes docs/growth.md and docs/growth.png

All rows of a table are made ready first and then take turns of a few steps, so that what else the machine does falls
on all of them; a row is compared with the first one within each round.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm, trange

from ..configs.arguments import positive
from ..configs.command import run_command
from ..configs.files import replace_file
from .growth_page import PAGE, PICTURE, Growth, Row, draw, page, table
from .growth_rows import (
    THREADS,
    Ready,
    by_adapters,
    by_batch,
    by_images,
    by_processes,
    by_rank,
    by_resolution,
    by_targets,
)

ROUNDS, TURN = 20, 0.4  # seconds of a turn
WARM_UP = 3  # steps


@dataclass(frozen=True, slots=True)
class Kind:
    """A table to be: what it says, and what makes its rows ready, in a folder and until the stack is closed."""

    title: str
    unit: str
    limit: str
    rows: Callable[[Path, ExitStack], Iterator[Ready]]


def main(arguments: Sequence[str]) -> int:
    """Prints the tables."""
    parser = _parser()
    options = parser.parse_args(list(arguments))
    if options.docs and options.only:
        parser.error(f"--docs writes all tables into {PAGE}: leave --only out")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(THREADS)
    found = []
    for name in options.only or KINDS:
        found.append(measure(KINDS[name], options.rounds))
        print(table(found[-1]), flush=True)
    if options.docs:
        draw(found, PICTURE)
        replace_file(PAGE, page(found))
    return 0


def measure(kind: Kind, rounds: int) -> Growth:
    """Makes all rows ready, lets them take turns, and clears them away."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        making = kind.rows(Path(folder), stack)
        ready = list(tqdm(making, desc=f"{kind.title}: getting ready", unit="row", leave=False))
        turns = take_turns(ready, rounds, kind.title)
    rows = [Row(each.name, each.x, [1e3 * turn for turn in own]) for each, own in zip(ready, turns, strict=True)]
    return Growth(kind.title, kind.unit, kind.limit, rows)


def take_turns(ready: Sequence[Ready], rounds: int, title: str = "") -> list[list[float]]:
    """Median seconds of a step in each turn: of each row, by round. Who begins changes from round to round.

    A row makes as many steps in a turn as take about TURN seconds, by those of its warm-up, and at least one.
    """
    steps = [max(1, round(TURN / min(each.turn(WARM_UP)))) for each in ready]
    turns: list[list[float]] = [[] for _ in ready]
    for number in trange(rounds, desc=f"{title}: in turn", unit="round", leave=False):
        order = range(len(ready))
        for index in reversed(order) if number % 2 else order:
            turns[index].append(statistics.median(ready[index].turn(steps[index])))
    return turns


KINDS: Mapping[str, Kind] = {
    "rank": Kind(
        "Rank",
        "rank",
        "Up to rank 16 hardly anything grows; from 64 on the adapter's own products count. Those of the base are the "
        "same in every row.",
        by_rank,
    ),
    "targets": Kind(
        "Targets",
        "adapted modules",
        "More modules take longer: each adds thin products of its own, forward and backward, and the calls that make "
        "them.",
        by_targets,
    ),
    "resolution": Kind(
        "Resolution",
        "pixels a side",
        "Small pictures are limited by calls, large ones by arithmetic: four times the pixels of 32 px take a fifth "
        "longer, 2.25 times those of 128 px take nearly twice as long.",
        by_resolution,
    ),
    "batch": Kind(
        "Batch",
        "samples of a step",
        "A sample among many costs less than one alone: what limits a batch of one are calls, and the more samples the "
        "more it is arithmetic. Doubling takes 1.3 to 1.8 times as long.",
        by_batch,
    ),
    "images": Kind(
        "Images: choosing a thousand samples",
        "images",
        "Choosing grows by far less than the list. Only the time to say which sample comes next is measured, without "
        "the shuffle of a long epoch: no image is opened.",
        by_images,
    ),
    "adapters": Kind(
        "Adapters: an image of four steps",
        "adapters",
        "Each adds its products to every layer that it adapts, about the same time for each. Fused they would cost "
        "nothing.",
        by_adapters,
    ),
    "processes": Kind(
        "Processes: a step of four samples",
        "processes",
        "Most of what is missing to half the time is that half a batch takes more than half as long (see Batch); the "
        "rest is not told apart here.",
        by_processes,
    ),
}
"""Name on the command line -> table."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loraloom.benchmarks.growth",
        description="Measure how the cost of a step grows. All rows of a table take a short turn in every round, and "
        "each is compared with the first row in the same round: a machine that slows down slows both.",
        epilog="A table shows milliseconds (median over the rounds), the ratio to the first row (median too) and the "
        "spread of that ratio (10th to 90th percentile of the rounds): where spreads overlap, rows are not told apart. "
        "Leave the machine alone meanwhile: two processes need two cores that nobody else works on. "
        "For a quick look: --only rank batch --rounds 3",
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=[*KINDS], metavar="TABLE", help=f"measure some tables: {', '.join(KINDS)} (all)")
    add("--rounds", type=positive, default=ROUNDS, help=f"turns of each row, {TURN:g} s or one step each ({ROUNDS})")
    add("--docs", action="store_true", help=f"write all tables to {PAGE} and {PICTURE} (needs matplotlib)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
