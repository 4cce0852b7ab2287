"""Attaching trained adapters to an engine's pipeline, each with its weight."""

from collections.abc import Sequence
from dataclasses import replace

from ..adapters.artifact import AdapterArtifact
from ..adapters.format import read
from ..adapters.peft_adapters import install
from ..adapters.token_embeddings import install_tokens
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
        artifact = _named_words(artifact, adapter)
        try:
            install_tokens(artifact, engine.parts, engine.family.tokenizers)
            install(artifact, engine.parts, title)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{adapter.file}: does not fit this base ({str(error).splitlines()[0]})") from error
    switched = [(t, a.weight) for t, a, f in zip(titles, adapters, artifacts, strict=True) if f.modules]
    if switched:
        engine.pipeline.set_adapters([title for title, _ in switched], [weight for _, weight in switched])
    return artifacts


def _named_words(artifact: AdapterArtifact, adapter: AdapterFile) -> AdapterArtifact:
    """A word without a name is called as its file; words have no weight."""
    if artifact.embeddings and not artifact.modules and adapter.weight != 1:
        raise UserError(f"{adapter.file}: a word has no weight: leave out {adapter.weight:g}")
    name = adapter.file.name.split(".")[0]
    named = {part: {token or name: rows for token, rows in own.items()} for part, own in artifact.embeddings.items()}
    return replace(artifact, embeddings=named)


def adapter_title(index: int) -> str:
    """The name under which `attach` gives the adapter at this place of its list to the pipeline."""
    return f"adapter_{index}"
