"""pocket's tokenizer: CLIP's byte-level BPE with merges learnt from our own captions.

As in CLIP, the vocabulary begins with all 256 bytes, alone and at the end of a word, so that
every text has tokens and none is unknown; each word of the captions ends up as one token.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .scenes import BODIES, COLOURS, EYES, HEADS, SHAPES, STYLES

END_OF_WORD = "</w>"
WINDOW = 77  # tokens, as in SD 1.x: begin + 75 + end
_IDENTIFIERS = ("sks", "ohwx", "zwx")  # rare words that DreamBooth users write: one token each


def caption_words() -> list[str]:
    """Every word that `scenes.caption` can write, except the random identifiers."""
    phrases = ("a an drawing of creature with and on background", *COLOURS, *SHAPES, *BODIES, *HEADS, *EYES, *STYLES)
    return sorted({word for phrase in phrases for word in phrase.split()})


def learn_merges(words: Iterable[str], vocab_size: int = 2000) -> list[tuple[str, str]]:
    """BPE merges, most frequent first; with few words the learning stops when each is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 512, end_of_word_suffix=END_OF_WORD, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(sorted(words), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_tokenizer() -> CLIPTokenizer:
    """The CLIP tokenizer of the embedded base; deterministic."""
    merges = learn_merges([*caption_words(), *_IDENTIFIERS])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise AssertionError("a merge makes a token that exists already")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)
