"""A picture of latents without a decoder: one linear map from the channels of a latent pixel to its colour.

    rgb = latents @ factors[:-1] + factors[-1]

Latents are as a pipeline has them while it samples: those of the VAE times `vae.config.scaling_factor`. The map sees
what colours are where; what the decoder makes of neighbours, such as edges and texture, it does not.
"""

from typing import Any

import torch
from torch import Tensor

from ..configs.errors import UserError

Rows = tuple[tuple[float, float, float], ...]

STABLE_DIFFUSION: Rows = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
    (0.0, 0.0, 0.0),
)
"""Stable Diffusion 1.x and 2.x, which share a VAE: ComfyUI's `latent_formats.SD15`."""
SDXL: Rows = (
    (0.3651, 0.4232, 0.4341),
    (-0.2533, -0.0042, 0.1068),
    (0.1076, 0.1111, -0.0362),
    (-0.3165, -0.2492, -0.2188),
    (0.1084, -0.0175, -0.0011),
)
"""ComfyUI's `latent_formats.SDXL`."""
POCKET: Rows = (
    (1.0129, 0.2555, 0.0556),
    (1.8184, -0.0237, 0.6659),
    (0.3797, 0.2381, 0.3869),
    (-1.2838, 0.1998, 0.0743),
    (0.2874, -0.1216, -0.0358),
)
"""Printed by `python -m loraloom.models.pocket.latent_rgb`: 34 of 255 off on new scenes, where one colour for all is 76
off. Shapes are right, colours rough (yellow looks salmon): this VAE is far from linear."""

BY_SCALING_FACTOR = {0.18215: STABLE_DIFFUSION, 0.13025: SDXL, 0.34597: POCKET}
"""A VAE is known by its scaling factor: one over the standard deviation of its latents, of five digits."""


def latent_rgb(vae: Any) -> Tensor:
    """(C + 1, 3): what a VAE's latents mean in RGB from -1 to 1, the last row the bias. UserError where none is known.

    Fine-tuned decoders keep the latents, and with them the scaling factor.
    """
    scaling_factor = round(vae.config.scaling_factor, 5)
    if scaling_factor not in BY_SCALING_FACTOR:
        raise UserError(
            f"no linear map to RGB is known for latents of a VAE with scaling_factor {scaling_factor:g}, only for "
            f"{', '.join(f'{known:g}' for known in BY_SCALING_FACTOR)}; show them through the VAE (vae=True)"
        )
    return torch.tensor(BY_SCALING_FACTOR[scaling_factor])


def to_rgb(latents: Tensor, factors: Tensor) -> Tensor:
    """Latents (B, C, h, w) as uint8 pictures (B, h, w, 3), by `factors` (C + 1, 3)."""
    factors = factors.to(latents.device)
    rgb = latents.movedim(1, -1).float() @ factors[:-1] + factors[-1]
    return rgb.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
