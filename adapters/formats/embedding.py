"""One word as web UIs read it: `emb_params` for one text encoder, `clip_l` and `clip_g` for SDXL's two.

The file's name is the word in a web UI; ours is in the header too. diffusers' `learned_embeds.safetensors` has one
tensor, whose name is the word. OneTrainer's words (`bundle_emb.<word>.clip_l`) are read without a LoRA beside them too.
"""

from collections.abc import Iterable, Mapping

from ...configs.errors import UserError
from ..artifact import AdapterArtifact, Tensors
from ..format import FormatNames, carried, header_of
from ..parsed import bundled, words_of
from ..spellings import WORDS, is_of_an_adapter
from ..stored import Header

SUFFIX = ".embedding"
FOLDS = False
HOLDS = frozenset({"tokens"})

_TOKEN = "loraloom.token"
_NAMES = {"emb_params", "clip_l", "clip_g"}
_WIDTHS = (768, 1024, 1280)
"""Numbers in a word's vector: CLIP ViT-L, OpenCLIP ViT-H and ViT-bigG."""


def matches(keys: Iterable[str]) -> bool:
    names = {*keys}
    if names and all(name.startswith(WORDS) for name in names):
        return True
    if len(names) == 1 and not names <= _NAMES:
        (name,) = names
        return ":" not in name and not is_of_an_adapter(name) and _may_be_a_word(keys, name)
    return names <= _NAMES and bool(names)


def _may_be_a_word(keys: Iterable[str], name: str) -> bool:
    """One vector under any name is a word at the widths of real text encoders alone; it may be anything otherwise."""
    shape = getattr(keys[name], "shape", None) if isinstance(keys, Mapping) else None
    return shape is None or len(shape) != 1 or shape[0] in _WIDTHS


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
    """See `adapters.formats`. UserError for a file of another family's encoders, and for what is no vectors."""
    words, tensors = bundled(tensors)
    if words:
        return AdapterArtifact({}, carried(header), words_of(words, names))
    word = header.get(_TOKEN, "")
    if not tensors.keys() <= _NAMES:
        ((word, rows),) = tensors.items()
        tensors = {"emb_params": rows}
    return AdapterArtifact({}, carried(header), words_of({word: tensors}, names))
