"""A whole base with trained weights in it, as a diffusers pipeline folder: written from the base's own files."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.stored import Entry, entry_type, opened, write_stream
from ..configs.bounded import read_json
from ..configs.dtypes import torch_dtype
from ..configs.errors import UserError
from ..configs.files import replace_file
from ..configs.ownership import writing_folder
from ..configs.progress import Bar
from ..models.base import INDEX, PipelineFiles
from ..models.load import Base
from ..models.part_tensors import cast

States = Mapping[str, Mapping[str, Tensor]]
"""Part -> parameter -> its new value."""

_PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file")
"""Where a base's files once lay, in configs that were saved from a folder: no reader needs it, and it names places."""
VARIANT = re.compile(r"\.fp16[.-]|non_ema")


def write_pipeline(base: Base, states: States, folder: Path, dtype: str, scheduler: Mapping[str, Any]) -> None:
    """Copies the base's folder with `states` in place of its weights, and `scheduler` in its scheduler's config.

    Tensors keep the names of the base's files, whatever today's libraries call them, so that older ones read the copy
    as they read the base. A part is in memory one file at a time. Nothing is there under the name until all of it is; a
    folder that was there goes if all of it is ours, UserError else.
    """
    files = PipelineFiles(base.folder)
    parts = [name for name in files.index if files.has(name) and (base.folder / name).is_dir()]
    with writing_folder(folder) as partial:
        _copy(base.folder / INDEX, partial / INDEX)
        for part in Bar(parts, desc="writing the pipeline", unit="part", leave=False, disable=None):
            _write_part(base.folder / part, partial / part, states.get(part, {}), torch_dtype(dtype))
        _update(partial / "scheduler" / "scheduler_config.json", scheduler)


def _write_part(source: Path, target: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    target.mkdir()
    left = set(state)
    for file in sorted(each for each in source.iterdir() if each.is_file() and not VARIANT.search(each.name)):
        if state and file.suffix == ".safetensors":
            left -= _write_weights(file, target / file.name, state, dtype)
        else:
            _copy(file, target / file.name)
    if left:
        raise UserError(f"{source}: its files have no place for {len(left)} trained tensors, first {min(left)!r}")


def _copy(source: Path, target: Path) -> None:
    """As it is, but for the places in a config."""
    shutil.copyfile(source, target)
    if source.name == INDEX or source.name.endswith("config.json"):
        values = read_json(source)
        if known := values.keys() & {*_PLACES}:
            kept = {key: value for key, value in values.items() if key not in known}
            target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_weights(source: Path, target: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> set[str]:
    """Answers with the names of `state` that went into this file. One tensor is in memory at a time."""
    with opened(source) as content:
        names = {name: _spelled(name, state) for name in content.keys()}  # noqa: SIM118  it is no mapping

        def tensor(name: str) -> Tensor:
            own = names[name]
            value = content.get_tensor(name) if own is None else state[own].detach().cpu()
            return cast(f"{source.parent.name} {name}", value, dtype)

        entries = {name: _entry(content.get_slice(name), dtype) for name in names}
        write_stream(target, entries, tensor, content.metadata() or {})
    return {own for own in names.values() if own}


def _entry(piece: Any, dtype: torch.dtype) -> Entry:
    """Of a tensor as it will be: numbers with a fraction get the type."""
    own = piece.get_dtype()
    return Entry(entry_type(dtype) if own.startswith(("F", "BF")) else own, tuple(piece.get_shape()))


def _spelled(name: str, state: Mapping[str, Tensor]) -> str | None:
    """What a tensor of a file is called in the model; see `canonical_path` for the level that CLIP has lost."""
    spellings = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return next((each for each in spellings if each in state), None)


def _update(file: Path, values: Mapping[str, Any]) -> None:
    if values:
        replace_file(file, json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")
