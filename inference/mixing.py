"""Attaching trained adapters to an engine's pipeline, each with its weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.artifact import AdapterArtifact, base_modules
from ..adapters.format import FormatNames, read
from ..adapters.peft_adapters import install
from ..configs.errors import UserError
from ..models.family import ModelFamily, Parts
from .engine import Engine


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file with the weight it is mixed in with."""

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterFile":
        """`path.safetensors` or `path.safetensors:0.8`."""
        path, colon, weight = text.rpartition(":")
        if not colon:
            return cls(Path(text))
        try:
            number = float(weight)
        except ValueError:
            return cls(Path(text))  # the colon belongs to the path
        if not math.isfinite(number):
            raise UserError(f"--adapter {text}: the weight is not a finite number")
        return cls(Path(path), number)


def format_names(family: ModelFamily, parts: Parts) -> FormatNames:
    """What the file formats have to know of a base: its module paths and its family's words."""
    return FormatNames(
        module_paths={part: base_modules(part, parts[part]) for part in family.kohya_prefixes if part in parts},
        kohya_prefixes=family.kohya_prefixes,
        architecture=family.architecture(parts),
        kohya_version=family.kohya_version,
    )


def attach(engine: Engine, adapters: Sequence[AdapterFile]) -> list[AdapterArtifact]:
    """Loads adapters of any readable format and activates them together."""
    names = format_names(engine.family, engine.parts)
    artifacts = [read(adapter.file, names) for adapter in adapters]
    titles = [adapter_title(index) for index in range(len(adapters))]
    for artifact, title, adapter in zip(artifacts, titles, adapters, strict=True):
        try:
            install(artifact, engine.parts, title)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{adapter.file}: does not fit this base ({str(error).splitlines()[0]})") from error
    if titles:
        engine.pipeline.set_adapters(titles, [adapter.weight for adapter in adapters])
    return artifacts


def adapter_title(index: int) -> str:
    """The name under which `attach` gives the adapter at this place of its list to the pipeline."""
    return f"adapter_{index}"
