"""Checkpoints: accelerate's save_state with adapter weights in place of the models, made atomic and verifiable.

A checkpoint is written beside its place, described by a manifest, and only then moved there; what a crash
leaves behind is never taken for a checkpoint. accelerate's own files stay as they are.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters.sharded import own, whole
from ..configs.bounded import read_json
from ..configs.errors import TrainingError, UserError
from ..configs.faults import is_out_of_memory
from ..configs.files import as_os_error, permit, reason, replace_file, sync
from ..configs.ownership import (
    publish_folder,
    remove_checkpoint,
    remove_if_empty,
    remove_named,
    set_aside,
    write_file,
)
from ..configs.plain import plain
from ..configs.progress import say
from ..configs.shapes import misfit
from ..data.dataset import PROFILES
from .footprint import IN_CHECKPOINT, RUN, remove_unfinished
from .journal import tolerated
from .optim import arrange_as
from .run import Best, Run
from .run_folder import STATE, checkpoint_step, checkpoints
from .settings import changed, deciding
from .shapes import STATE as RUN_STATE
from .sharding import check_optimizer, optimizer_by_name
from .together import together

SCHEMA = 3
MANIFEST, LATEST = "manifest.json", "latest"
OVERHEAD = 512  # bytes for each tensor, at most: its entry in the header of a file, and what fills up its place
SMALL_FILES = 128 * 1024  # bytes: schedule, random states, images, manifest


class SaveError(TrainingError):
    """A checkpoint cannot be written; those that were there are as they were."""


def register_hooks(run: Run) -> None:
    """Makes `accelerator.save_state` and `load_state` write and read adapter weights only."""

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        kinds = {"adapter": run.adapters.states(), "ema": run.ema.averages if run.ema is not None else {}}
        for kind, states in kinds.items():
            for part, state in states.items():
                tensors = {name: whole(tensor) for name, tensor in state.items()}
                if run.is_main:
                    _save(tensors, Path(output_dir) / f"{kind}_{part}.safetensors")
        weights.clear()

    def load(models: list[Any], input_dir: str) -> None:
        for part in run.adapters.states():
            run.adapters.load(part, load_file(Path(input_dir) / f"adapter_{part}.safetensors"))
            if run.ema is not None:
                run.ema.load(part, load_file(Path(input_dir) / f"ema_{part}.safetensors"))
        if not run.is_sharded:  # else everything of it goes by names
            arrange_as(run.optimizer.optimizer, _saved_groups(Path(input_dir)))
        models.clear()

    run.accelerator.register_save_state_pre_hook(save)  # type: ignore[arg-type]
    run.accelerator.register_load_state_pre_hook(load)  # type: ignore[arg-type]


def _saved_groups(checkpoint: Path) -> list[dict[str, Any]]:
    """The groups of a saved optimiser; what it knows of each weight stays on the disk."""
    state = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True, mmap=True)
    return state["param_groups"]


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    permit(file)


def save_checkpoint(run: Run) -> Path:
    """Writes `checkpoints/step-N`, then points `latest` to it, then removes what is older than `checkpoint.keep`.

    Raises SaveError where the disk refuses, TrainingError for weights that are not finite; the same on all processes.
    Nothing of the new checkpoint is left then, and the old ones are as they were.
    """
    final = checkpoint_of(run.folder, run.step)
    unfinished = final.with_name(f"{final.name}.tmp")
    try:
        for write in (_begin, _write, _publish):
            together(run.accelerator, partial(write, run, unfinished))
    except UserError:
        if run.is_main:
            with suppress(OSError):
                remove_named(unfinished, IN_CHECKPOINT)
                remove_if_empty(unfinished)
        raise
    if run.is_main:
        with tolerated(f"{final} is saved, but what points to it, or what is older,"):
            write_file(final.with_name(LATEST), final.name, run.folder, RUN)
            _prune(run.folder, run.step, run.config.checkpoint.keep, run.best and run.best.step)
    return final


@contextmanager
def _as_save_error() -> Iterator[None]:
    try:
        with as_os_error():
            yield
    except OSError as error:
        raise SaveError(reason(error)) from error


@_as_save_error()
def _begin(run: Run, unfinished: Path) -> None:
    """An empty folder, once the weights are worth it and there is room for them."""
    check_finite(run)
    if not run.is_main:
        return
    for left in remove_unfinished(run.folder):
        say(f"warning: {left}: holds what is none of ours; it is now {set_aside(left).name}")
    unfinished.mkdir(parents=True)
    needed, free = checkpoint_bytes(run), shutil.disk_usage(unfinished).free
    if free < needed:
        raise SaveError(f"{_size(needed)} are needed and {_size(free)} are free in {unfinished.parent}")


@_as_save_error()
def _write(run: Run, unfinished: Path) -> None:
    try:
        with optimizer_by_name(run) as by_name:
            run.accelerator.save_state(str(unfinished))
            if by_name is not None:
                by_name.save(unfinished)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # so torch.save takes every refusal; the reason stays in its C++ streams
        free = _size(shutil.disk_usage(unfinished).free)
        raise SaveError(f"torch.save: {str(error).splitlines()[0]}; {free} are free in {unfinished.parent}") from error


@_as_save_error()
def _publish(run: Run, unfinished: Path) -> None:
    """Whole and described, it gets its name."""
    if not run.is_main:
        return
    final, best = unfinished.with_suffix(""), None if run.best is None else [run.best.step, run.best.loss]
    state = {"step": run.step, "seconds": run.seconds, "skipped": run.skipped, "best": best, "data": run.data}
    state["settings"] = deciding(run.config)
    (unfinished / STATE).write_text(json.dumps(state))
    _seal(unfinished)
    if aside := publish_folder(unfinished, final):
        say(f"warning: {final}: held what was damaged or none of ours; that is now {aside.name}")
    sync(final.parent)


def check_finite(run: Run) -> None:
    """TrainingError for weights, or averages of them, that are not finite: they must not take a good file's place."""
    states = [*run.adapters.named_parameters().items(), *(run.ema.averages.items() if run.ema is not None else ())]
    named = [(f"{part}.{name}", own(tensor).detach()) for part, state in states for name, tensor in state.items()]
    if broken := _not_finite(named):
        total = sum(len(state) for _, state in states)
        raise TrainingError(
            f"step {run.step}: {len(broken)} of {total} trained tensors are not finite, first {broken[0]}; nothing of "
            f"them is saved. {saved_so_far(run.folder)}; train anew with a lower learning rate if this comes again"
        )


def _not_finite(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors that are not finite. One wait for the device: asked one by one, 700 tensors are 700 waits."""
    filled = [(name, tensor) for name, tensor in named if tensor.numel()]
    if not filled:
        return []
    largest = torch._foreach_norm([tensor for _, tensor in filled], ord=torch.inf)
    fine = torch.stack([each.float() for each in largest]).isfinite().tolist()
    return [name for (name, _), is_fine in zip(filled, fine, strict=True) if not is_fine]


def checkpoint_bytes(run: Run) -> int:
    """What a checkpoint takes on disk, at most: trained weights, their averages, the state of the optimiser."""
    groups = [*run.adapters.named_parameters().values(), *run.optimizer.optimizer.state.values()]
    groups += run.ema.averages.values() if run.ema is not None else ()
    tensors = [value for group in groups for value in group.values() if isinstance(value, Tensor)]
    return SMALL_FILES + sum(tensor.numel() * tensor.element_size() + OVERHEAD for tensor in tensors)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def saved_so_far(folder: Path) -> str:
    """What a run folder holds to go on from, in words."""
    saved = checkpoints(folder)
    return f"the newest checkpoint is {saved[-1].name}" if saved else "there is no checkpoint"


def newest_sound_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run folder whose manifest holds, and why newer ones were passed over."""
    passed: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint, passed
        passed.append(f"{checkpoint}: {problem}")
    raise UserError([*passed, f"{folder}: there is no sound checkpoint to resume from"])


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run folder."""
    return folder / "checkpoints" / f"step-{step:06d}"


def sound_checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest sound checkpoint that was saved before a step (counted from 1); None: begin anew."""
    saved = [path for path in checkpoints(folder) if checkpoint_step(path) < step]
    return next((path for path in reversed(saved) if find_damage(path) is None), None)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        schema, files = manifest["schema"], dict(manifest["files"])
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "its manifest is missing or damaged"
    if schema != SCHEMA:
        return f"written by another version (schema {schema}, this one reads {SCHEMA})"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if ".." in Path(name).parts or not file.is_file() or file.stat().st_size != size or _sha256(file) != digest:
            return f"{name} is missing or damaged"
    return _find_stranger(checkpoint) if STATE in expected else f"{STATE} is missing"


def _find_stranger(checkpoint: Path) -> str | None:
    """Whether a sound checkpoint has the name of another step, as copies get."""
    try:
        step = read_state(checkpoint)["step"]
    except UserError as error:
        return f"{STATE} is damaged ({str(error).removeprefix(f'{checkpoint / STATE}: ')})"
    return None if step == checkpoint_step(checkpoint) else f"it holds step {step}, whatever its name says"


def is_of_older(checkpoint: Path) -> bool:
    """Whether a sound checkpoint is of a version that adapted layers which nothing reads."""
    return "latents" not in read_state(checkpoint)["data"]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """run_state.json; UserError where it is not what was written."""
    state = read_json(checkpoint / STATE)
    if found := misfit(state, RUN_STATE):
        raise UserError(f"{checkpoint / STATE}: {found}")
    if state["step"] < 0 or len(state["best"] or (0, 0)) != 2:
        raise UserError(f"{checkpoint / STATE}: step or best is not what was written")
    return state


def load_checkpoint(run: Run, checkpoint: Path) -> None:
    """Puts adapter weights, optimiser, schedule and step back.

    UserError if settings, base or images are no longer the same, or the checkpoint does not fit.
    """
    state = read_state(checkpoint)
    problems = changed(state["settings"], deciding(run.config)) if isinstance(state.get("settings"), dict) else []
    if problems := [*problems, *_differences(state["data"], run.data)]:
        start = _adapter_of(run.folder)
        learnt = f", with what it has learnt by adapter.start_from={start}" if start is not None else ""
        raise UserError([*problems, f"the run cannot go on as it began; train anew with another output.dir{learnt}"])
    check_optimizer(run, checkpoint)
    try:
        with optimizer_by_name(run) as by_name:
            run.accelerator.load_state(str(checkpoint))
            if by_name is not None:
                by_name.load(checkpoint)
    except UserError as error:
        raise UserError([f"{checkpoint}: {problem}" for problem in error.problems]) from error
    except Exception as error:  # whatever torch raises for what is no state, or would run code
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{checkpoint}: cannot be loaded ({type(error).__name__}: {reason[:200]})") from error
    run.step, run.seconds, run.skipped = state["step"], state["seconds"], state["skipped"]
    run.best = Best(*state["best"]) if state["best"] else None
    if "start_from" in state["data"]:  # that file may be gone
        run.data["start_from"] = state["data"]["start_from"]


def _adapter_of(folder: Path) -> Path | None:
    """The adapter file that a run has written, if it has."""
    return next(iter(sorted(folder.glob("*.safetensors"), key=lambda file: (file.name.count("."), file.name))), None)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What has changed in the images and the base of a run, one line each; where they lie may change."""
    if then.get("micro_batch") != now["micro_batch"]:
        yield (
            f"loop.micro_batch was {then.get('micro_batch')} and cannot become {now['micro_batch']}: "
            "the images are in several buckets, and a micro-batch never mixes them"
        )
    if (latents := then.get("latents", now["dtype"])) != now["latents"]:
        yield (
            f"model.dtype {latents}: an older loraloom began this run and encoded its images in {latents}; this one "
            f"does so in {now['latents']}, with which it would not go on as it began: resume it with the older one"
        )
    before, now_there = then.get("base", now["base"]), now["base"]
    for part in sorted(part for part in before | now_there if before.get(part) != now_there.get(part)):
        yield f"model.base: the weights of its {part} were changed since the checkpoint was saved"
    if then.get("base_settings", now.get("base_settings")) != now.get("base_settings"):
        yield "model.base: the configs of its scheduler, words or models were changed since the checkpoint was saved"
    if (sources := len(now["sources"])) != len(then["sources"]):
        yield f"data.sources: {len(then['sources'])} were there when the checkpoint was saved, {sources} are now"
    for old, new in zip(then["sources"], now["sources"], strict=False):
        old, name = {key: value for key, value in old.items() if key != "name"}, new["name"]
        new = {key: value for key, value in new.items() if key != "name"}  # it comes from where they lie
        profiles = new.get(PROFILES, 0)
        if old != new and old == {key: value for key, value in new.items() if key != PROFILES}:
            yield (
                f"{name}: {profiles} of its images have a colour profile, which was not looked at when the "
                "checkpoint was saved and is converted to sRGB now: their colours are others"
            )
        elif old != new:
            counts = f"{old['images']} images then, {new['images']} now"
            yield f"{name}: its images or captions were changed since the checkpoint was saved ({counts})"


def _seal(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    for file in files:
        sync(file)
    replace_file(folder / MANIFEST, json.dumps({"schema": SCHEMA, "files": entries}, indent=1))
    sync(folder)


def _prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Removes all but the newest `keep` and the best; what lies beyond `step` was damaged, or we would not be here."""
    void = [path for path in checkpoints(folder) if checkpoint_step(path) > step]
    old = [path for path in checkpoints(folder) if checkpoint_step(path) <= step][:-keep]
    for path in void + old:
        if checkpoint_step(path) == best or not (left := remove_checkpoint(path)):
            continue
        words = f"{plain(', '.join(left[:3]))}, which is damaged or none of ours"
        if path in void:  # nobody shall take it for the newest one
            words += f"; it is now {set_aside(path).name}"
        say(f"warning: {path}: left {words}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
