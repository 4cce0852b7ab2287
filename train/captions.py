"""Captions counted in the tokens of the family's own tokenizers: what is longer than its windows is said, not cut."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..configs.errors import UserError
from ..configs.schema import RunConfig
from ..data.captions import longest_caption
from ..data.dataset import Dataset
from ..data.source import Problems
from ..models.family import ModelFamily, Parts, PromptOptions

AT_ONCE = 500  # captions that are tokenized together


@dataclass(frozen=True, slots=True)
class Long:
    """A caption that does not fit."""

    where: str
    caption: str
    tokens: int


def prompt_options(config: RunConfig) -> PromptOptions:
    """How captions are read."""
    return PromptOptions(config.data.token_windows, config.model.clip_skip)


def room_for_tokens(family: ModelFamily, windows: int) -> int:
    """Tokens that fit into so many windows, begin and end not counted."""
    return (family.token_window - 2) * windows


def long_captions(
    config: RunConfig, family: ModelFamily, load: Callable[[Sequence[str]], Parts], dataset: Dataset
) -> list[Long]:
    """Captions, as long as their rules can make them, and validation prompts that are cut.

    The tokenizers are loaded where there is something to count.
    """
    room = room_for_tokens(family, config.data.token_windows)
    found: dict[str, Long] = {}  # the first place of each caption
    # a token has a byte at least: what has no more bytes than there is room needs no counting
    candidates = (pair for pair in _spoken(config, dataset) if len(pair[1].encode()) > room)
    tokenizers: Parts = {}
    while pairs := list(islice(candidates, AT_ONCE)):
        tokenizers = tokenizers or load([p for p in family.prompt_encoders if p not in family.text_encoders])
        counts = family.count_tokens(tokenizers, [caption for _, caption in pairs])
        for (where, caption), count in zip(pairs, counts, strict=True):
            if count > room:
                found.setdefault(caption, Long(where, caption, count))
    return list(found.values())


def find_long_captions(
    config: RunConfig, family: ModelFamily, load: Callable[[Sequence[str]], Parts], dataset: Dataset
) -> list[str]:
    """One line for each caption that is cut, the last says what would hold all; UserError if they may not be cut."""
    found = long_captions(config, family, load, dataset)
    if not found:
        return []
    room = room_for_tokens(family, config.data.token_windows)
    problems = Problems()
    for long in found:
        seen = f"has {long.tokens} tokens, only the first {room} are seen"
        problems.add(f"captions of over {room} tokens", f"{long.where}: {long.caption[:60]!r}… {seen}")
    lines = problems.lines()
    needed = -(-max(long.tokens for long in found) // (family.token_window - 2))
    advice = f"`data.token_windows: {needed}` would hold every caption"
    if config.data.long_captions == "error":
        raise UserError([*lines, f"{advice}; `data.long_captions: cut` cuts them"])
    return [*lines, advice]


def find_unseen_captions(config: RunConfig, dataset: Dataset) -> list[str]:
    """A line where images have more captions than variants, which go through them in turn: the last are never seen."""
    variants = config.data.variants
    if variants is None:
        return []
    counts = (len(dataset.captions(s, row)) for s, found in enumerate(dataset.images) for row in range(len(found.kept)))
    if (most := max(counts, default=0)) <= variants:
        return []
    return [f"data.variants {variants}: of the {most} captions of an image the last are never seen; {most} sees all"]


def _spoken(config: RunConfig, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Where a caption stands, and the caption with all of its tags."""
    for source, images in enumerate(dataset.images):
        rules = dataset.rules[source]
        for row in range(len(images.kept)):
            for caption in dataset.captions(source, row):
                yield dataset.location(source, row), longest_caption(caption, rules)
    yield from (("validation.prompts", prompt) for prompt in config.validation.texts)
