"""The ONE place where config becomes objects."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.callbacks import PipelineCallback

from ..adapters.adapter import AdapterSet
from ..adapters.artifact import AdapterArtifact, canonical_path
from ..adapters.combined import Combined
from ..adapters.format import read
from ..adapters.targets import layer_parts, targets_of
from ..adapters.token_embeddings import inject_tokens
from ..configs.choices import did_you_mean, find
from ..configs.data_sections import PriorSource
from ..configs.errors import UserError
from ..configs.machine import cache_folder
from ..configs.machine import threads as threads_here
from ..configs.plain import plain
from ..configs.processes import launched
from ..configs.schema import RunConfig
from ..data.dataset import Dataset, Images
from ..data.draws import key_seed
from ..data.loader import Samples, Share, micro_batches
from ..data.source import Given
from ..inference.compilation import compile_blocks, compile_whole
from ..inference.engine import Engine
from ..inference.merged import MergedBase
from ..models.base import pin_revision
from ..models.encode import IMAGE_DTYPE, Encode, encoder_of
from ..models.family import Conditioning, ModelFamily, Parts
from ..models.noise.ddpm import training_scheduler
from .base_key import base_key, base_settings
from .callback import Callback, own_callbacks
from .callbacks.card import Card
from .callbacks.checkpoint import Checkpoints
from .callbacks.export import Export
from .callbacks.held_out import HeldOut, HeldOutLoss
from .callbacks.progress import Progress
from .callbacks.report import Report
from .callbacks.requests import Requests
from .callbacks.tracking import Tracking
from .callbacks.validation import Validation
from .captions import find_long_captions, find_unseen_captions, prompt_options
from .ema import Ema
from .fast import fast_optimizer, use_fast_layers
from .fits import check_base_fits, trained_parts
from .footprint import check_start
from .gather import class_images, gather, held_out_data, make_dataset
from .held_out import HeldOutImage, encode_held_out, samples_of
from .launched import check_environment, unused
from .objective import Objective
from .optim import make_optimizer, make_schedule
from .precompute import Wanted, fill, want
from .preflight import preflight
from .prior import class_image_files
from .record import file_hash
from .run import Run
from .run_folder import prepare_folder, write_config
from .sharding import set_up_sharding, wrap
from .state import is_of_older, load_checkpoint, register_hooks
from .together import LONGEST_WAIT, check_shared, check_world, leave_in_peace, shards
from .trainer import Trainer
from .writable import check_formats


def build_trainer(
    config: RunConfig,
    images: Sequence[Images | None] | None = None,
    *,
    given: Given | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    overwrite: bool = False,
) -> Trainer:
    """A trainer that is ready to `fit`, at the step of `checkpoint` if one is given; `with` closes its workers.

    `given` has the images of the sources that are called so: name -> a list of PIL images, of (image, caption) or of
    (image, [captions]), or a `datasets.Dataset`. `callbacks` come before ours: they see each step first. `images` are
    those of a `preflight`, which is made here where there was none.

    UserError, with all problems at once, before anything is written: for a folder that holds a run already (unless
    `overwrite`), for a base that cannot be loaded or does not fit the config, for images that cannot be read.

    It changes torch for the whole process, as the config says: the number of threads (`loop.threads`) and whether
    kernels are deterministic (`loop.deterministic`, which also sets CUBLAS_WORKSPACE_CONFIG if nothing has).
    Signals are handled where `fit` runs in the main thread, and else left to the caller.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if images is None:
        check_start(config, overwrite=overwrite, resume=checkpoint is not None)
        images = preflight(config, progress=launched()[0] == 0, given=given)
    accelerator = make_accelerator(config)
    ready = prepare(config, accelerator, images, given=given)
    return assemble(ready, accelerator, callbacks, checkpoint=checkpoint, overwrite=overwrite)


def assemble(
    ready: "Prepared",
    accelerator: Accelerator,
    callbacks: Sequence[Callback] = (),
    *,
    checkpoint: Path | None = None,
    overwrite: bool = False,
    writes: bool = True,
) -> Trainer:
    """A trainer on what is prepared; it touches nothing in the run folder unless it `writes`."""
    own = own_callbacks(ready.config.callbacks, Callback, "callbacks")
    own_callbacks(
        ready.config.validation.callbacks, PipelineCallback, "validation.callbacks"
    )  # before a model is loaded
    config, base, dataset, wanted = ready.config, ready.base, ready.dataset, ready.wanted
    folder, loop = Path(config.output.dir), config.loop
    assert loop.micro_batch is not None
    parts = base.load(_resident(config, base.family, wanted))
    encoders = base.family.image_encoders
    if wanted.latents is None:
        parts |= base.load(encoders, IMAGE_DTYPE)
    held_out: list[HeldOutImage] = []
    if ready.held_out is not None:
        held_out = encode_held_out(ready.held_out, base.family, base.load(encoders, IMAGE_DTYPE))
    parts["scheduler"] = training_scheduler(parts["scheduler"], config.noise)
    unread_too = checkpoint is not None and is_of_older(checkpoint)
    adapters = make_adapters(config, base.family, parts, unread_too=unread_too)
    if config.adapter.start_from is not None and checkpoint is None:
        adapters.begin_with(_read_by(config, base, parts, read(config.adapter.start_from, base.names)))
    check_formats(config, base.family, parts, adapters)
    objective = make_objective(config, base.family, parts, adapters)
    if writes and accelerator.is_main_process:
        prepare_folder(folder, config.output.name, overwrite=overwrite and checkpoint is None)
    encode = _make_encode(config, base.family, parts, wanted, accelerator)
    data = dataset.fingerprint(loop.micro_batch) | {"base": base_key(config), "dtype": config.model.dtype}
    data |= {"latents": "fp32", "base_settings": base_settings(config)}
    data["start_from"] = file_hash(config.adapter.start_from)
    run = _make_run(config, folder, accelerator, base, parts, adapters, encode, data)
    measured = None
    if held_out:
        measured = HeldOut(held_out, objective.noise, config.validation.timesteps, loop.micro_batch)
    register_hooks(run)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)
    if writes and run.is_main:
        write_config(config, folder, resumed=checkpoint is not None)
    share = Share(loop.batch_size, loop.micro_batch, accelerator.process_index, accelerator.num_processes)
    samples = Samples(dataset, dataset.order(loop.steps, loop.batch_size, loop.micro_batch), wanted.cached)
    batches = micro_batches(samples, share, first_step=run.step, steps=loop.steps, workers=config.data.workers)
    return Trainer(run, batches, objective, [*own, *callbacks, *_make_callbacks(measured)])


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run stands on."""

    config: RunConfig  # resolved
    base: MergedBase
    dataset: Dataset
    wanted: Wanted  # all there
    held_out: Dataset | None  # images that are not trained on


def prepare(
    config: RunConfig,
    accelerator: Accelerator,
    images: Sequence[Images | None],
    fill_caches: Callable[..., None] = fill,
    given: Given | None = None,
) -> Prepared:
    """The images of a run in their buckets, and its caches, complete unless another function fills them."""
    config = resolve(config, accelerator)
    set_numerics(config)
    cache = cache_folder(config.data.cache.dir)
    check_shared(accelerator, {"output.dir": Path(config.output.dir), "data.cache.dir": cache})
    base = MergedBase(config.model, accelerator.device)
    check_base_fits(config, base.family)
    dataset = build_dataset(config, accelerator, base, images)
    held_out = build_held_out(config, base, accelerator, given)
    captions = [sample.caption for sample in samples_of(held_out)] if held_out is not None else []
    wanted = want(config, base.family, base.folder, dataset, captions)
    fill_caches(config, wanted, dataset, base.family, base.load, accelerator)
    return Prepared(config, base, dataset, wanted, held_out)


def build_held_out(
    config: RunConfig, base: MergedBase, accelerator: Accelerator, given: Given | None = None
) -> Dataset | None:
    """The images of `validation.sources` in their buckets. What is to be said of them, the preflight has said."""
    if not config.validation.sources:
        return None
    data = held_out_data(config.data, config.validation)
    images = gather(data, progress=accelerator.is_main_process, say=lambda note: None, given=given)
    found = [each for each in images if each is not None]
    return make_dataset(data, found, base.family.size_multiple, config.loop.seed)


def build_dataset(
    config: RunConfig, accelerator: Accelerator, base: MergedBase, images: Sequence[Images | None]
) -> Dataset:
    """All images in their buckets, class images made; captions counted."""
    data = config.data
    found: list[Images] = []
    for section, known in zip(data.sources, images, strict=True):
        if isinstance(section, PriorSource):
            with accelerator.main_process_first():
                files = class_image_files(section, config, lambda: Engine(base.family, base.load()))
            known = class_images(data, section, files)
        assert known is not None
        found.append(known)
    dataset = make_dataset(data, found, base.family.size_multiple, config.loop.seed)
    for line in (*find_long_captions(config, base.family, base.load, dataset), *find_unseen_captions(config, dataset)):
        accelerator.print(f"warning: {plain(line)}", file=sys.stderr)
    return dataset


def make_accelerator(config: RunConfig) -> Accelerator:
    """The config alone decides: what accelerate would take from the environment is not used. UserError for the rest."""
    folder = config.output.dir
    check_environment()
    try:
        accelerator = Accelerator(
            mixed_precision=config.loop.precision,
            # an argument of its own, gradient_accumulation_steps, gives way to the environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            step_scheduler_with_optimizer=False,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/logs"),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"accelerate cannot start here: {str(error).splitlines()[0]}") from error
    check_world(accelerator.num_processes)
    for line in unused(config.loop) if accelerator.is_main_process else ():
        print(f"warning: {line}", file=sys.stderr)
    if accelerator.num_processes > 1:
        leave_in_peace()
    if config.loop.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("loop.precision fp16 needs an accelerator, and there is none here: use bf16 or no")
    set_up_sharding(accelerator)
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
    threads = loop.threads or threads_here()
    with accelerator.main_process_first():
        revision = pin_revision(config.model.base, config.model.revision)
    return config.model_copy(
        update={
            "loop": loop.model_copy(update={"micro_batch": micro_batch, "threads": threads}),
            "guard": config.guard.model_copy(update={"every": config.guard.every or _reading(accelerator)}),
            "model": config.model.model_copy(update={"revision": revision}),
        }
    )


def _reading(accelerator: Accelerator) -> int:
    """Steps after which losses are read: an accelerator would have to wait each time."""
    return 1 if accelerator.device.type == "cpu" else 10


def set_numerics(config: RunConfig) -> None:
    """Threads and determinism of torch, which decide the bits of every kernel."""
    assert config.loop.threads is not None
    torch.set_num_threads(config.loop.threads)
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.loop.deterministic, warn_only=True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # with NaN, before every kernel, to find readers of it: there are none


def make_adapters(config: RunConfig, family: ModelFamily, parts: Parts, *, unread_too: bool = False) -> AdapterSet:
    """Injects the adapter of the config into the parts.

    `unread_too` also into layers on which no prediction depends, as runs of older versions have it.
    """
    method = find("adapters.methods", config.adapter.method)
    seed, tokens = key_seed(config.loop.seed, "adapter"), config.adapter.tokens
    sets: list[AdapterSet] = []
    if selections := layer_parts(config.adapter, family.denoiser):
        unread = partial(family.unread, parts, clip_skip=config.model.clip_skip)
        targets = targets_of(parts, selections, family.targets, unread if not unread_too else lambda part: ())
        sets.append(method.inject(parts, config.adapter, targets, seed))
    if tokens:
        sets.append(inject_tokens(parts, family.tokenizers, tokens, key_seed(config.loop.seed, "tokens")))
    return sets[0] if len(sets) == 1 else Combined(sets)


def _read_by(config: RunConfig, base: MergedBase, parts: Parts, artifact: AdapterArtifact) -> AdapterArtifact:
    """An adapter without layers on which no prediction of the run depends: other trainers' files have them."""
    skip = config.model.clip_skip
    unread = {
        (part, canonical_path(part, path))
        for part in {part for part, _ in artifact.modules}
        if part in parts
        for path in base.family.unread(parts, part, skip)
    }
    kept = {
        (part, path): weights
        for (part, path), weights in artifact.modules.items()
        if not any(part == other and f"{path}.".startswith(f"{above}.") for other, above in unread)
    }
    return replace(artifact, modules=kept)


def make_objective(config: RunConfig, family: ModelFamily, parts: Parts, adapters: AdapterSet) -> Objective:
    """The loss of the config."""
    return Objective(
        family,
        family.noise(parts, config.noise),
        adapters,
        config.loss,
        config.loop.seed,
        config.loop.batch_size,
        prompts=prompt_options(config),
        trains_text=any(part in family.text_encoders for part in trained_parts(config, family)),
    )


def _resident(config: RunConfig, family: ModelFamily, wanted: Wanted) -> list[str]:
    """The parts that training needs in memory in the type of the base; what encodes images has its own."""
    needed = [family.denoiser, "scheduler"]
    if wanted.prompts is None:
        needed += family.prompt_encoders
    if wanted.latents is not None and config.data.cache.keep_vae:
        needed += family.image_encoders
    return needed


def _make_encode(
    config: RunConfig, family: ModelFamily, parts: Parts, wanted: Wanted, accelerator: Accelerator
) -> Encode:
    """Embeddings for sampling: from the text encoders as they are in training, or from the cache."""
    if wanted.prompts is None:
        return encoder_of(family, parts, prompt_options(config))
    prompts = wanted.prompts

    def encode(captions: Sequence[str]) -> Conditioning:
        return Conditioning.stack([prompts.get(wanted.prompt_key(c)) for c in captions], accelerator.device)

    return encode


def _make_run(
    config: RunConfig,
    folder: Path,
    accelerator: Accelerator,
    base: MergedBase,
    parts: Parts,
    adapters: AdapterSet,
    encode: Encode,
    data: dict[str, Any],
) -> Run:
    if config.loop.gradient_checkpointing:
        flows = {base.family.denoiser: parts[base.family.denoiser]} | adapters.carriers
        checkpoint_gradients(flows, config.loop.gradient_checkpointing)
    _quicken(config, accelerator, base.family, adapters)
    optimizer = make_optimizer(adapters, config.optimizer)
    if config.loop.fast and not shards(accelerator):
        optimizer = fast_optimizer(optimizer)
    schedule = make_schedule(optimizer, config.optimizer, config.loop.steps)
    wrapped, optimizer, schedule = wrap(
        accelerator, adapters.carriers, optimizer, schedule, base.family.repeated_blocks
    )
    for module in wrapped.values():
        module.train()
    decay = config.optimizer.ema_decay
    return Run(
        config,
        folder,
        accelerator,
        base.family,
        parts | wrapped,
        adapters,
        optimizer,
        schedule,
        encode,
        base.load,
        data,
        Ema(adapters.named_parameters(), decay) if decay is not None else None,
    )


def _quicken(config: RunConfig, accelerator: Accelerator, family: ModelFamily, adapters: AdapterSet) -> None:
    """`loop.fast` and `loop.compile`: other kernels for the same samples, noise and timesteps."""
    if config.loop.fast and not shards(accelerator):
        use_fast_layers(adapters.carriers)
    denoiser = adapters.carriers.get(family.denoiser)
    if denoiser is None or not config.loop.compile:
        return
    if config.loop.compile == "model":
        compile_whole(denoiser, **compiler_options(accelerator.device.type))
    else:
        compile_blocks(denoiser, family.repeated_blocks, **compiler_options(accelerator.device.type))


def compiler_options(device: str) -> dict[str, Any]:
    """A graph for each shape. On a CPU convolutions keep their order of axes: another would copy all weights anew."""
    return {"dynamic": False} | ({"options": {"layout_optimization": False}} if device == "cpu" else {})


def checkpoint_gradients(modules: Mapping[str, Any], where: bool | Sequence[str] = True) -> None:
    """Activations of the repeated blocks are computed again in the backward pass; dropout draws the same again.

    `modules` are those that gradients go through: what trains, and the denoiser behind a text encoder or words that
    do. `where` names blocks of the denoiser, or takes all blocks of all. UserError for a block that is not there.
    """
    for module in modules.values():
        if hasattr(module, "gradient_checkpointing_enable"):  # of transformers
            if where is True:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            continue
        module.enable_gradient_checkpointing()
        if where is not True:
            _checkpoint_only(module, where or ())


def _checkpoint_only(denoiser: Any, blocks: Sequence[str]) -> None:
    able = {name: module for name, module in denoiser.named_modules() if hasattr(module, "gradient_checkpointing")}
    for block in blocks:
        if block not in able:
            there = [name for name in able if name and name.count(".") <= 1]
            raise UserError(
                f"loop.gradient_checkpointing: the denoiser has no block {block!r}{did_you_mean(block, there)}; "
                f"there are: {', '.join(there)}"
            )
    for name, module in able.items():
        module.gradient_checkpointing = any(f"{name}.".startswith(f"{block}.") for block in blocks)


def _make_callbacks(held_out: HeldOut | None = None) -> list[Callback]:
    """In the order in which they act."""
    return [
        Progress(),
        Tracking(),
        Requests(),
        HeldOutLoss(held_out),
        Checkpoints(),
        Validation(),
        Export(),
        Card(),
        Report(),
    ]
