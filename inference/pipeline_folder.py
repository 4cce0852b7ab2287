"""A whole base with trained weights in it, as a diffusers pipeline folder: written from the base's own files."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..configs.errors import UserError
from ..configs.files import permit, replace_file, sync
from ..models.base import INDEX, PipelineFiles
from ..models.load import DTYPES, Base

States = Mapping[str, Mapping[str, Tensor]]
"""Part -> parameter -> its new value."""

_PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file")
"""Where a base's files once lay, in configs that were saved from a folder: no reader needs it, and it names places."""
_VARIANT = re.compile(r"\.fp16[.-]|non_ema")


def write_pipeline(base: Base, states: States, folder: Path, dtype: str, scheduler: Mapping[str, Any]) -> None:
    """Copies the base's folder with `states` in place of its weights, and `scheduler` in its scheduler's config.

    Tensors keep the names of the base's files, whatever today's libraries call them, so that older ones read the copy
    as they read the base. A part is in memory one file at a time. Nothing is there under the name until all of it is.
    """
    partial = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    files = PipelineFiles(base.folder)
    parts = [name for name in files.index if files.has(name) and (base.folder / name).is_dir()]
    try:
        partial.mkdir(parents=True)
        _copy(base.folder / INDEX, partial / INDEX)
        for part in tqdm(parts, desc="writing the pipeline", unit="part", leave=False):
            _write_part(base.folder / part, partial / part, states.get(part, {}), DTYPES[dtype])
        _update(partial / "scheduler" / "scheduler_config.json", scheduler)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(folder.parent)


def _write_part(source: Path, target: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    target.mkdir()
    left = set(state)
    for file in sorted(each for each in source.iterdir() if each.is_file() and not _VARIANT.search(each.name)):
        if state and file.suffix == ".safetensors":
            left -= _write_weights(file, target / file.name, state, dtype)
        else:
            _copy(file, target / file.name)
        sync(target / file.name)
    if left:
        raise UserError(f"{source}: its files have no place for {len(left)} trained tensors, first {min(left)!r}")


def _copy(source: Path, target: Path) -> None:
    """As it is, but for the places in a config."""
    shutil.copyfile(source, target)
    if source.name == INDEX or source.name.endswith("config.json"):
        values = json.loads(source.read_text("utf-8"))
        if known := values.keys() & {*_PLACES}:
            kept = {key: value for key, value in values.items() if key not in known}
            target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_weights(source: Path, target: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> set[str]:
    """Answers with the names of `state` that went into this file."""
    with safe_open(source, framework="pt") as opened:
        names = {name: _spelled(name, state) for name in opened.keys()}  # noqa: SIM118  it is no mapping
        values = {name: state[own] if own else opened.get_tensor(name) for name, own in names.items()}
        header = opened.metadata()
    save_file({name: _cast(value, dtype) for name, value in values.items()}, target, metadata=header)
    permit(target)
    return {own for own in names.values() if own}


def _spelled(name: str, state: Mapping[str, Tensor]) -> str | None:
    """What a tensor of a file is called in the model; see `canonical_path` for the level that CLIP has lost."""
    spellings = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return next((each for each in spellings if each in state), None)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()


def _update(file: Path, values: Mapping[str, Any]) -> None:
    if values:
        replace_file(file, json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")
