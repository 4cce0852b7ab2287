"""python -m loraloom.benchmarks.data: the data floor against what one would write by hand.

Each part gives its contestants as functions that do the same work on the same files; the first is the bare one. They
take turns (A B A B …), so that what else the machine does falls on both; the ratio is of the medians of their rates.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..configs.schema import DataSection, FolderSource
from ..data.findings import cores
from ..data.scan import scan
from ..data.source import open_source

ROUNDS, SIDE, PICTURES = 5, 1024, 20


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured, and who does it."""

    what: str  # name and unit of the rate
    count: int  # of that unit in one call
    contestants: dict[str, Callable[[], None]]  # the bare one first
    bar: float  # smallest ratio to the bare rate that is good enough


def main() -> None:
    """Prints a Markdown table of rates and ratios."""
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.data", description=main.__doc__)
    parser.add_argument("--images", type=int, default=2000, help="how many JPEGs of 1024 px (200 for a quick look)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        make_photos(photos, chosen.images)
        print(f"{chosen.images} JPEGs of {SIDE} px, {cores()} cores, Pillow {Image.__version__}\n")
        print("| part | contestant | median | min .. max | ratio to bare | bar |\n|---|---|---|---|---|---|")
        for part in [scan_part(photos, chosen.images)]:
            print("\n".join(table_rows(part, take_turns(part.contestants))), flush=True)


def take_turns(contestants: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of one call, for each round of each contestant."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return times


def table_rows(part: Part, times: dict[str, list[float]]) -> Iterable[str]:
    """A line of the table for each contestant."""
    rates = {name: [part.count / seconds for seconds in values] for name, values in times.items()}
    bare = statistics.median(next(iter(rates.values())))
    for number, (name, values) in enumerate(rates.items()):
        middle = statistics.median(values)
        bar = f"{part.bar:g}" if number else ""
        spread = f"{min(values):.0f} .. {max(values):.0f}"
        yield f"| {part.what} | {name} | {middle:.0f} | {spread} | {middle / bare:.2f} | {bar} |"


def make_photos(folder: Path, count: int) -> None:
    """So many files with a few pictures in turn: noise on gradients, some 400 kB each, as photos are."""
    folder.mkdir()
    pictures = [encode_photo(seed) for seed in range(PICTURES)]
    for index in range(count):
        (folder / f"{index:05}.jpg").write_bytes(pictures[index % PICTURES])


def encode_photo(seed: int) -> bytes:
    """A JPEG of SIDE x SIDE pixels."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, SIDE)
    gradient = ramp[:, None, None] * draw.uniform(0, 200, 3) + ramp[None, :, None] * draw.uniform(0, 50, 3)
    pixels = (gradient + draw.normal(0, 12, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def scan_part(photos: Path, count: int) -> Part:
    """Decoding every image in threads: nothing else, and as the scan does it, with hashes, checks and its memory."""
    files = sorted(photos.iterdir())

    def decode(file: Path) -> None:
        with Image.open(file) as image:
            image.convert("RGB")

    def bare() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(decode, files):
                pass

    section = FolderSource(path=str(photos), caption="")
    data = DataSection(sources=[section])

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            found = scan(open_source(section), data, progress=False, cache=Path(cache))
        assert len(found.sizes) == count and not found.problems

    return Part("scan, images/s", count, {"bare": bare, "loraloom": ours}, bar=0.8)


if __name__ == "__main__":
    main()
