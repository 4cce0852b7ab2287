"""The words of adapters in a base: known to its tokenizers and text encoders, and forgotten again without a trace."""

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from ..adapters.artifact import AdapterArtifact
from ..adapters.format import check_widths
from ..adapters.token_embeddings import install_tokens, text_model
from ..models.family import ModelFamily, Parts
from .adapter_file import word_width


class Words:
    """Adapters with words, by name."""

    def __init__(self, family: ModelFamily, parts: Parts, replace_part: Callable[[str, Any], None]):
        """`replace_part` puts another tokenizer into the pipelines."""
        self.family, self.parts, self.replace_part = family, parts, replace_part
        self.adapters: dict[str, AdapterArtifact] = {}
        self._before: dict[str, tuple[Any, Any]] = {}  # text encoder -> tokenizer and embedding without any words

    def install(self, name: str, artifact: AdapterArtifact) -> None:
        """The words of an adapter, if it has some, behind those that are there. UserError for what does not fit."""
        if not artifact.embeddings:
            return
        widths = {part: word_width(self.parts[part]) for part in artifact.embeddings if part in self.parts}
        check_widths(artifact, widths)
        for part in artifact.embeddings:
            tokenizer = self.family.tokenizers.get(part)
            if tokenizer and part not in self._before:
                self._before[part] = (copy.deepcopy(self.parts[tokenizer]), _embedding(self.parts[part]))
        self.adapters[name] = artifact  # so that what comes half-way is taken out again
        install_tokens(artifact, self.parts, self.family.tokenizers)

    def forget(self, names: Collection[str]) -> None:
        """The tokenizers and embeddings of before all words, and then the words of those that stay."""
        if not self.adapters.keys() & set(names):
            return
        for part, (tokenizer, embedding) in self._before.items():
            self.replace_part(self.family.tokenizers[part], tokenizer)
            _set_embedding(self.parts[part], embedding)
        self._before = {}
        left = {name: artifact for name, artifact in self.adapters.items() if name not in names}
        self.adapters = {}
        for name, artifact in left.items():
            self.install(name, artifact)


def named_words(artifact: AdapterArtifact, name: str) -> AdapterArtifact:
    """A word without a name is called as its file."""
    named = {part: {token or name: rows for token, rows in own.items()} for part, own in artifact.embeddings.items()}
    return replace(artifact, embeddings=named)


def _embedding(encoder: Any) -> Any:
    """The table of words of a text encoder, and the id that it takes for the end of a text."""
    model = text_model(encoder)
    return model.embeddings.token_embedding, model.eos_token_id


def _set_embedding(encoder: Any, embedding: Any) -> None:
    model = text_model(encoder)
    model.embeddings.token_embedding, model.eos_token_id = embedding
