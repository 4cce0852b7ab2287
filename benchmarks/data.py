"""python -m loraloom.benchmarks.data: the data floor against what one would write by hand.

Each part gives its contestants as functions that do the same work on the same files; the first is the bare one. They
take turns (A B A B …), so that what else the machine does falls on both; the ratio is of the medians of their rates.
"""

import argparse
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from ..configs.data_sections import DataSection, FolderSource
from ..configs.schema import ModelSection, RunConfig
from ..data.findings import cores
from ..data.sample import Batch
from ..data.scan import scan
from ..data.source import open_source
from ..models.encode import encode_image
from ..models.family import ModelFamily, Parts
from ..models.load import Base
from ..train.build import build_trainer

ROUNDS, SIDE, PICTURES = 5, 1024, 20
STEPS, SMALL, LARGE = 200, 50, 512  # steps of a turn; PNGs and their side in pixels


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
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the list that is planned")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        make_photos(photos, chosen.images)
        print(f"{chosen.images} JPEGs of {SIDE} px, {cores()} cores, Pillow {Image.__version__}\n")
        print("| part | contestant | median | min .. max | ratio to bare | bar |\n|---|---|---|---|---|---|")
        for part in [scan_part(photos, chosen.images)]:
            print("\n".join(table_rows(part, take_turns(part.contestants))), flush=True)
        print(f"\n{STEPS} steps with {SMALL} PNGs of {LARGE} px for pocket (64 px), batch 1, one core\n")
        print("| data of a step | median, ms | min .. max | ratio to the peer's way | bar |\n|---|---|---|---|---|")
        print("\n".join(step_rows(Path(folder))), flush=True)
        print(f"\n`loraloom plan` of a Parquet list of {chosen.rows:,} images with their sizes\n")
        print("| | measured | bar |\n|---|---|---|")
        print("\n".join(plan_rows(Path(folder), chosen.rows)), flush=True)


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


def step_rows(folder: Path) -> Iterable[str]:
    """The peer's way (decode, resize and encode at every step), ours without a cache, and ours with it."""
    torch.set_num_threads(1)
    photos = folder / "pngs"
    photos.mkdir()
    for index in range(SMALL):
        with Image.open(io.BytesIO(encode_photo(index))) as photo:
            photo.resize((LARGE, LARGE)).save(photos / f"{index}.png")
    base = Base(ModelSection(base="pocket"))
    vae = base.load(["vae"])
    encode, loop = peer_step(sorted(photos.iterdir()), vae["vae"]), {"batch_size": 1, "steps": 10**6}
    contestants: dict[str, Callable[[], object]] = {"the peer's way": encode}
    for name, cached in (("loraloom, not cached", False), ("loraloom, cached", True)):
        data = {"resolution": 64, "sources": [{"path": str(photos), "caption": "x"}], "cache": {"latents": cached}}
        data["cache"] |= {"dir": str(folder / "cache"), "prompts": cached}
        config = {"model": {"base": "pocket"}, "data": data, "loop": loop, "output": {"dir": str(folder / "run")}}
        batches = build_trainer(RunConfig.model_validate(config), overwrite=True).batches
        contestants[name] = (
            partial(next, batches) if cached else lambda batches=batches: encode_batch(base.family, vae, next(batches))
        )
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, step in contestants.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[name].append((time.perf_counter() - started) / STEPS * 1e3)
    bare = statistics.median(times["the peer's way"])
    for name, values in times.items():
        middle, bar = statistics.median(values), "under 0.3 ms" if name.endswith(", cached") else ""
        yield f"| {name} | {middle:.3f} | {min(values):.3f} .. {max(values):.3f} | {middle / bare:.3f} | {bar} |"


def peer_step(files: list[Path], vae: Any) -> Callable[[], object]:
    """As the DreamBooth example of diffusers does it, with Pillow in the place of torchvision."""
    turn = itertools.cycle(files)

    @torch.no_grad()
    def step() -> object:
        with Image.open(next(turn)) as image:
            small = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        return vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor

    return step


def encode_batch(family: ModelFamily, parts: Parts, batch: Batch) -> object:
    """What the loop does with pixels."""
    assert batch.pixels is not None
    return [encode_image(family, parts, pixels) for pixels in batch.pixels]


def plan_rows(folder: Path, rows: int) -> Iterable[str]:
    """Time and memory of the plan, in a process of its own."""
    draw, listed = np.random.default_rng(0), folder / "listed"
    listed.mkdir()
    words = np.array(
        [
            "a",
            "photo",
            "of",
            "the",
            "red",
            "blue",
            "small",
            "large",
            "round",
            "dog",
            "cat",
            "star",
            "moon",
            "in",
            "garden",
            "at",
            "night",
        ]
    )
    sides = draw.integers(600, 1600, (rows, 2), dtype=np.int32)
    columns = {
        "file_name": [f"{index // 1000:04}/{index:07}.jpg" for index in range(rows)],
        "text": [" ".join(words[choice]) for choice in draw.integers(0, len(words), (rows, 12))],
        "width": sides[:, 0],
        "height": sides[:, 1],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), listed / "metadata.parquet")
    config = folder / "plan.yaml"
    config.write_text(
        f"model: {{base: pocket}}\ndata: {{resolution: 64, sources: [{{path: {listed}}}]}}\n"
        f"loop: {{steps: 1000, batch_size: 4}}\noutput: {{dir: {folder / 'planned'}}}\n"
    )
    program = "import runpy, sys; sys.argv = ['plan', sys.argv[1]]\ntry: runpy.run_module('loraloom.train.plan', "
    program += "run_name='__main__')\nfinally: print(open('/proc/self/status').read(), file=sys.stderr)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    peak = next(int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("VmHWM"))
    assert f"{rows:,}" in done.stdout
    yield f"| time | {seconds:.1f} s | under 60 s |"
    yield f"| peak memory | {peak / 1000:.0f} MB | under 600 MB |"


if __name__ == "__main__":
    main()
