"""pocket's tokenizer: CLIP's byte-level BPE with merges learnt from our own captions.

As in CLIP, the vocabulary begins with all 256 bytes, alone and at the end of a word, so that
every text has tokens and none is unknown; each word of the captions ends up as one token.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from .scenes import BODIES, COLOURS, EYES, HEADS, SHAPES, STYLES

END_OF_WORD = "</w>"
WINDOW = 77  # tokens, as in SD 1.x: begin + 75 + end
_IDENTIFIERS = ("sks", "ohwx", "zwx")  # rare words that DreamBooth users write: one token each


def caption_words() -> list[str]:
    """Every word that `scenes.caption` can write, except the random identifiers."""
    phrases = ("a an drawing of creature with and on background", *COLOURS, *SHAPES, *BODIES, *HEADS, *EYES, *STYLES)
    return sorted({word for phrase in phrases for word in phrase.split()})


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """BPE merges (Sennrich et al. 2016), most frequent pair first, until each word is one token.

    Ties go to the alphabetically first pair; the trainer of `tokenizers` breaks them differently in each process.
    """
    splits = {(*word[:-1], word[-1] + END_OF_WORD) for word in words}
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for parts in sorted(splits) for pair in pairwise(parts)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = {_merged(parts, best) for parts in splits}
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result = list(parts[:1])
    for part in parts[1:]:
        if (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return tuple(result)


def build_tokenizer() -> CLIPTokenizer:
    """The CLIP tokenizer of the embedded base; deterministic."""
    merges = learn_merges([*caption_words(), *_IDENTIFIERS])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise AssertionError("a merge makes a token that exists already")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)  # type: ignore[arg-type]
