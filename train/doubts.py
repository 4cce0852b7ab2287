"""What a config asks for that is hardly meant: new words that are said nowhere, rates that move nothing, and the like.

Lines for people, before anything is loaded; imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from unicodedata import normalize

import numpy as np

from ..configs.data_sections import PriorSource
from ..configs.new_words import is_plain_word
from ..configs.schema import RunConfig
from ..data.captions import longest_caption
from ..data.dataset import Images
from ..data.source import NAMED, named
from ..models.web_ui_prompts import marks_in

RATE_FREE = re.compile(r"(prodigy|dadapt)\w*", re.IGNORECASE)
"""Optimisers that find the step size themselves, as `prodigy` or by the class of another package."""
SMALL_RATE = 0.1  # theirs is a factor on what they find, and 1 is usual
LARGE_RATE = 0.1  # what was meant for one of those
LONG_WARMUP = 0.5  # of the steps
_WORD = re.compile(r"<[^<>\s]+>")


def doubts_of_config(config: RunConfig) -> Iterator[str]:
    """Settings that are allowed and seldom wanted, one line each."""
    section, steps = config.optimizer, config.loop.steps
    rates = {"optimizer.learning_rate": section.learning_rate}
    rates |= {f"optimizer.parts.{name}.learning_rate": part.learning_rate for name, part in section.parts.items()}
    if RATE_FREE.fullmatch(section.name.rpartition(".")[2]):
        small = [f"{key} {rate:g}" for key, rate in rates.items() if rate is not None and rate < SMALL_RATE]
        if small:
            yield f"{small[0]}: {section.name} finds the step size itself and multiplies it by that; 1 is usual"
    elif "." not in section.name:  # those of other packages may count otherwise
        large = [f"{key} {rate:g}" for key, rate in rates.items() if rate is not None and rate >= LARGE_RATE]
        if large:
            yield f"{large[0]}: weights move by about that in each step of {section.name}; 1e-4 is usual"
    if section.warmup_steps >= LONG_WARMUP * steps:
        reached = "is never reached" if section.warmup_steps >= steps else "is reached late"
        yield f"optimizer.warmup_steps {section.warmup_steps}: the learning rate {reached} in loop.steps {steps}"
    for prompt in dict.fromkeys(config.validation.texts):
        if marks := marks_in(prompt):
            yield (
                f"validation.prompts: {', '.join(marks)} is taken as words: validation weighs none and has no adapter "
                "but the run's; leave it out"
            )


def doubts_of_words(config: RunConfig, images: Sequence[Images | None]) -> tuple[list[str], list[str]]:
    """(problems, notes) of new words that stand in no caption, or in some of a source only."""
    problems: list[str] = []
    notes: list[str] = []
    for token in dict.fromkeys(section.token for section in config.adapter.tokens):
        pairs = zip(config.data.sources, images, strict=True)
        found = [_said(config, section, known, token) for section, known in pairs]
        if not any(count for count, _, _ in found):
            others = sorted(_others(config, images))[:NAMED]
            seen = f" (they say {', '.join(others)})" if others else ""
            problems.append(
                f"adapter.tokens: the word {token!r} stands in no caption{seen}, so nothing of it would be trained; "
                "write it into the captions, or say it by `data.captions.trigger` or `template`"
            )
        for known, (count, total, without) in zip(images, found, strict=True):
            if known is not None and 0 < count < total:
                notes.append(
                    f"{known.source.name}: the word {token!r} stands in {count:,} of {total:,} captions "
                    f"(not in that of {named(without, total - count)})"
                )
    return problems, notes


def _said(config: RunConfig, section: object, known: Images | None, token: str) -> tuple[int, int, list[str]]:
    """How many captions of a source say a word, of how many, and the images of the first that do not."""
    count, total, without = 0, 0, []
    word = re.escape(_plain(token))
    spoken = re.compile(rf"(?<!\w){word}(?!\w)" if is_plain_word(token) else word)  # as tokenizers find it
    for where, text in _texts(config, section, known):
        total += 1
        if spoken.search(_plain(text)):
            count += 1
        elif len(without) <= NAMED:
            without.append(where)
    return count, total, without


def _others(config: RunConfig, images: Sequence[Images | None]) -> set[str]:
    """Words in brackets that captions say instead."""
    pairs = zip(config.data.sources, images, strict=True)
    texts = (text for section, known in pairs for _, text in _texts(config, section, known))
    return {word for text in texts for word in _WORD.findall(text)}


def _texts(config: RunConfig, section: object, known: Images | None) -> Iterator[tuple[str, str]]:
    """Where a caption stands, and what is trained of it: with all of its tags, and every alternative of it."""
    if isinstance(section, PriorSource):
        rules = config.data.rules(section)
        captions: Iterable[tuple[str, str]] = [("prior", section.prior)]
    else:
        assert known is not None
        rules = config.data.rules(known.section)
        captions = (
            (known.source.location(int(number)), caption)
            for number in known.kept
            for caption in known.source.captions(int(number))
        )
    if rules.dropout == 1:
        return
    for where, caption in captions:
        text = longest_caption(caption, rules)
        yield where, f"{text} {caption}" if rules.wildcards else text


def _plain(text: str) -> str:
    """As tokenizers compare: in small letters, one way of writing each."""
    return normalize("NFC", text).lower()


def trained_and_held_out(trained: Sequence[Images | None], held_out: Sequence[Images | None]) -> list[str]:
    """Held-out images that are trained on, which makes their loss say nothing."""
    digests = [known.digests for known in trained if known is not None and known.digests is not None]
    if not digests:
        return []
    all_trained = np.unique(np.concatenate(digests))
    both: list[str] = []
    total = 0
    for known in held_out:
        if known is not None and known.digests is not None:
            rows = np.flatnonzero(np.isin(known.digests, all_trained))
            total += len(known.digests)
            both += [known.source.location(int(known.kept[row])) for row in rows]
    if not both:
        return []
    return [
        f"validation.sources: {len(both):,} of {total:,} held-out images are trained on ({named(both, len(both))}), so "
        "their loss does not tell how others would do; take them out of data.sources"
    ]
