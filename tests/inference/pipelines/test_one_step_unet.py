"""One call, one step: the sample is what the scheduler's formula says of the UNet's prediction."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel
from torch.testing import assert_close

from loraloom.configs.errors import UserError
from loraloom.inference.pipelines.one_step_unet import OneStepUNetPipeline

SIZES = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
CROSS |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8}
WORDS = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)


@pytest.fixture(scope="module")
def unconditional() -> OneStepUNetPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(in_channels=3, out_channels=3, attention_head_dim=4, **SIZES, **PLAIN)
    return OneStepUNetPipeline(unet.eval(), DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def conditional() -> OneStepUNetPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(attention_head_dim=4, **SIZES, **CROSS)
    return OneStepUNetPipeline(unet.eval(), DDIMScheduler(clip_sample=False))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_sample_is_the_original_predicted_from_the_noise(conditional):
    """x0 = (x - sqrt(1 - a) eps) / sqrt(a) at the last of 1000 timesteps."""
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        eps = conditional.unet(noise, 999, WORDS).sample
    a = conditional.scheduler.alphas_cumprod[999]
    made = conditional(WORDS, generator=seeded()).images
    assert_close(made, (noise - (1 - a).sqrt() * eps) / a.sqrt())


def test_a_seed_is_a_sample_and_words_matter(conditional):
    made = conditional(WORDS, generator=seeded()).images
    assert torch.equal(conditional(WORDS, generator=seeded()).images, made)
    assert not torch.equal(conditional(WORDS, generator=seeded(1)).images, made)
    assert not torch.equal(conditional(-WORDS, generator=seeded()).images, made)


def test_the_scheduler_may_scale_and_draw(unconditional):
    pipeline = OneStepUNetPipeline(unconditional.unet, EulerDiscreteScheduler())
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    sigma = pipeline.scheduler.init_noise_sigma
    with torch.no_grad():
        timestep = pipeline.scheduler.timesteps[0]
        eps = pipeline.unet(noise * sigma / (sigma**2 + 1) ** 0.5, timestep).sample
    assert_close(pipeline(generator=seeded()).images, noise * sigma - sigma * eps, rtol=1e-4, atol=1e-4)


def test_the_three_outputs_are_one_picture(unconditional):
    tensor = unconditional(batch_size=2, generator=seeded()).images
    array = unconditional(batch_size=2, generator=seeded(), output_type="np").images
    pictures = unconditional(batch_size=2, generator=seeded(), output_type="pil").images
    assert_close(torch.from_numpy(array), (tensor / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    assert np.abs(np.stack([np.asarray(picture) for picture in pictures]) / 255 - array).max() <= 0.5 / 255 + 1e-6


def test_saved_and_loaded_it_gives_the_same_sample(unconditional, tmp_path):
    unconditional.save_pretrained(tmp_path)
    again = OneStepUNetPipeline.from_pretrained(tmp_path)
    # kernels round by where weights begin in memory, and the step divides that by sqrt(a) = 0.07
    assert_close(again(generator=seeded()).images, unconditional(generator=seeded()).images, rtol=0, atol=1e-3)


def test_what_does_not_fit_is_one_line(conditional, unconditional):
    with pytest.raises(UserError, match="UNet2DConditionModel needs encoder_hidden_states"):
        conditional()
    with pytest.raises(UserError, match="UNet2DModel takes no encoder_hidden_states"):
        unconditional(WORDS)
    with pytest.raises(UserError, match="4 channels is no picture"):
        conditional(WORDS, output_type="pil")
    with pytest.raises(UserError, match="there are: pt, np, pil"):
        unconditional(output_type="jpg")
