"""A few steps and one validation image for real, to know what a run will take: `loraloom plan --measure`."""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configs.data_sections import PriorSource
from ..configs.progress import Bar
from ..configs.schema import RunConfig
from ..configs.words import counted
from ..data.dataset import Dataset, Images
from ..models.encode import PROBE_PROMPT
from ..models.family import ModelFamily, Parts
from .build import assemble, make_accelerator, prepare
from .callbacks.checkpoint import Checkpoints
from .callbacks.requests import Requests
from .callbacks.tracking import Tracking
from .callbacks.validation import requests_of, sampling
from .precompute import Load, Wanted, fill
from .run import Run
from .state import save_checkpoint
from .trainer import Trainer

STEPS = 3  # after the first, in which kernels are chosen, memory is found, and blocks compiled
PARTS = ("data", "encode", "forward", "backward", "optimiser")
MISSING = 2  # entries of each cache that are made to see how long the rest takes


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process needs on this machine; seconds, and bytes."""

    device: str
    start: float  # until the first step: the base is read, and what its caches lacked for these steps is computed
    first_step: float
    step: float  # mean of the following
    seconds_of: dict[str, float]  # of a step: PARTS, callbacks, and what is left
    checkpoint: float
    image: float | None  # one validation image; None where none are wanted
    memory: int  # most in the steps, of the GPU where there is one, else of the process
    memory_with_image: int
    left: dict[str, float]  # seconds of everything that the run will do

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.left.values())


def measure(config: RunConfig, images: Sequence[Images | None]) -> Measured:
    """Trains a few steps in a folder that is thrown away. Class images are left out, trackers as well.

    Latents and embeddings of these steps go into the caches, where the run will find them.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, (config, images) = config, _narrowed(config, images, folder)
        started, caches = time.perf_counter(), _Caches()
        accelerator = make_accelerator(config)
        with Bar(total=3, desc="measuring", unit="part", leave=False, disable=None) as bar:
            trainer = assemble(
                prepare(config, accelerator, images, fill_caches=caches.fill), accelerator, overwrite=True
            )
            run, start = trainer.run, time.perf_counter() - started - caches.seconds
            bar.update()
            with trainer:
                first, steps = _train(trainer)
            seconds_of = {name: seconds / STEPS for name, seconds in run.seconds_of.items()}
            checkpoint, memory = _save(run), run.peak_memory
            bar.update()
            image = _sample(run) if config.validation.prompts else None
            bar.update()
        for callback in trainer.callbacks:
            callback.on_exit(run)
        step = statistics.fmean(steps)
        return Measured(
            device=_device(run),
            start=start,
            first_step=first,
            step=step,
            seconds_of=_parts(seconds_of, step),
            checkpoint=checkpoint,
            image=image,
            memory=memory,
            memory_with_image=run.peak_memory,
            left=_left(whole, start, caches.ahead, step, checkpoint, image),
        )


def _narrowed(config: RunConfig, images: Sequence[Images | None], folder: str) -> tuple[RunConfig, list[Images | None]]:
    """The config with its own images alone, in another folder."""
    pairs = [
        (section.model_copy(update={"share": None}), found)
        for section, found in zip(config.data.sources, images, strict=True)
        if not isinstance(section, PriorSource)
    ]
    update: dict[str, Any] = {
        "data": config.data.model_copy(update={"sources": [section for section, _ in pairs]}),
        "validation": config.validation.model_copy(update={"sources": []}),
        "output": config.output.model_copy(update={"dir": f"{folder}/run"}),
        "loop": config.loop.model_copy(update={"steps": max(config.loop.steps, STEPS + 1)}),
        "checkpoint": config.checkpoint.model_copy(update={"every": config.loop.steps + STEPS + 1}),
        "trackers": [],
    }
    return config.model_copy(update=update), [found for _, found in pairs]


class _Caches:
    """Fills the caches for the first steps, and reckons how long the rest takes."""

    def __init__(self) -> None:
        self.seconds = 0.0  # spent in making entries
        self.ahead = 0.0  # for all entries that are missing

    def fill(
        self, config: RunConfig, wanted: Wanted, dataset: Dataset, family: ModelFamily, load: Load, accelerator: Any
    ) -> None:
        """In the place of `train.precompute.fill`."""
        latents, prompts = wanted.missing()
        cuts, captions = _first_keys(config, wanted, dataset)
        for missing, narrowed in (
            (latents, wanted.only({*cuts, *latents[:MISSING]}, ())),
            (prompts, wanted.only((), {*captions, *prompts[:MISSING]})),
        ):
            loading = 0.0

            def timed_load(*asked: Any) -> Parts:
                nonlocal loading
                started = time.perf_counter()
                loaded = load(*asked)
                loading += time.perf_counter() - started
                return loaded

            made, started = len(set(missing) & ({*narrowed.cuts} | {*narrowed.captions})), time.perf_counter()
            fill(config, narrowed, dataset, family, timed_load, accelerator)
            seconds = time.perf_counter() - started
            self.seconds += seconds
            if made:
                self.ahead += loading + (seconds - loading) / made * len(missing)


def _first_keys(config: RunConfig, wanted: Wanted, dataset: Dataset) -> tuple[set[str], set[str]]:
    """What the first steps and a validation read of latents and of embeddings."""
    loop = config.loop
    assert loop.micro_batch is not None
    order = dataset.order(loop.steps, loop.batch_size, loop.micro_batch)
    samples = [dataset.sample(position, *order[position]) for position in range((STEPS + 1) * loop.batch_size)]
    spoken = [*(sample.caption for sample in samples), *config.validation.texts, "", PROBE_PROMPT]
    cuts = {dataset.latent_key(s.source, s.image, s.geometry) for s in samples} if wanted.latents is not None else set()
    return cuts, {wanted.prompt_key(caption) for caption in spoken} if wanted.prompts is not None else set()


def _train(trainer: Trainer) -> tuple[float, list[float]]:
    """Seconds of the first step and of the following, callbacks and all."""
    run = trainer.run
    run.waits, trainer.callbacks = True, [Tracking(), Requests(), Checkpoints()]
    for callback in trainer.callbacks:
        callback.on_start(run)
    seconds = []
    for number in range(STEPS + 1):
        if number == 1:
            run.seconds_of.clear()
        started = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1:]


def _save(run: Run) -> float:
    started = time.perf_counter()
    save_checkpoint(run)
    return time.perf_counter() - started


def _sample(run: Run) -> float:
    """The first validation image."""
    with sampling(run) as engine, run.timed("image"):
        engine.generate(requests_of(run)[0].part([0]), progress="one image")
    return run.seconds_of["image"]


def _parts(seconds_of: dict[str, float], step: float) -> dict[str, float]:
    """In the order of a step; callbacks together, and what nobody has counted."""
    found = {name: seconds_of.get(name, 0.0) for name in PARTS}
    found["callbacks"] = sum(seconds for name, seconds in seconds_of.items() if name not in PARTS)
    return found | {"the rest": max(0.0, step - sum(found.values()))}


def _left(
    config: RunConfig, start: float, caches: float, step: float, checkpoint: float, image: float | None
) -> dict[str, float]:
    steps, validation = config.loop.steps, config.validation
    times = math.ceil(steps / validation.every) + validation.at_start
    pictures = times * len(validation.sections) * validation.num_images
    return {
        "start": start,
        "caches": caches,
        f"{steps:,} steps": steps * step,
        f"{pictures:,} images": pictures * (image or 0.0),
        "checkpoints": math.ceil(steps / config.checkpoint.every) * checkpoint,
    }


def _device(run: Run) -> str:
    if run.accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(run.accelerator.device)
    return f"{run.accelerator.device.type}, {counted(run.config.loop.threads or 1, 'thread')}"
