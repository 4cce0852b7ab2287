"""The rows of `growth.py` made ready: trainers, engines, lists of images and programs that wait for their turn.

Each `by_…` makes those of one table, in a folder; what it starts ends when the stack is closed.
"""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml

from ..configs.schema import RunConfig
from ..inference.engine import Engine, Request
from ..train.build import build_trainer
from ..train.outlook import dataset_ahead
from ..train.preflight import preflight
from ..train.trainer import Trainer
from .mixing import adapter, load
from .turns import Contestant, playing
from .work import SKS

THREADS = 1
ENDLESS = 1_000_000  # steps
RANKS, SIDES, BATCHES = (1, 4, 16, 64, 128), (32, 64, 96, 128, 192), (1, 2, 4, 8, 16)
TARGETS = ("attention", "attention+ff", "attention+ff+conv")
IMAGES, CHOSEN = (100, 1_000, 10_000, 100_000, 1_000_000), 1_000  # of them, samples in a step of their table
ADAPTERS, PROCESSES = (0, 1, 2, 4, 8), (1, 2)


@dataclass(frozen=True, slots=True)
class Ready:
    """A row that can take its turn."""

    name: str
    x: float  # number on the axis
    turn: Callable[[int], Sequence[float]]  # makes so many steps; the seconds of each


def in_this_process(step: Callable[[], object], steps: int) -> list[float]:
    """A turn of what is no program of its own: the seconds of each step."""
    return [_seconds(step) for _ in range(steps)]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# ---------------------------------------------------------------------------- training


def by_rank(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    for rank in RANKS:
        yield training(f"rank {rank}", rank, trainer(folder / f"{rank}", adapter={"rank": rank}))


def by_targets(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    for targets in TARGETS:
        own = trainer(folder / targets, adapter={"parts": {"unet": targets}})
        yield training(targets, len(own.run.adapters.modules()), own)


def by_resolution(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    for side in SIDES:
        data = {"resolution": side, "buckets": {"max_upscale": 4}}  # the demo's images have 64 px
        yield training(f"{side} px", side, trainer(folder / f"{side}", data=data))


def by_batch(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    for size in BATCHES:
        yield training(f"batch {size}", size, trainer(folder / f"{size}", loop={"batch_size": size}))


def training(name: str, x: float, own: Trainer) -> Ready:
    """A row whose step is that of a trainer."""
    return Ready(name, x, partial(in_this_process, own.train_step))


def trainer(run: Path, **sections: dict[str, Any]) -> Trainer:
    """One without callbacks; its run has a folder of its own, which others beside it leave alone."""
    built = build_trainer(RunConfig.model_validate(config_of(run, **sections)))
    built.callbacks = []
    return built


def config_of(run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run on the creature of the demo that does not end within the benchmark; runs side by side share a cache."""
    content: dict[str, dict[str, Any]] = {
        "model": {"base": "pocket"},
        "data": {"resolution": 64, "sources": [{"path": str(SKS), "caption": "a sks creature"}]},
        "adapter": {"rank": 4, "parts": {"unet": "attention"}},
        "loop": {"steps": ENDLESS, "threads": THREADS},
        "checkpoint": {"every": ENDLESS},
        "output": {"dir": str(run), "name": "grown"},
    }
    content["data"]["cache"] = {"dir": str(run.with_name("cache"))}
    for name, values in sections.items():
        content[name] |= values
    return content | {"trackers": []}


# ---------------------------------------------------------------------------- images, adapters, processes


def by_images(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    for count in IMAGES:
        listed = folder / f"listed-{count}"
        listed.mkdir()
        columns = {
            "file_name": [f"{index:07}.png" for index in range(count)],
            "text": [f"picture {index}" for index in range(count)],
            "width": [64] * count,
            "height": [64] * count,
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), listed / "metadata.parquet")
        yield Ready(f"{count:,} images", count, partial(in_this_process, choosing(folder / "run", listed)))


def choosing(run: Path, listed: Path) -> Callable[[], None]:
    """Says which are the next samples of a list, CHOSEN of them; no image is there, so none is opened."""
    config = RunConfig.model_validate(config_of(run, data={"sources": [{"path": str(listed)}]}))
    images = preflight(config, progress=False, trust_sizes=True, say=lambda missing: None)
    dataset, _ = dataset_ahead(config, images)
    order, positions = dataset.order(ENDLESS, 1, 1), itertools.count()

    def choose() -> None:
        for position in itertools.islice(positions, CHOSEN):
            dataset.sample(position, *order[position])

    return choose


def by_adapters(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    torch.use_deterministic_algorithms(False)  # as while sampling; trainers of other tables have asked for it
    request = Request(prompts=["a red star"], seeds=[0], steps=4)
    for count in ADAPTERS:
        engine = Engine.load("pocket")
        files = [adapter(engine, folder / f"{k}.safetensors", rank=8, seed=k) for k in range(count)]
        load(engine, files, fused=False)
        yield Ready(f"{count} adapters", count, partial(in_this_process, partial(engine.generate, request)))


def by_processes(folder: Path, stack: ExitStack) -> Iterator[Ready]:
    """Whole programs. The first process of a run takes the turns; the others wait where it does, for its gradients."""
    for world in PROCESSES:
        config = folder / f"{world}.yaml"
        config.write_text(yaml.safe_dump(config_of(folder / f"run-{world}", loop={"batch_size": 4}), sort_keys=False))
        command = [sys.executable, "-m", "loraloom.train", str(config)]
        first, *others = environments(world)
        for rank, environment in enumerate(others, start=1):
            log = stack.enter_context((folder / f"{world}-{rank}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
        name = f"{world} of one thread"
        player, _ = stack.enter_context(playing(Contestant(name, command, folder / f"{world}-0.log", first)))
        yield Ready(name, world, lambda steps, player=player: player.turn(steps).seconds)


def environments(world: int) -> list[dict[str, str]]:
    """Of each process of a run, as torchrun sets them (pytorch.org/docs/stable/elastic/run.html)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(os.environ) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(THREADS)}
    if world == 1:
        return [shared]
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
