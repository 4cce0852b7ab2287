"""Noise by the scheduler's own schedule, with numbers that can be checked on paper."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from loraloom.configs.errors import UserError
from loraloom.configs.schema import NoiseSection
from loraloom.data.draws import Draws
from loraloom.models.noise.ddpm import DDPMNoise, add_octaves, training_scheduler
from loraloom.models.noise.process import Noised
from loraloom.models.noise.timesteps import draw_timesteps
from loraloom.models.noise.weighting import debiased, min_snr

LATENTS = torch.arange(2 * 4 * 3 * 3, dtype=torch.float32).reshape(2, 4, 3, 3) / 50
DRAWS, MANY = Draws(0, [5, 6]), Draws(0, range(4000))


def scheduler(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


def noise(base: DDPMScheduler | None = None, **options) -> DDPMNoise:
    return DDPMNoise(base or scheduler(), NoiseSection(**options))


def sample(base: DDPMScheduler | None = None, **options) -> Noised:
    return noise(base, **options).sample(LATENTS, DRAWS)


def test_noise_prediction():
    noised = sample()
    alpha = scheduler().alphas_cumprod[noised.timesteps].reshape(2, 1, 1, 1)
    torch.testing.assert_close(noised.latents, alpha.sqrt() * LATENTS + (1 - alpha).sqrt() * noised.target)
    assert torch.equal(noised.target, DRAWS.normal("noise", (4, 3, 3)))
    assert torch.equal(noised.weight, torch.ones(2))
    torch.testing.assert_close(noised.snr, compute_snr(scheduler(), noised.timesteps))


def test_v_prediction():
    noised = sample(scheduler(prediction_type="v_prediction"))
    alpha = scheduler().alphas_cumprod[noised.timesteps].reshape(2, 1, 1, 1)
    noise = DRAWS.normal("noise", (4, 3, 3))
    torch.testing.assert_close(noised.target, alpha.sqrt() * noise - (1 - alpha).sqrt() * LATENTS)


def test_what_a_base_predicts_is_not_up_to_the_config():
    predicts_v = scheduler(prediction_type="v_prediction")
    assert training_scheduler(predicts_v, NoiseSection(prediction="v_prediction")) is predicts_v
    with pytest.raises(UserError, match=r"noise\.prediction epsilon: the base's scheduler says v_prediction"):
        training_scheduler(predicts_v, NoiseSection(prediction="epsilon"))


def test_zero_terminal_snr():
    """Lin et al. 2023, algorithm 1: the first signal level stays, the last is zero, those between are scaled."""
    base = scheduler(prediction_type="v_prediction")
    zero = training_scheduler(base, NoiseSection(zero_terminal_snr=True))
    before, after = base.alphas_cumprod.sqrt(), zero.alphas_cumprod.sqrt()
    torch.testing.assert_close(after[0], before[0])
    assert after[-1] < 1e-3
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    torch.testing.assert_close(after, expected, atol=1e-3, rtol=0)
    assert zero.config["timestep_spacing"] == "trailing"  # samplers begin where training ended
    assert isinstance(DDPMNoise(zero, NoiseSection()), DDPMNoise)
    with pytest.raises(UserError, match="zero_terminal_snr needs a base that predicts v"):
        training_scheduler(scheduler(), NoiseSection(zero_terminal_snr=True))


def test_min_snr_weights_of_the_paper():
    snr = torch.tensor([0.5, 5.0, 50.0])
    torch.testing.assert_close(min_snr(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(min_snr(snr, 5.0, "v_prediction"), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 51]))


def test_debiased_weights_of_the_paper():
    snr = torch.tensor([0.25, 1.0, 4.0])
    torch.testing.assert_close(debiased(snr, "epsilon"), torch.tensor([2.0, 1.0, 0.5]))
    as_noise = debiased(snr, "v_prediction") * (snr + 1) / snr  # |v error|^2 = (SNR + 1) / SNR |noise error|^2
    torch.testing.assert_close(as_noise, torch.tensor([2.0, 1.0, 0.5]))
    noised = sample(debiased=True)
    torch.testing.assert_close(noised.weight, compute_snr(scheduler(), noised.timesteps).rsqrt())


def test_min_snr_is_the_arithmetic_of_the_diffusers_examples():
    """As examples/text_to_image/train_text_to_image.py of diffusers has it, for both kinds of prediction."""
    for prediction in ("epsilon", "v_prediction"):
        noised = sample(scheduler(prediction_type=prediction), min_snr_gamma=5.0)
        snr = compute_snr(scheduler(), noised.timesteps)
        expected = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        expected = expected / (snr if prediction == "epsilon" else snr + 1)
        torch.testing.assert_close(noised.weight, expected)


def test_offset_noise_adds_one_value_for_each_channel():
    difference = sample(offset=0.1).target - sample().target
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    torch.testing.assert_close(difference[..., 0, 0], 0.1 * DRAWS.normal("noise_offset", (4, 1, 1))[..., 0, 0])


def test_input_perturbation_is_not_in_the_target():
    plain, perturbed = sample(), sample(input_perturbation=0.1)
    assert torch.equal(plain.target, perturbed.target)
    alpha = scheduler().alphas_cumprod[plain.timesteps].reshape(2, 1, 1, 1)
    extra = 0.1 * DRAWS.normal("input_perturbation", (4, 3, 3))
    torch.testing.assert_close(perturbed.latents - plain.latents, (1 - alpha).sqrt() * extra)


def test_octaves_make_noise_coarser_and_leave_its_strength():
    draws = Draws(0, range(50))
    fine = draws.normal("noise", (4, 16, 16))
    assert add_octaves(fine, draws, 0.3, 0) is fine
    coarse = add_octaves(fine, draws, 0.9, 6)
    torch.testing.assert_close(coarse.std((1, 2, 3)), torch.ones(50))
    averages = [each.unflatten(2, (4, 4)).unflatten(-1, (4, 4)).mean((3, 5)).std() for each in (fine, coarse)]
    assert averages[0] == pytest.approx(0.25, abs=0.02)  # of 16 independent values
    assert averages[1] > 0.4
    one = add_octaves(fine[:, :, :2, :2], draws, 0.5, 1)  # a single value of half the strength, by hand
    by_hand = fine[:, :, :2, :2] + 0.5 * draws.normal("noise/1", (4, 1, 1))
    torch.testing.assert_close(one, by_hand / by_hand.std((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "cosmap"])
def test_timesteps_have_their_density_within_the_range(density):
    drawn = draw_timesteps(MANY, density, 200, 800)
    assert drawn.min() >= 200
    assert drawn.max() < 800
    place = (drawn - 200 + 0.5) / 600
    below_a_quarter = {
        "uniform": 0.25,
        "logit_normal": 0.5 * math.erfc(math.log(3) / math.sqrt(2)),  # P(z < logit(1/4)) = P(z > ln 3)
        "cosmap": 2 / math.pi * math.atan(1 / 3),  # u with 1 - 1 / (tan(pi u / 2) + 1) = 1/4
    }[density]
    assert (place < 0.25).float().mean() == pytest.approx(below_a_quarter, abs=0.02)
    assert (place < 0.5).float().mean() == pytest.approx(0.5, abs=0.025)  # all three are symmetric


def test_a_range_beyond_the_schedule_is_refused():
    assert noise(min_timestep=999).sample(LATENTS, DRAWS).timesteps.tolist() == [999, 999]
    assert noise(max_timestep=0).sample(LATENTS, DRAWS).timesteps.tolist() == [0, 0]
    for section in ({"max_timestep": 1000}, {"min_timestep": 5, "max_timestep": 4}):
        with pytest.raises(UserError, match="the timesteps 0 to 999"):
            noise(**section)


@pytest.mark.parametrize("section", [NoiseSection(debiased=True), NoiseSection(min_snr_gamma=5.0)])
def test_no_weight_is_infinite_where_there_is_no_signal(section):
    """A base that predicts noise may have zero terminal SNR in its own config; of v both weights are finite there."""
    last = 999
    bare = scheduler(rescale_betas_zero_snr=True)
    assert bare.alphas_cumprod[last] == 0
    with pytest.raises(UserError, match=f"not finite: give noise.max_timestep {last - 1}"):
        DDPMNoise(bare, section)
    DDPMNoise(bare, section.model_copy(update={"max_timestep": last - 1}))
    v = training_scheduler(scheduler(prediction_type="v_prediction"), NoiseSection(zero_terminal_snr=True))
    assert DDPMNoise(v, section)._weight(v.alphas_cumprod[last:]) == 0
