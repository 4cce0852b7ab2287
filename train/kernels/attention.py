"""Attention whose queries, keys and values are made together, straight to the kernel of `scaled_dot_product_attention`.

diffusers looks up the arguments of its processor in every call, and divides by a factor that is 1 in these models.
"""

from typing import Any, cast

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from .lora_linear import apply_together


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
            projected = [self.to_q(hidden_states), *apply_together(encoder_hidden_states, self.to_k, self.to_v)]
        count = len(hidden_states)
        query, key, value = (each.view(count, each.shape[1], self.heads, -1).transpose(1, 2) for each in projected)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        out, dropout = cast(Any, self.to_out)
        return dropout(out(mixed.reshape(*hidden_states.shape[:2], -1)))
