"""How the cost of a step grows: with rank, targets, resolution, batch, images, adapters and processes, on pocket.

    python -m loraloom.benchmarks.growth            prints the tables
    python -m loraloom.benchmarks.growth --docs     also writes docs/growth.md and docs/growth.png

Each row is the median of STEPS steps after WARM_UP. The rows of a table come one after the other, not in turn: what is
said is how they grow, not which of two neighbours is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import yaml

from ..configs.errors import run_command
from ..configs.files import replace_file
from ..configs.schema import RunConfig
from ..inference.engine import Engine, Request
from ..train.build import build_trainer
from ..train.outlook import dataset_ahead
from ..train.preflight import preflight
from .mixing import adapter, load
from .work import SKS

PAGE, PICTURE = Path("docs/growth.md"), Path("docs/growth.png")
STEPS, WARM_UP, THREADS = 10, 3, 1


@dataclass(frozen=True, slots=True)
class Growth:
    """A table and its plot."""

    title: str
    unit: str
    limit: str  # what limits it, in a sentence
    rows: Sequence[tuple[str, float, float]]  # name, number on the x axis, milliseconds


def main(arguments: Sequence[str]) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.growth", description=main.__doc__)
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE} and {PICTURE} (needs matplotlib)")
    options = parser.parse_args(list(arguments))
    torch.set_num_threads(THREADS)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for measure in MEASURES:
            found.append(measure(Path(folder)))
            print(table(found[-1]), flush=True)
    if options.docs:
        draw(found)
        replace_file(PAGE, page(found))
    return 0


# ---------------------------------------------------------------------------- training


def by_rank(folder: Path) -> Growth:
    rows = [(f"rank {rank}", rank, step_time(folder, adapter={"rank": rank})) for rank in (1, 4, 16, 64, 128)]
    limit = "The base's own products: those of the LoRA are thin until the rank is near the width of the layers (128)."
    return Growth("Rank", "rank", limit, rows)


def by_targets(folder: Path) -> Growth:
    rows = []
    for targets in ("attention", "attention+ff", "attention+ff+conv"):
        found: dict[str, int] = {}
        took = step_time(folder, found, adapter={"parts": {"unet": targets}})
        rows.append((targets, found["modules"], took))
    limit = (
        "Each module adds two thin products forward and four backward; convolutions also go through layers of PEFT's."
    )
    return Growth("Targets", "adapted modules", limit, rows)


def by_resolution(folder: Path) -> Growth:
    rows = []
    for side in (32, 64, 96, 128, 192):
        data = {"resolution": side, "buckets": {"max_upscale": 4}}  # the demo's images have 64 px
        rows.append((f"{side} px", side, step_time(folder, data=data)))
    limit = "Pixels: convolutions grow with the area, attention at full resolution with its square."
    return Growth("Resolution", "pixels a side", limit, rows)


def by_batch(folder: Path) -> Growth:
    rows = [(f"batch {size}", size, step_time(folder, loop={"batch_size": size})) for size in (1, 2, 4, 8, 16)]
    limit = "Arithmetic from about four samples on; below, what each layer costs whatever its input."
    return Growth("Batch", "samples of a step", limit, rows)


def step_time(folder: Path, found: dict[str, int] | None = None, **sections: dict[str, Any]) -> float:
    """Milliseconds of a step of the trainer; `found` gets the number of adapted modules."""
    trainer = build_trainer(RunConfig.model_validate(config_of(folder, **sections)), overwrite=True)
    trainer.callbacks = []
    for _ in range(WARM_UP):
        trainer.train_step()
    if found is not None:
        found["modules"] = len(trainer.run.adapters.modules())
    return 1e3 * statistics.median(_timed(trainer.train_step) for _ in range(STEPS))


def config_of(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run on the creature of the demo that does not end within the benchmark."""
    content: dict[str, dict[str, Any]] = {
        "model": {"base": "pocket"},
        "data": {"resolution": 64, "sources": [{"path": str(SKS), "caption": "a sks creature"}]},
        "adapter": {"rank": 4, "parts": {"unet": "attention"}},
        "loop": {"steps": 1000, "threads": THREADS},
        "checkpoint": {"every": 100_000},
        "output": {"dir": str(folder / "run"), "name": "grown"},
    }
    content["data"]["cache"] = {"dir": str(folder / "cache")}
    for name, values in sections.items():
        content[name] |= values
    return content | {"trackers": []}


# ---------------------------------------------------------------------------- images, adapters, processes


def by_images(folder: Path) -> Growth:
    rows = []
    for count in (100, 1_000, 10_000, 100_000, 1_000_000):
        listed = folder / f"listed-{count}"
        listed.mkdir()
        columns = {
            "file_name": [f"{index:07}.png" for index in range(count)],
            "text": [f"picture {index}" for index in range(count)],
            "width": [64] * count,
            "height": [64] * count,
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), listed / "metadata.parquet")
        config = RunConfig.model_validate(config_of(folder, data={"sources": [{"path": str(listed)}]}))
        dataset, _ = dataset_ahead(config, preflight(config, trust_sizes=True))
        order = dataset.order(config.loop.steps, 1, 1)
        seconds = []
        for position in range(1000):
            started = time.perf_counter()
            dataset.sample(position, *order[position])
            seconds.append(time.perf_counter() - started)
        rows.append((f"{count:,} images", count, 1e3 * statistics.median(seconds)))
    limit = "Nothing that grows: the order of an epoch is a function of (seed, position), one sample at a time."
    return Growth("Images: which sample comes next", "images", limit, rows)


def by_adapters(folder: Path) -> Growth:
    engine = Engine.load("pocket")
    files = [adapter(engine, folder / f"{k}.safetensors", rank=8, seed=k) for k in range(8)]
    request, rows = Request(prompts=["a red star"], seeds=[0], steps=10), []
    for count in (0, 1, 2, 4, 8):
        load(engine, files[:count], fused=False)
        engine.generate(request)
        seconds = [_timed(partial(engine.generate, request)) for _ in range(5)]
        rows.append((f"{count} adapters", count, 1e3 * statistics.median(seconds)))
        engine.adapters.delete_adapters(engine.adapters.get_names())
    limit = "PEFT's layers: each active adapter adds its products to every layer. Fused they cost nothing."
    return Growth("Adapters: an image of ten steps", "adapters", limit, rows)


def by_processes(folder: Path) -> Growth:
    rows = []
    for world in (1, 2):
        config = folder / f"{world}.yaml"
        content = config_of(folder, loop={"steps": WARM_UP + 3 * STEPS, "batch_size": 4})
        content["output"]["dir"] = str(folder / f"run-{world}")
        config.write_text(yaml.safe_dump(content))
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=29613"]
        environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(THREADS)}
        command = [*launch, "-m", "loraloom.train", str(config)]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        history = (folder / f"run-{world}" / "logs" / "history.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["seconds"] for line in history][WARM_UP:]
        rows.append((f"{world} of one thread", world, 1e3 * statistics.median(seconds)))
    limit = "A batch of 4 either way: the halves, the adapter's gradients on the wire, and memory that both share."
    return Growth("Processes: a step of four samples", "processes", limit, rows)


MEASURES: Sequence[Callable[[Path], Growth]] = (
    *(by_rank, by_targets, by_resolution, by_batch),
    *(by_images, by_adapters, by_processes),
)


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------- the page


def table(growth: Growth) -> str:
    """Markdown."""
    first = growth.rows[0][2]
    lines = [f"## {growth.title}\n", f"{growth.limit}\n", f"| | {growth.unit} | ms | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {x:,} | {milli:.3g} | {milli / first:.2f} |" for name, x, milli in growth.rows]
    return "\n".join(lines) + "\n"


def page(found: Sequence[Growth]) -> str:
    """docs/growth.md."""
    return "\n".join(_lines(found))


def _lines(found: Sequence[Growth]) -> Iterator[str]:
    yield "# How the cost of a step grows\n"
    yield "Written by `python -m loraloom.benchmarks.growth --docs`: pocket, one thread, LoRA of rank 4 on attention, a"
    yield f"batch of one at 64 px where nothing else is said; medians of {STEPS} steps.\n"
    yield f"![time against each of them]({PICTURE.name})\n"
    yield from map(table, found)


def draw(found: Sequence[Growth]) -> None:
    """All plots in one picture; both axes from zero but that of images, which is logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(2, 4, figsize=(14, 6.4), layout="constrained")
    for place, growth in zip(places.flat, found, strict=False):
        xs, ys = [row[1] for row in growth.rows], [row[2] for row in growth.rows]
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
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    sys.exit(run_command(main))
