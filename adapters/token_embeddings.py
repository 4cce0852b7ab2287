"""New words for text encoders: trained rows behind the end of a frozen embedding (Gal et al. 2022)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configs.errors import UserError
from ..configs.new_words import is_plain_word
from ..configs.schema import TokenSection
from .adapter import check_state, seeded
from .artifact import AdapterArtifact, Key, copied

TOKENS = "tokens"
"""What groups, states and settings of these weights are called."""


class ExtendedEmbedding(nn.Module):
    """A frozen embedding; ids from `first` on are rows of `extra`, which trains."""

    def __init__(self, base: nn.Embedding, first: int, extra: Tensor):
        super().__init__()
        self.base, self.first = base, first
        self.own = nn.ParameterDict({"extra": nn.Parameter(extra)})  # behind the base, whose type is a model's

    @property
    def extra(self) -> nn.Parameter:
        """(vectors, width), fp32."""
        return self.own["extra"]

    @property
    def weight(self) -> Tensor:
        """Of the base, for those who ask an embedding for its type or device."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids to (..., width)."""
        known = self.base(ids.clamp(max=self.first - 1))
        own = self.extra[(ids - self.first).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= self.first)[..., None], own, known)


@dataclass(frozen=True, slots=True)
class TokenEmbeddings:
    """An `AdapterSet` of words, each with one or several vectors in every text encoder."""

    carriers: dict[str, nn.Module]
    vectors: dict[str, int]  # token -> how many

    can_disable = False

    def named_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        return {TOKENS: {part: embedding_of(model).extra for part, model in self.carriers.items()}}

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {TOKENS: [*self.named_parameters()[TOKENS].values()]}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {TOKENS: {part: parameter.detach() for part, parameter in self.named_parameters()[TOKENS].items()}}

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        named = self.named_parameters()[part]
        check_state(part, state, named)
        for name, parameter in named.items():
            parameter.data.copy_(state[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        raise UserError("words that are trained cannot be left out of a caption: the base alone does not know them")
        yield

    def begin_with(self, artifact: AdapterArtifact) -> None:
        for part, found in artifact.embeddings.items():
            for token, rows in self._rows(part).items():
                if token not in found or found[token].shape != rows.shape:
                    raise UserError(f"{part}: the file has no {len(rows)} vectors for {token!r}")
                rows.copy_(found[token])

    def modules(self) -> list[Key]:
        return []

    def artifact(self) -> AdapterArtifact:
        return AdapterArtifact(
            {}, embeddings={p: {t: copied(r) for t, r in self._rows(p).items()} for p in self.carriers}
        )

    @torch.no_grad()
    def _rows(self, part: str) -> dict[str, Tensor]:
        """Views of the vectors of each token."""
        extra = embedding_of(self.carriers[part]).extra.detach()
        return dict(zip(self.vectors, extra.split([*self.vectors.values()]), strict=True))


def inject_tokens(
    parts: Mapping[str, Any], tokenizers: Mapping[str, str], sections: Sequence[TokenSection], seed: int
) -> TokenEmbeddings:
    """Teaches the tokenizers new words, and gives the text encoders vectors for them, as their `init` says."""
    for part, tokenizer in tokenizers.items():
        encoder, words = parts[part], parts[tokenizer]
        table = text_model(encoder).embeddings.token_embedding.weight.detach().float().cpu()
        with seeded(seed):
            rows = [_first_vectors(section, words, table) for section in sections]
        add_words(encoder, words, {section.token: len(own) for section, own in zip(sections, rows, strict=True)}, rows)
        embedding_of(encoder).extra.requires_grad_(True)
    return TokenEmbeddings({part: parts[part] for part in tokenizers}, {s.token: s.vectors for s in sections})


def install_tokens(artifact: AdapterArtifact, parts: Mapping[str, Any], tokenizers: Mapping[str, str]) -> None:
    """Puts trained words into the text encoders of a base, behind those that are there already."""
    for part, found in artifact.embeddings.items():
        if part not in tokenizers:
            raise UserError(f"this base has no {part} for the words {', '.join(found)}")
        counts = {token: len(rows) for token, rows in found.items()}
        add_words(parts[part], parts[tokenizers[part]], counts, [*found.values()])


@torch.no_grad()
def add_words(encoder: Any, tokenizer: Any, counts: Mapping[str, int], rows: Sequence[Tensor]) -> None:
    """New entries `token`, `token_1`, ... in the tokenizer, and their vectors in the encoder, frozen."""
    names = [name for token, count in counts.items() for name in spelled(token, count)]
    if known := [name for name in names if name in tokenizer.get_vocab()]:
        raise UserError(
            f"the tokenizer knows {known[0]!r} already; take a new word, such as <{known[0].strip('<>')}-1>"
        )
    model, first = text_model(encoder), len(tokenizer)
    tokenizer.add_tokens([_entry(name) for name in names])
    model.eos_token_id = tokenizer.eos_token_id  # old configs say 2: then the highest id is taken, which is ours now
    old = model.embeddings.token_embedding
    extra = torch.cat([*rows]).float()
    if isinstance(old, ExtendedEmbedding):
        old.own["extra"] = nn.Parameter(torch.cat([old.extra, extra.to(old.extra.device)]), requires_grad=False)
        return
    extra = extra.to(old.weight.device)
    model.embeddings.token_embedding = ExtendedEmbedding(old, first, extra).requires_grad_(False)


def _entry(name: str) -> Any:
    """For a tokenizer: `sks` is a word by itself and not found in others, as web UIs have it."""
    from tokenizers import AddedToken

    return AddedToken(name, single_word=True) if is_plain_word(name) else name


def spelled(token: str, count: int) -> list[str]:
    """The entries of a word with several vectors, as diffusers spells them."""
    return [token, *(f"{token}_{k}" for k in range(1, count))]


def text_model(encoder: Any) -> Any:
    """The CLIP model in a text encoder, with or without a projection, DDP around it or not."""
    model = getattr(encoder, "module", encoder)
    return getattr(model, "text_model", model)


def embedding_of(encoder: Any) -> ExtendedEmbedding:
    """Of an encoder with new words."""
    return text_model(encoder).embeddings.token_embedding


def _first_vectors(section: TokenSection, tokenizer: Any, table: Tensor) -> Tensor:
    """(vectors, width): those of the `init` words in turn, or random ones of the table's mean and spread."""
    if section.init is None:
        return table.mean(0) + table.std(0) * torch.randn(section.vectors, table.shape[1])
    ids = tokenizer(section.init, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"adapter.tokens: the init {section.init!r} of {section.token!r} holds no word")
    return table[[ids[k % len(ids)] for k in range(section.vectors)]].clone()
