"""Latents as pictures of the final size: fast, by the family's linear map, or through the VAE."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.latent_rgb import to_rgb


def mapped(latents: Tensor, factors: Tensor, zoom: int) -> list[Image.Image]:
    """Latents (B, C, h, w), scaled, by `factors` (C + 1, 3); each latent pixel is a square of `zoom` pixels."""
    images = [Image.fromarray(picture.numpy()) for picture in to_rgb(latents, factors).cpu()]
    return [image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST) for image in images]


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """Latents (B, C, h, w), scaled, through the VAE of a pipeline, in its type, or in fp32 where it asks for that."""
    vae = pipeline.vae
    dtype = vae.dtype
    overflows = dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.float()
    try:
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    finally:
        vae.to(dtype)
    return pipeline.image_processor.postprocess(pixels.float(), output_type="pil")


def strip(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Images of one size in rows, which need not be of one length, with white between them."""
    width, height = (size + gap for size in rows[0][0].size)
    canvas = Image.new("RGB", (width * max(map(len, rows)) - gap, height * len(rows) - gap), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            canvas.paste(image, (column * width, row * height))
    return canvas
