"""The ONE place where config becomes objects."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..adapters.adapter import AdapterSet
from ..configs.choices import did_you_mean, find
from ..configs.errors import UserError
from ..configs.loader import dump_yaml
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
from .state import load_checkpoint, register_hooks
from .trainer import Trainer


def build_trainer(config: RunConfig, checkpoint: Path | None = None) -> Trainer:
    """A trainer that is ready to fit, at the step of `checkpoint` if one is given."""
    accelerator = Accelerator(
        mixed_precision=config.loop.precision,
        step_scheduler_with_optimizer=False,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=config.output.dir, logging_dir=f"{config.output.dir}/logs"),
    )
    config = resolve(config, accelerator.num_processes)
    set_numerics(config)
    folder = Path(config.output.dir)
    with accelerator.main_process_first():
        pinned = {"revision": pin_revision(config.model.base, config.model.revision)}
    config = config.model_copy(update={"model": config.model.model_copy(update=pinned)})
    if accelerator.is_main_process:
        (folder / "config.yaml").write_text(dump_yaml(config))
    family, parts = load_parts(
        config.model.base, revision=config.model.revision, family=config.model.family, dtype=config.model.dtype
    )
    check_resolution(config, family, parts)
    _move(parts, accelerator)
    samples = _make_samples(config, accelerator, family, parts, folder)
    adapters = make_adapters(config, family, parts)
    run = _make_run(config, folder, accelerator, family, parts, adapters)
    register_hooks(run)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)
    return Trainer(run, _make_batches(run, samples), make_objective(config, family, parts), _make_callbacks())


def resolve(config: RunConfig, world: int) -> RunConfig:
    """The config with the values that depend on the machine filled in, and checked against it."""
    loop = config.loop
    share, rest = divmod(loop.batch_size, world)
    micro_batch = loop.micro_batch or share
    if rest or share % micro_batch:
        raise UserError(
            f"loop.batch_size {loop.batch_size} cannot be split into micro-batches of {micro_batch} "
            f"on {world} processes: it must be a multiple of {micro_batch * world or world}"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = loop.threads or max(1, _cores() // local)
    resolved = loop.model_copy(update={"micro_batch": micro_batch, "threads": threads})
    return config.model_copy(update={"loop": resolved})


def set_numerics(config: RunConfig) -> None:
    """Threads and determinism of torch, which decide the bits of every kernel."""
    assert config.loop.threads is not None
    torch.set_num_threads(config.loop.threads)
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def check_resolution(config: RunConfig, family: ModelFamily, parts: Parts) -> None:
    """Raises UserError if pictures of this size do not fit the model."""
    multiple, resolution = family.size_multiple, config.data.resolution
    if resolution % multiple:
        down = resolution - resolution % multiple
        raise UserError(
            f"data.resolution {resolution} is no multiple of {multiple}, which {family.name} needs: "
            f"use {down} or {down + multiple}"
        )


def make_adapters(config: RunConfig, family: ModelFamily, parts: Parts) -> AdapterSet:
    """Injects the adapter of the config into the parts."""
    targets = {part: _target_names(family, part, preset) for part, preset in config.adapter.parts.items()}
    method = find("adapters.methods", config.adapter.method)
    return method.inject(parts, config.adapter, targets, key_seed(config.loop.seed, "adapter"))


def make_objective(config: RunConfig, family: ModelFamily, parts: Parts) -> Objective:
    """The loss of the config."""
    noise = family.noise(parts, min_snr_gamma=config.noise.min_snr_gamma, offset=config.noise.offset)
    return Objective(family, noise, config.loop.seed, config.loop.batch_size)


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
    """In the order in which they act after a step."""
    return [Progress(), Tracking(), StopOnSignal(), Checkpoints(), Validation(), Export(), Report()]


def _target_names(family: ModelFamily, part: str, preset: str) -> Sequence[str]:
    presets = family.targets.get(part)
    if presets is None:
        hint = did_you_mean(part, family.targets)
        raise UserError(f"adapter.parts: {family.name} has no part {part!r}{hint}; parts: {', '.join(family.targets)}")
    if preset not in presets:
        hint = did_you_mean(preset, presets)
        raise UserError(f"adapter.parts.{part}: no preset {preset!r}{hint}; presets: {', '.join(presets)}")
    return presets[preset]


def _move(parts: Parts, accelerator: Accelerator) -> None:
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(accelerator.device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Makes the run folder; removes what an old run left in it if that was asked for (not its class images)."""
    if overwrite:
        for name in ("checkpoints", "logs", "samples"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "run.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
