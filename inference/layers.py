"""The layers of a base as its files have them: names, shapes and single weights, without a model in memory."""

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import stored
from ..adapters.artifact import Key
from ..adapters.format import FormatNames
from ..adapters.origin import architecture_of, is_of
from ..adapters.spellings import WORDS
from ..configs.errors import UserError
from ..configs.schema import ModelSection
from ..models.base import EMBEDDED, PipelineFiles
from ..models.load import Base
from ..models.part_tensors import meta_model
from .adapter_file import ARCHITECTURES, format_names, names_of
from .pipeline_folder import VARIANT

_WORDS = ("emb_params", "clip_l", "clip_g")


class Layers:
    """Of `pocket`, a pipeline folder, a single-file checkpoint or a hub id."""

    def __init__(self, base: str, revision: str | None = None):
        self.base = Base(ModelSection(base=base, revision=revision))
        self.title = base
        self._opened: dict[str, dict[str, Path]] = {}

    @cached_property
    def names(self) -> FormatNames:
        """What the file formats have to know of the base."""
        files, family = PipelineFiles(self.base.folder), self.base.family
        with torch.device("meta"):
            parts: dict[str, Any] = {part: meta_model(part, files.config(part)) for part in family.kohya_prefixes}
        return format_names(family, parts | self.base.load(["scheduler"]))

    @property
    def keys(self) -> list[Key]:
        """Every layer that an adapter can change."""
        return [(component, path) for component, paths in self.names.module_paths.items() for path in paths]

    def weight(self, key: Key) -> Tensor:
        """In float32, read from its file."""
        component, path = key
        for name in (path, path.removeprefix("text_model.")):
            if (file := self._files(component).get(f"{name}.weight")) is not None:
                with stored.opened(file) as content:
                    return content.get_tensor(f"{name}.weight").float()
        raise UserError(f"{self.title}: its {component} has no weight {path}")

    def others(self, component: str) -> dict[str, Path]:
        """Tensor -> the file that has it, of what no adapter can change: biases, norms, embeddings, a whole VAE."""
        layers = {f"{path}.weight" for path in self.names.module_paths.get(component, ())}
        layers |= {name.removeprefix("text_model.") for name in layers}
        return {name: file for name, file in self._files(component).items() if name not in layers}

    def _files(self, component: str) -> dict[str, Path]:
        """Tensor -> the file that has it."""
        if component not in self._opened:
            self._opened[component] = _tensors_in(self.base, component)
        return self._opened[component]


def _tensors_in(base: Base, component: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted((base.folder / component).glob("*.safetensors")):
        if not VARIANT.search(file.name):
            found |= dict.fromkeys(stored.look(file)[0], file)
    return found


def names_for(file: Path, layers: Layers | None = None) -> FormatNames:
    """What the formats have to know to read a file: of its base, or as far as the file itself tells that.

    UserError where it does not, or where the layers of that base are not known here.
    """
    if layers is not None:
        return layers.names
    try:
        entries, header = stored.look(file)
    except UserError as error:
        raise UserError([f"{file}: {problem}" for problem in error.problems]) from None
    architecture = architecture_of({name: entry.shape for name, entry in entries.items()}, header)
    likely = likely_names(architecture) if architecture is not None else []
    if not likely:
        told = "nothing in it tells its base" if architecture is None else f"is an adapter for {architecture}"
        raise UserError(f"{file}: {told}, whose layers are not known here; give --base")
    return next((names for names in likely if _fit(names, entries)), likely[0])


def likely_names(architecture: str | None) -> list[FormatNames]:
    """Of the bases whose layers are known here, those of an architecture; of all where it is not told."""
    kinds = [kind for kind, known in ARCHITECTURES.items() if architecture is None or is_of(known, architecture)]
    return [names_of(kind) for kind in (*kinds, *(EMBEDDED if "sd1" in kinds else ()))]


def _fit(names: FormatNames, entries: Collection[str]) -> bool:
    """Whether all tensors are of modules that such a base has."""
    known = names.spellings()
    modules = {f"{component}.{path}" for component, paths in names.module_paths.items() for path in paths}
    return all(
        known.parse(name) or name.partition(":")[0] in modules or name in _WORDS or name.startswith(WORDS)
        for name in entries
    )
