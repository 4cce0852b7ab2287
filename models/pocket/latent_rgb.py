"""Fits the linear map that shows pocket's latents in colour, and says how far it is from the pictures.

    python -m loraloom.models.pocket.latent_rgb

Least squares between the latents of drawn scenes and the scenes at the size of the latents; the error is that of other
scenes. What it prints stands in models/latent_rgb.py.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ..latent_rgb import to_rgb
from . import FOLDER
from .build import draw_scenes, to_pixels

NUM_SCENES = 500  # to fit, and as many to test: with fewer, the numbers depend on which
UNSEEN = 1_000_000  # far beyond the scenes that `build` trains on


def main() -> None:
    """Prints the factors, rounded as they are stored, and the error that they leave."""
    vae = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae")
    factors = fit(*scenes_and_latents(vae, first=0)).round(decimals=4)
    for row in factors.tolist():
        print("    (" + ", ".join(f"{value:.4f}" for value in row) + "),")
    pixels, latents = scenes_and_latents(vae, first=UNSEEN)
    average = fit(pixels, torch.zeros_like(latents))  # no latents: one colour for everything
    print(f"held out: {error(pixels, latents, factors):.1f} of 255 off (root mean square)", end="")
    print(f"; without the latents: {error(pixels, latents, average):.1f}")


@torch.no_grad()
def scenes_and_latents(vae: AutoencoderKL, first: int, count: int = NUM_SCENES) -> tuple[Tensor, Tensor]:
    """Drawn scenes at the size of their latents, (n, 3, h, w) in [-1, 1], and their latents, scaled, (n, C, h, w)."""
    pixels = to_pixels(draw_scenes(seed=0, count=count, first=first)[1])
    latents = torch.cat([vae.encode(each).latent_dist.mean for each in pixels.split(50)])  # pyright: ignore
    latents = latents * vae.config["scaling_factor"]
    return F.avg_pool2d(pixels, pixels.shape[-1] // latents.shape[-1]), latents


def fit(pixels: Tensor, latents: Tensor) -> Tensor:
    """The factors (C + 1, 3) that minimise |[latents, 1] factors - pixels|^2."""
    columns = latents.movedim(1, -1).flatten(0, -2)
    columns = torch.cat([columns, torch.ones(len(columns), 1)], dim=1)
    colours = pixels.movedim(1, -1).flatten(0, -2)
    return torch.linalg.lstsq(columns.double(), colours.double(), driver="gelsd").solution.float()


def error(pixels: Tensor, latents: Tensor, factors: Tensor) -> float:
    """The root of the mean squared difference in levels of 255."""
    wanted = pixels.movedim(1, -1).add(1).mul(127.5)
    return (to_rgb(latents, factors).float() - wanted).square().mean().sqrt().item()


if __name__ == "__main__":
    main()
