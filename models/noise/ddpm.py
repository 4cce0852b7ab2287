"""The variance-preserving diffusion of DDPM, by the scheduler's own training noise schedule.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps    (Ho et al. 2020, equation 4)
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import NoiseSection
from ..to_device import to_device, to_like
from . import weighting
from .process import KeyedDraws, Noised
from .timesteps import draw_timesteps

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


class DDPMNoise:
    """The target is the noise or v, as the base's scheduler says."""

    def __init__(self, scheduler: "DDPMScheduler", section: NoiseSection):
        self.scheduler, self.section = scheduler, section
        self.prediction, self.total = scheduler.config["prediction_type"], scheduler.config["num_train_timesteps"]
        self.end = self.total if section.max_timestep is None else section.max_timestep + 1
        if self.end > self.total or section.min_timestep >= self.end:
            raise UserError(
                f"noise.min_timestep {section.min_timestep} to noise.max_timestep {self.end - 1}: "
                f"the base's schedule has the timesteps 0 to {self.total - 1}"
            )

        self._check_weights()

    def _check_weights(self) -> None:
        """Both weights divide by the signal-to-noise ratio, which may be 0 at the end of the schedule."""
        alphas = self.scheduler.alphas_cumprod[self.section.min_timestep : self.end]
        finite = self._weight(alphas / (1 - alphas)).isfinite()
        if not finite.all():
            at = self.section.min_timestep + int(finite.logical_not().nonzero()[0])
            name = "debiased" if self.section.debiased else "min_snr_gamma"
            raise UserError(
                f"noise.{name}: this base predicts noise and has none but noise at timestep {at} (zero terminal SNR), "
                f"where the weight is not finite: give noise.max_timestep {at - 1}, or leave the weight out"
            )

    def sample(self, latents: Tensor, draws: KeyedDraws) -> Noised:
        """Keyed by purpose: "timestep", "noise" and, if used, "noise_offset", "noise/<k>", "input_perturbation"."""
        section = self.section
        timesteps = draw_timesteps(draws, section.density, section.min_timestep, self.end)
        return self.noised(latents, self._noise(latents, draws), to_device(timesteps, latents.device), draws)

    def grid(self, count: int) -> Tensor:
        """Middles of equally long stretches."""
        first, length = self.section.min_timestep, self.end - self.section.min_timestep
        return torch.tensor([first + (2 * k + 1) * length // (2 * count) for k in range(count)])

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor, draws: KeyedDraws | None = None) -> Noised:
        """Latents with a given noise at given timesteps; `draws` are for the perturbation of the input."""
        entered = noise
        if draws is not None and (gamma := self.section.input_perturbation):  # Ning et al. 2023, algorithm 1
            entered = noise + gamma * to_like(draws.normal("input_perturbation", latents.shape[1:]), latents)
        noisy = self.scheduler.add_noise(latents, entered, timesteps)  # type: ignore[arg-type]
        epsilon = self.prediction == "epsilon"
        target = noise if epsilon else self.scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        return Noised(noisy, timesteps, target, self._weight(snr), snr)

    def _noise(self, latents: Tensor, draws: KeyedDraws) -> Tensor:
        section, shape = self.section, latents.shape[1:]
        noise = to_like(draws.normal("noise", shape), latents)
        if section.offset:
            noise = noise + section.offset * to_like(draws.normal("noise_offset", (shape[0], 1, 1)), latents)
        return add_octaves(noise, draws, section.multires_discount, section.multires_octaves)

    def _weight(self, snr: Tensor) -> Tensor:
        if self.section.debiased:
            return weighting.debiased(snr, self.prediction)
        if self.section.min_snr_gamma is not None:
            return weighting.min_snr(snr, self.section.min_snr_gamma, self.prediction)
        return torch.ones_like(snr)


def add_octaves(noise: Tensor, draws: KeyedDraws, discount: float, octaves: int) -> Tensor:
    """Noise (B, C, h, w) with coarser noise added, each octave half as fine: multi-resolution noise (Whitaker 2023).

    The sum over k = 0 .. octaves of discount^k * upsampled noise of sides / 2^k, scaled to the standard deviation of
    each sample to be 1. Nothing is drawn, and the noise comes back as it is, without octaves.
    """
    if octaves == 0:
        return noise
    channels, height, width = noise.shape[1:]
    total = noise
    for k in range(1, octaves + 1):
        sides = max(1, height >> k), max(1, width >> k)
        coarse = to_like(draws.normal(f"noise/{k}", (channels, *sides)), noise)
        total = total + discount**k * F.interpolate(coarse, (height, width), mode="bilinear")
        if sides == (1, 1):
            break
    return total / total.std((1, 2, 3), keepdim=True)


def training_scheduler(scheduler: "DDPMScheduler", section: NoiseSection) -> "DDPMScheduler":
    """The base's scheduler, or one with zero terminal SNR (Lin et al. 2023, algorithm 1) if the section wants it.

    Samplers made from its config then end where training ended: at the last timestep, with trailing spacing. UserError
    where the config and the base's scheduler contradict each other.
    """
    found = scheduler.config["prediction_type"]
    if section.prediction not in ("auto", found):
        raise UserError(
            f"noise.prediction {section.prediction}: the base's scheduler says {found}, and a base that is trained as "
            "another kind comes out broken; leave the setting out, or correct scheduler/scheduler_config.json"
        )
    if not section.zero_terminal_snr:
        return scheduler
    if found != "v_prediction":
        raise UserError(
            f"noise.zero_terminal_snr needs a base that predicts v, this one predicts {found}: at the last timestep "
            "there would be nothing but noise to predict noise from"
        )
    return cast("DDPMScheduler", type(scheduler).from_config(scheduler.config, **scheduler_changes(section)))


def scheduler_changes(section: NoiseSection) -> dict[str, Any]:
    """Entries of the base's scheduler config that training has changed."""
    return {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if section.zero_terminal_snr else {}
