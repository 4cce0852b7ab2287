"""Images to latents and captions to embeddings, one by one and in the encoder's own precision.

One by one, because the kernels of a batch round differently from those of a single item: so a latent is the same
number whether it comes from the cache or from the file, and an embedding whatever else is in its batch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import ONE_WINDOW, Conditioning, ModelFamily, Parts, PromptOptions
from .to_device import to_like

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGE_DTYPE = torch.float32
"""Type of image encoders while they encode, whatever the base's is: a latent is computed once and used thousands of
times, and half precision would leave an error of 4e-3 in it for good."""

PROBE_PROMPT = "a probe"
"""Its embedding is at hand wherever a model is to be compared with another."""

Encode = Callable[[Sequence[str]], Conditioning]
"""From captions to a batch of embeddings, wherever they come from."""


@torch.no_grad()
def encode_image(family: ModelFamily, parts: Parts, pixels: Tensor) -> Tensor:
    """(3, H, W) in [-1, 1] to (2, C, h, w): mean and standard deviation of the latents; see `IMAGE_DTYPE`."""
    device = _device(parts, family.image_encoders)
    with torch.autocast(device.type, enabled=False):
        return family.encode_images(parts, pixels[None].to(device))[0]


@torch.no_grad()
def encode_caption(
    family: ModelFamily, parts: Parts, caption: str, options: PromptOptions = ONE_WINDOW
) -> "Mapping[str, Tensor]":
    """The tensors of a `Conditioning` for one caption, without the batch."""
    with torch.autocast(_device(parts, family.text_encoders).type, enabled=False):
        return family.encode_prompts(parts, [caption], options).row(0)


def encoder_of(family: ModelFamily, parts: Parts, options: PromptOptions = ONE_WINDOW) -> Encode:
    """Encodes captions with the text encoders as they are at that moment, each different one once a call."""

    def encode(captions: Sequence[str]) -> Conditioning:
        rows = {caption: encode_caption(family, parts, caption, options) for caption in dict.fromkeys(captions)}
        return Conditioning.stack([rows[caption] for caption in captions])

    return encode


def draw_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents (B, C, h, w) from moments (B, 2, C, h, w), or (B, 1, C, h, w) where they were drawn once."""
    if moments.shape[1] == 1:
        return moments[:, 0]
    return moments[:, 0] + moments[:, 1] * to_like(noise, moments)


def pool_masks(masks: Tensor, latents: Tensor) -> Tensor:
    """(..., height, width) masks averaged to the height and width of (..., h, w) latents."""
    return F.adaptive_avg_pool2d(masks, (latents.shape[-2], latents.shape[-1]))


def _device(parts: Parts, names: Sequence[str]) -> torch.device:
    return next(parts[names[0]].parameters()).device
