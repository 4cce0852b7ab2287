"""The maths of guidance by CLIP, without a pipeline: what is similar, and where that pushes a UNet's prediction.

    eps' = eps - sqrt(1 - a) * grad_x [ s * similarity(CLIP(decode(x0(x))), text) ]
    x0(x) = (x - sqrt(1 - a) * eps(x)) / sqrt(a)

Guidance by a classifier (Dhariwal and Nichol 2021, algorithm 2), with CLIP in the classifier's place (Nichol et al.
2021, section 2.3), which sees the predicted original instead of the noisy sample. `a`, here `alpha`, is the scheduler's
`alphas_cumprod` at the timestep; `x` is the UNet's input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configs.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the red, green and blue that CLIP was trained on (Radford et al. 2021, and its code)."""


def text_features(clip: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, tokens) to (B, width), of length 1."""
    pooled = clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


def similarity(clip: Any, images: Tensor, text: Tensor) -> Tensor:
    """Cosines (B,) of images (B, 3, H, W) in [-1, 1] and text features (B, width), in float32."""
    pixels = clip_pixels(images, clip.config.vision_config.image_size).to(clip.dtype)
    features = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return F.cosine_similarity(features.float(), text.float(), dim=-1)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to CLIP's (B, 3, size, size): the shorter side resized, the middle cut, normalised."""
    scale = size / min(images.shape[-2:])
    height, width = (max(size, int(side * scale)) for side in images.shape[-2:])
    resized = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    cut = resized[..., top : top + size, left : left + size] / 2 + 0.5
    mean, std = (torch.tensor(values, device=cut.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (cut - mean) / std


def predicted_original(sample: Tensor, prediction: Tensor, alpha: float, prediction_type: str) -> Tensor:
    """x0 of x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, where the UNet predicts eps or v (Salimans and Ho 2022)."""
    if prediction_type == "epsilon":
        return (sample - (1 - alpha) ** 0.5 * prediction) / alpha**0.5
    if prediction_type == "v_prediction":
        return alpha**0.5 * sample - (1 - alpha) ** 0.5 * prediction
    raise UserError(f"CLIP guides UNets that predict epsilon or v_prediction, not {prediction_type!r}")


def steered(prediction: Tensor, gradient: Tensor, alpha: float, prediction_type: str) -> Tensor:
    """The prediction whose eps is smaller by sqrt(1 - alpha) * gradient, for the same sample.

    v = (eps - sqrt(1 - alpha) x) / sqrt(alpha), so that v changes by 1 / sqrt(alpha) as much.
    """
    factor = 1 / alpha**0.5 if prediction_type == "v_prediction" else 1.0
    return prediction - factor * (1 - alpha) ** 0.5 * gradient
