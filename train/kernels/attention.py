"""Attention whose queries, keys and values are made together, straight to the kernel of `scaled_dot_product_attention`.

diffusers looks up the arguments of its processor in every call, and divides by a factor that is 1 in these models.
What the frozen layers make of the words is kept for as long as the same words come again: one caption for all images.
"""

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from .lora_linear import apply_together, are_ready, base_products, cast_type


class FastAttention(Attention):
    """diffusers' attention over tokens (B, tokens, width), without norms, masks or a residual of its own."""

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether an attention can become one."""
        return (
            type(module) is Attention
            and type(module.processor) is AttnProcessor2_0
            and not module.fused_projections
            and not module.residual_connection
            and not module.norm_cross
            and module.rescale_output_factor == 1
            and all(each is None for each in (module.spatial_norm, module.group_norm, module.norm_q, module.norm_k))
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.training or attention_mask is not None or kwargs or hidden_states.ndim != 3:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if encoder_hidden_states is None:
            projected = apply_together(hidden_states, self.to_q, self.to_k, self.to_v)
        else:
            bases = self._of_known_words(encoder_hidden_states)
            keys = apply_together(encoder_hidden_states, self.to_k, self.to_v, bases=bases)
            projected = [self.to_q(hidden_states), *keys]
        count = len(hidden_states)
        query, key, value = (each.view(count, each.shape[1], self.heads, -1).transpose(1, 2) for each in projected)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        out, dropout = cast(Any, self.to_out)
        return dropout(out(mixed.reshape(*hidden_states.shape[:2], -1)))

    def _of_known_words(self, words: Tensor) -> Sequence[Tensor] | None:
        """What the frozen layers of keys and values make of words that have come before, else None."""
        layers = (self.to_k, self.to_v)
        if torch.compiler.is_compiling() or words.requires_grad or not are_ready(layers):
            return None
        known = [each for each in _KNOWN.get(self, []) if each.words() is not None]
        found = next((each for each in known if each.words() is words), None)
        if found is None:
            _KNOWN[self] = [*known[1 - MOST_KNOWN :], _Known(words)]
            return None
        return found.bases(layers)


MOST_KNOWN = 2
"""Batches of words whose products are kept: a caption, and that of class images."""


class _Known:
    """Words, for as long as somebody else has them, and what frozen layers make of them."""

    def __init__(self, words: Tensor) -> None:
        self.words = ref(words)
        self.products: dict[torch.dtype, Sequence[Tensor]] = {}

    def bases(self, layers: Sequence[Any]) -> Sequence[Tensor]:
        words = cast(Tensor, self.words())
        kind = cast_type(words) or words.dtype
        if kind not in self.products:
            self.products = {kind: base_products(words, layers)}
        return self.products[kind]


_KNOWN: WeakKeyDictionary[FastAttention, list[_Known]] = WeakKeyDictionary()
