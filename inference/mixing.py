"""Attaching trained adapters to an engine's pipeline, each with its weight."""

from collections.abc import Sequence

from ..adapters.artifact import AdapterArtifact
from ..adapters.format import read
from ..adapters.peft_adapters import install
from ..configs.errors import UserError
from .adapter_file import AdapterFile, format_names
from .engine import Engine


def attach(engine: Engine, adapters: Sequence[AdapterFile]) -> list[AdapterArtifact]:
    """Loads adapters of any readable format and activates them together."""
    names = format_names(engine.family, engine.parts)
    artifacts = [read(adapter.file, names) for adapter in adapters]
    titles = [adapter_title(index) for index in range(len(adapters))]
    for artifact, title, adapter in zip(artifacts, titles, adapters, strict=True):
        if artifact.method == "oft" and adapter.weight != 1:
            raise UserError(
                f"{adapter.file}: an OFT adapter is a rotation, which has no weight; leave out {adapter.weight:g}"
            )
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
