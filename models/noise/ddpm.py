"""The variance-preserving diffusion of DDPM, by the scheduler's own training noise schedule.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps    (Ho et al. 2020, equation 4)
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...configs.errors import UserError
from .process import KeyedDraws, Noised

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


class DDPMNoise:
    """Uniform timesteps; the target is the noise or v, as the base's scheduler says."""

    def __init__(
        self,
        scheduler: "DDPMScheduler",
        *,
        min_snr_gamma: float | None = None,
        debiased: bool = False,
        offset: float = 0.0,
    ):
        self.scheduler, self.min_snr_gamma, self.debiased, self.offset = scheduler, min_snr_gamma, debiased, offset
        self.prediction = scheduler.config["prediction_type"]
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"the base's scheduler predicts {self.prediction!r}: only epsilon and v_prediction train")

    def sample(self, latents: Tensor, draws: KeyedDraws) -> Noised:
        """Keyed by purpose: "timestep", "noise" and, if used, "noise_offset"."""
        timesteps = draws.integers("timestep", 0, self.scheduler.config["num_train_timesteps"]).to(latents.device)
        noise = draws.normal("noise", latents.shape[1:]).to(latents)
        if self.offset:
            noise = noise + self.offset * draws.normal("noise_offset", (latents.shape[1], 1, 1)).to(latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        epsilon = self.prediction == "epsilon"
        target = noise if epsilon else self.scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
        return Noised(noisy, timesteps, target, self._weight(timesteps))

    def _weight(self, timesteps: Tensor) -> Tensor:
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        if self.debiased:
            return debiased_weight(snr, self.prediction)
        if self.min_snr_gamma is not None:
            return min_snr_weight(snr, self.min_snr_gamma, self.prediction)
        return torch.ones_like(snr)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v   (Hang et al. 2023, equation 11)."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def debiased_weight(snr: Tensor, prediction: str) -> Tensor:
    """1 / sqrt(SNR) for noise (Yu et al. 2023); for v the factor SNR / (SNR + 1) between the two errors is added."""
    return snr.rsqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)
