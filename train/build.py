"""The ONE place where config becomes objects."""

import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ..adapters.adapter import AdapterSet, Targets
from ..configs.choices import did_you_mean, find
from ..configs.errors import UserError
from ..configs.schema import FolderSource, RunConfig
from ..data.draws import key_seed
from ..data.loader import Samples, micro_batches
from ..data.order import Order
from ..data.sample import Batch, Sample
from ..data.sources import folder_samples, prior_samples
from ..inference.engine import Engine, load_parts
from ..models.base import pin_revision
from ..models.family import ModelFamily, Parts
from .callback import Callback
from .callbacks.checkpoint import Checkpoints
from .callbacks.export import Export
from .callbacks.progress import Progress
from .callbacks.report import Report
from .callbacks.signals import StopOnSignal
from .callbacks.tracking import Tracking
from .callbacks.validation import Validation
from .objective import Objective
from .optim import make_optimizer, make_schedule
from .prior import class_image_files
from .run import Run
from .run_folder import prepare_folder, write_config
from .state import load_checkpoint, register_hooks
from .trainer import Trainer

LONGEST_WAIT = timedelta(hours=12)  # of the other processes while the main one makes class images


def build_trainer(config: RunConfig, *, checkpoint: Path | None = None, overwrite: bool = False) -> Trainer:
    """A trainer that is ready to fit, at the step of `checkpoint` if one is given.

    Nothing is written, and nothing of an older run removed, before the base is loaded and fits the config.
    """
    accelerator = _make_accelerator(config)
    config = resolve(config, accelerator)
    set_numerics(config)
    folder = Path(config.output.dir)
    family, parts = load_parts(
        config.model.base, revision=config.model.revision, family=config.model.family, dtype=config.model.dtype
    )
    check_resolution(config, family)
    target_names(config, family)
    objective = make_objective(config, family, parts)
    if accelerator.is_main_process:
        _warn_of_long_captions(config, family, parts)
        if checkpoint is None:
            prepare_folder(folder, config.output.name, overwrite=overwrite)
    _move(parts, accelerator)
    samples = _make_samples(config, accelerator, family, parts, folder)
    adapters = make_adapters(config, family, parts)
    run = _make_run(config, folder, accelerator, family, parts, adapters)
    register_hooks(run)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)
    if run.is_main:
        write_config(config, folder)
    return Trainer(run, _make_batches(run, samples), objective, _make_callbacks())


def _make_accelerator(config: RunConfig) -> Accelerator:
    folder = config.output.dir
    accelerator = Accelerator(
        mixed_precision=config.loop.precision,
        step_scheduler_with_optimizer=False,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/logs"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    if config.loop.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("loop.precision fp16 needs an accelerator, and there is none here: use bf16 or no")
    return accelerator


def resolve(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The config with the values filled in that depend on the machine or the hub, and checked against it."""
    loop, world = config.loop, accelerator.num_processes
    share, rest = divmod(loop.batch_size, world)
    micro_batch = loop.micro_batch or share
    if rest or share % micro_batch:
        raise UserError(
            f"loop.batch_size {loop.batch_size} cannot be split into micro-batches of {micro_batch} "
            f"on {world} processes: it must be a multiple of {micro_batch * world or world}"
        )
    threads = loop.threads or max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with accelerator.main_process_first():
        revision = pin_revision(config.model.base, config.model.revision)
    return config.model_copy(
        update={
            "loop": loop.model_copy(update={"micro_batch": micro_batch, "threads": threads}),
            "model": config.model.model_copy(update={"revision": revision}),
        }
    )


def set_numerics(config: RunConfig) -> None:
    """Threads and determinism of torch, which decide the bits of every kernel."""
    assert config.loop.threads is not None
    torch.set_num_threads(config.loop.threads)
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.loop.deterministic, warn_only=True)


def check_resolution(config: RunConfig, family: ModelFamily) -> None:
    """Raises UserError if pictures of this size do not fit the family."""
    multiple, resolution = family.size_multiple, config.data.resolution
    if resolution % multiple:
        down = resolution - resolution % multiple
        raise UserError(
            f"data.resolution {resolution} is no multiple of {multiple}, which {family.name} needs: "
            f"use {down} or {down + multiple}"
        )


def target_names(config: RunConfig, family: ModelFamily) -> Targets:
    """Part -> endings of the names of the modules to adapt; UserError for a part or preset that there is not."""
    targets: dict[str, Sequence[str]] = {}
    for part, preset in config.adapter.parts.items():
        presets = family.targets.get(part)
        if presets is None:
            hint, parts = did_you_mean(part, family.targets), ", ".join(family.targets)
            raise UserError(f"adapter.parts: {family.name} has no part {part!r}{hint}; there are: {parts}")
        if preset not in presets:
            hint = did_you_mean(preset, presets)
            raise UserError(f"adapter.parts.{part}: no preset {preset!r}{hint}; there are: {', '.join(presets)}")
        targets[part] = presets[preset]
    return targets


def make_adapters(config: RunConfig, family: ModelFamily, parts: Parts) -> AdapterSet:
    """Injects the adapter of the config into the parts."""
    method = find("adapters.methods", config.adapter.method)
    seed = key_seed(config.loop.seed, "adapter")
    return method.inject(parts, config.adapter, target_names(config, family), seed)


def make_objective(config: RunConfig, family: ModelFamily, parts: Parts) -> Objective:
    """The loss of the config."""
    return Objective(family, family.noise(parts, config.noise), config.loop.seed, config.loop.batch_size)


def _make_run(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    family: ModelFamily,
    parts: Parts,
    adapters: AdapterSet,
) -> Run:
    optimizer = make_optimizer(adapters, config.optimizer)
    schedule = make_schedule(optimizer, config.optimizer, config.loop.steps)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    wrapped = {part: accelerator.prepare(module) for part, module in adapters.carriers.items()}
    for module in wrapped.values():
        module.train()
    return Run(config, folder, accelerator, family, parts | wrapped, adapters, optimizer, schedule)


def _make_samples(
    config: RunConfig, accelerator: Accelerator, family: ModelFamily, parts: Parts, folder: Path
) -> list[list[Sample]]:
    samples: list[list[Sample]] = []
    for source in config.data.sources:
        if isinstance(source, FolderSource):
            samples.append(folder_samples(source))
        else:
            with accelerator.main_process_first():
                engine, seed = Engine(family, parts), config.loop.seed
                files = class_image_files(source, config.model, engine, config.data.resolution, seed, folder)
            samples.append(prior_samples(source, files))
    return samples


def _make_batches(run: Run, sources: Sequence[Sequence[Sample]]) -> Iterator[Batch]:
    config, accelerator = run.config, run.accelerator
    given = [source.share for source in config.data.sources if source.share is not None]
    order = Order(config.loop.seed, [len(samples) for samples in sources], given or None)
    assert config.loop.micro_batch is not None
    return micro_batches(
        Samples(sources, order, config.data.resolution),
        first_step=run.step,
        steps=config.loop.steps,
        batch_size=config.loop.batch_size,
        micro_batch=config.loop.micro_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


def _make_callbacks() -> list[Callback]:
    """In the order in which they act."""
    return [Progress(), Tracking(), StopOnSignal(), Checkpoints(), Validation(), Export(), Report()]


def _warn_of_long_captions(config: RunConfig, family: ModelFamily, parts: Parts) -> None:
    captions = [source.caption if isinstance(source, FolderSource) else source.prior for source in config.data.sources]
    for caption in dict.fromkeys([*captions, *config.validation.prompts]):
        if (tokens := family.count_tokens(parts, caption)) > family.token_window:
            cut = f"{tokens} tokens with begin and end, only the first {family.token_window} are seen"
            print(f"warning: {caption[:60]!r}… has {cut}", file=sys.stderr)


def _move(parts: Parts, accelerator: Accelerator) -> None:
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(accelerator.device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
