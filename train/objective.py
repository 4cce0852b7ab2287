"""The loss of one micro-batch: the path of a sample, as a table of contents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.draws import Draws
from ..data.sample import Batch
from ..models.encode import draw_latents, encode_image, encoder_of, pool_masks
from ..models.family import Conditioning, ModelFamily, Parts
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
    windows: int = 1  # of the text encoder, for each caption
    trains_text: bool = False  # whether gradients go through the text encoders

    def __call__(self, parts: Parts, batch: Batch, device: torch.device) -> Losses:
        """Losses of a micro-batch; its random numbers are keyed by the samples' positions."""
        draws = Draws(self.seed, batch.positions)
        latents = self._latents(parts, batch, draws, device)
        conditioning = self._conditioning(parts, batch, device)
        noised = self.noise.sample(latents, draws)
        predicted = self.family.predict(parts, noised, conditioning)
        errors = F.mse_loss(predicted.float(), noised.target.float(), reduction="none")
        per_sample = errors.mean((1, 2, 3)) if batch.masks is None else masked_mean(errors, batch.masks.to(device))
        weighted = per_sample * noised.weight * batch.loss_weights.to(device)
        return Losses(weighted.sum() / self.batch_size, per_sample.detach())

    def _latents(self, parts: Parts, batch: Batch, draws: Draws, device: torch.device) -> Tensor:
        moments = batch.moments
        if moments is None:
            assert batch.pixels is not None
            moments = torch.stack([encode_image(self.family, parts, pixels) for pixels in batch.pixels])
        return draw_latents(moments.to(device), draws.normal("vae", moments.shape[2:]))

    def _conditioning(self, parts: Parts, batch: Batch, device: torch.device) -> Conditioning:
        if batch.prompts is not None:
            return Conditioning.stack(batch.prompts, device)
        if self.trains_text:
            return self.family.encode_prompts(parts, batch.captions, self.windows)
        return encoder_of(self.family, parts, self.windows)(batch.captions)


def masked_mean(errors: Tensor, masks: Tensor) -> Tensor:
    """(B,) means of (B, C, h, w) over where masks (B, 1, height, width) are 1: small subjects count as large ones."""
    weights = pool_masks(masks, errors)
    return (errors * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * errors.shape[1]).clamp(min=1e-6)
