"""Colours of latents without a decoder: pocket's numbers are those that its fit finds, and they show its pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from loraloom.configs.errors import UserError
from loraloom.models.latent_rgb import POCKET, SDXL, STABLE_DIFFUSION, latent_rgb, to_rgb
from loraloom.models.pocket.latent_rgb import error, fit, scenes_and_latents


def vae_of(scaling_factor: float) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(scaling_factor=scaling_factor))


def test_the_map_is_linear_with_a_bias_and_stays_within_a_byte():
    factors = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [-1.0, 0, 0.5]])
    latents = torch.tensor([1.0, 0.25]).view(1, 2, 1, 1)
    assert to_rgb(latents, factors).tolist() == [[[[128, 191, 191]]]]  # (0, 0.5, 0.5) of -1 to 1
    assert to_rgb(100 * latents, factors).flatten().tolist() == [255, 255, 191]
    assert to_rgb(torch.zeros(2, 2, 3, 5), factors).shape == (2, 3, 5, 3)


@pytest.mark.parametrize(("scaling", "rows"), [(0.18215, STABLE_DIFFUSION), (0.13025, SDXL), (0.3459686, POCKET)])
def test_a_vae_is_known_by_its_scaling_factor(scaling, rows):
    assert torch.equal(latent_rgb(vae_of(scaling)), torch.tensor(rows))


def test_an_unknown_vae_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"scaling_factor 0\.5, only for 0\.18215, 0\.13025, 0\.34597; .*vae=True"):
        latent_rgb(vae_of(0.5))


@pytest.fixture(scope="module")
def pocket_vae():
    from diffusers import AutoencoderKL

    from loraloom.models.pocket import FOLDER

    return AutoencoderKL.from_pretrained(FOLDER, subfolder="vae")


def test_pockets_numbers_show_its_scenes_almost_as_well_as_a_fit_to_just_these(pocket_vae):
    pixels, latents = scenes_and_latents(pocket_vae, first=5_000, count=40)
    best, none = fit(pixels, latents), fit(pixels, torch.zeros_like(latents))
    stored = error(pixels, latents, torch.tensor(POCKET))
    assert stored < 1.05 * error(pixels, latents, best)
    assert stored < 0.5 * error(pixels, latents, none)


def test_the_fit_finds_a_map_that_is_there():
    latents, factors = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor(SDXL)
    pixels = (latents.movedim(1, -1) @ factors[:-1] + factors[-1]).movedim(-1, 1)
    assert torch.allclose(fit(pixels, latents), factors, atol=1e-5)


@torch.no_grad()
def test_a_flat_colour_is_shown_as_that_colour(pocket_vae):
    """Of a picture in the middle of what the map was fitted to."""
    red = np.asarray(Image.new("RGB", (64, 64), (214, 36, 40)))
    pixels = torch.from_numpy(red.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pocket_vae.encode(pixels).latent_dist.mean * pocket_vae.config.scaling_factor
    shown = to_rgb(latents, latent_rgb(pocket_vae))[0].float().mean((0, 1))
    assert shown[0] > 100 + shown[1:].max()
