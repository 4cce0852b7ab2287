"""The loss of one micro-batch: the path of a sample, as a table of contents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.draws import Draws
from ..data.sample import Batch
from ..models.family import ModelFamily, Parts
from ..models.noise.process import NoiseProcess


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of one micro-batch."""

    total: Tensor  # (), this micro-batch's share of the step's loss
    per_sample: Tensor  # (B,), detached, before any weight


@dataclass(frozen=True, slots=True)
class Objective:
    """Denoising: mean over the samples of a step of weight * loss_weight * |prediction - target|^2.

    The mean is over all samples of the step, class images included. The example script of diffusers takes
    mean(instance) + lambda * mean(prior) instead: at one class image for each instance image that is twice this,
    with the same gradients' direction.
    """

    family: ModelFamily
    noise: NoiseProcess
    seed: int
    batch_size: int  # samples of the whole step

    def __call__(self, parts: Parts, batch: Batch, device: torch.device) -> Losses:
        """Losses of a micro-batch; its random numbers are keyed by the samples' positions."""
        draws = Draws(self.seed, batch.positions)
        latents = self._latents(parts, batch, draws, device)
        conditioning = self.family.encode_prompts(parts, batch.captions)
        noised = self.noise.sample(latents, draws)
        predicted = self.family.predict(parts, noised, conditioning)
        per_sample = F.mse_loss(predicted.float(), noised.target.float(), reduction="none").mean((1, 2, 3))
        weighted = per_sample * noised.weight * batch.loss_weights.to(device)
        return Losses(weighted.sum() / self.batch_size, per_sample.detach())

    @torch.no_grad()
    def _latents(self, parts: Parts, batch: Batch, draws: Draws, device: torch.device) -> Tensor:
        noise = draws.normal("vae", self.family.latent_shape(parts, batch.pixels.shape[-1]))
        return self.family.encode_images(parts, batch.pixels.to(device), noise).float()
