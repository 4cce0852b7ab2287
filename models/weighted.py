"""Prompts with weighted words in compel's syntax: `a (red)1.4 star`, `a red++ star`, `("a star", "a cat").blend(1, 1)`.

Prompts of web UIs, `a (red:1.4) star BREAK a cat`, are translated first (`web_ui_prompts`).
compel parses and weighs, the family encodes: so clip skip, windows and trained words are the same as without weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..configs.errors import UserError
from .clip import expanded
from .quiet import quietly
from .web_ui_prompts import translated

try:
    with quietly():
        from compel import Compel, EmbeddingsProvider
        from compel.embeddings_provider import SplitLongTextMode
        from compel.prompt_parser import Blend, FlattenedPrompt, PromptParser
except ImportError as missing:
    raise UserError("weighted prompts need compel: pip install compel") from missing

MOST_BRACKETS = 100
"""Of a prompt; its parser calls itself for each."""
States = Callable[[Tensor, Tensor | None], Tensor]
"""From tokens (B, 77) and an attention mask (B, 77) to hidden states (B, 77, width)."""


class _Provider(EmbeddingsProvider):
    """compel's rules on embeddings that the family makes."""

    def __init__(self, tokenizer: Any, encoder: Any, states: States):
        super().__init__(tokenizer, encoder, truncate=False, split_long_text_mode=SplitLongTextMode.BRUTAL)
        self.states = states

    def _encode_token_ids_to_embeddings(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, 77, width); compel's own asks text encoders for a level that transformers 5.6 took away."""
        whole = attention_mask is None or bool((attention_mask == 1).all())
        return self.states(token_ids, None if whole else attention_mask)


def weighted_states(prompt: str, tokenizer: Any, encoder: Any, windows: int, states: States) -> Tensor:
    """Hidden states (1, windows, 77, width); empty windows where the prompt fills fewer.

    UserError for a prompt that cannot be parsed, that fills more windows, or that swaps words while sampling.
    """
    compel = Compel(tokenizer, encoder, truncate_long_prompts=False, split_long_text_mode=SplitLongTextMode.BRUTAL)
    provider = compel.conditioning_provider = _Provider(tokenizer, encoder, states)
    parsed = _parsed(expanded(tokenizer, [prompt])[0])
    with quietly():
        found, *_ = compel.build_conditioning_tensor_for_conjunction(parsed)
    pieces = list(found.reshape(-1, tokenizer.model_max_length, found.shape[-1]))
    if len(pieces) > windows:
        raise UserError(
            f"{prompt!r} fills {len(pieces)} windows of tokens, not {windows}: give that many token windows"
        )
    pieces += [provider.empty_z[0]] * (windows - len(pieces))
    return torch.stack(pieces)[None]


def check_syntax(prompt: str) -> None:
    """UserError for a prompt that cannot be parsed, or that swaps words while sampling."""
    _parsed(prompt)


def plain_text(prompt: str) -> str:
    """The words of a prompt without their weights: of a blend, the first one's."""
    return " ".join(" ".join(_fragments(part)) for part in _parsed(prompt).prompts).strip()


def _fragments(part: Any) -> list[str]:
    if isinstance(part, Blend):
        return _fragments(part.prompts[0])
    assert isinstance(part, FlattenedPrompt)
    return [fragment.text for fragment in part.children if hasattr(fragment, "text")]


def _parsed(prompt: str) -> Any:
    if prompt.count("(") > MOST_BRACKETS:
        raise UserError(f"{prompt[:40]!r}… has {prompt.count('(')} brackets, more than {MOST_BRACKETS} are not weighed")
    try:
        found: Any = Compel.parse_prompt_string(translated(prompt))
    except (PromptParser.ParsingException, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{prompt!r} cannot be read as a weighted prompt: {reason}") from error
    if any(part.wants_cross_attention_control for part in found.prompts):
        raise UserError(f"{prompt!r}: .swap() changes words while it samples, which is not possible here")
    return found
