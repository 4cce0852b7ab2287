"""Noise by the scheduler's own schedule, with numbers that can be checked on paper."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from loraloom.configs.errors import UserError
from loraloom.data.draws import Draws
from loraloom.models.noise.ddpm import DDPMNoise, debiased_weight, min_snr_weight

LATENTS = torch.arange(2 * 4 * 3 * 3, dtype=torch.float32).reshape(2, 4, 3, 3) / 50
DRAWS = Draws(0, [5, 6])


def scheduler(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def test_noise_prediction():
    noised = DDPMNoise(scheduler()).sample(LATENTS, DRAWS)
    alpha = scheduler().alphas_cumprod[noised.timesteps].reshape(2, 1, 1, 1)
    torch.testing.assert_close(noised.latents, alpha.sqrt() * LATENTS + (1 - alpha).sqrt() * noised.target)
    assert torch.equal(noised.target, DRAWS.normal("noise", (4, 3, 3)))
    assert torch.equal(noised.weight, torch.ones(2))


def test_v_prediction():
    noised = DDPMNoise(scheduler(prediction_type="v_prediction")).sample(LATENTS, DRAWS)
    alpha = scheduler().alphas_cumprod[noised.timesteps].reshape(2, 1, 1, 1)
    noise = DRAWS.normal("noise", (4, 3, 3))
    torch.testing.assert_close(noised.target, alpha.sqrt() * noise - (1 - alpha).sqrt() * LATENTS)


def test_another_target_is_refused():
    with pytest.raises(UserError, match="sample"):
        DDPMNoise(scheduler(prediction_type="sample"))


def test_min_snr_weights_of_the_paper():
    snr = torch.tensor([0.5, 5.0, 50.0])
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v_prediction"), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 51]))


def test_debiased_weights_of_the_paper():
    snr = torch.tensor([0.25, 1.0, 4.0])
    torch.testing.assert_close(debiased_weight(snr, "epsilon"), torch.tensor([2.0, 1.0, 0.5]))
    as_noise = debiased_weight(snr, "v_prediction") * (snr + 1) / snr  # |v error|^2 = (SNR + 1) / SNR |noise error|^2
    torch.testing.assert_close(as_noise, torch.tensor([2.0, 1.0, 0.5]))
    noised = DDPMNoise(scheduler(), debiased=True).sample(LATENTS, DRAWS)
    torch.testing.assert_close(noised.weight, compute_snr(scheduler(), noised.timesteps).rsqrt())


def test_min_snr_takes_the_snr_of_the_schedule():
    noised = DDPMNoise(scheduler(), min_snr_gamma=5.0).sample(LATENTS, DRAWS)
    snr = compute_snr(scheduler(), noised.timesteps)
    torch.testing.assert_close(noised.weight, snr.clamp(max=5) / snr)


def test_offset_noise_adds_one_value_for_each_channel():
    plain, shifted = (DDPMNoise(scheduler(), offset=offset).sample(LATENTS, DRAWS) for offset in (0.0, 0.1))
    difference = shifted.target - plain.target
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    torch.testing.assert_close(difference[..., 0, 0], 0.1 * DRAWS.normal("noise_offset", (4, 1, 1))[..., 0, 0])
