"""One word as web UIs read it: `emb_params` for one text encoder, `clip_l` and `clip_g` for SDXL's two.

The file's name is the word in a web UI; ours is in the header too.
"""

from collections.abc import Iterable

from ...configs.errors import UserError
from ..artifact import AdapterArtifact, Tensors
from ..format import FormatNames, carried, header_of
from ..stored import Header

SUFFIX = ".embedding"
FOLDS = False
HOLDS = frozenset({"tokens"})

_TOKEN = "loraloom.token"
_NAMES = {"emb_params", "clip_l", "clip_g"}


def matches(keys: Iterable[str]) -> bool:
    return set(keys) <= _NAMES and bool(set(keys))


def to_tensors(artifact: AdapterArtifact, names: FormatNames) -> tuple[Tensors, Header]:
    """The vectors of the one word, under the encoder's key."""
    words = {token for tokens in artifact.embeddings.values() for token in tokens}
    if artifact.modules or len(words) != 1:
        raise UserError(
            f"the format embedding holds one word and nothing else, this adapter has {len(words)} and "
            f"{len(artifact.modules)} layers; `output.formats: [loraloom]` holds all"
        )
    (word,) = words
    tensors = {names.embedding_keys[part]: tokens[word] for part, tokens in artifact.embeddings.items()}
    return tensors, {**header_of(artifact, names), _TOKEN: word}


def from_tensors(tensors: Tensors, header: Header, names: FormatNames) -> AdapterArtifact:
    """See `adapters.formats`. UserError for a file of another family's encoders."""
    parts = {key: part for part, key in names.embedding_keys.items()}
    if parts.keys() != tensors.keys():
        found, wanted = ", ".join(sorted(tensors)), ", ".join(sorted(parts))
        raise UserError(f"holds words for other text encoders ({found}), this base has {wanted}")
    word = header.get(_TOKEN, "")
    return AdapterArtifact({}, carried(header), {parts[k]: {word: t.float()} for k, t in tensors.items()})
