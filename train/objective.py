"""The loss of one micro-batch: the path of a sample, as a table of contents."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.adapter import AdapterSet
from ..configs.schema import LossSection
from ..data.draws import Draws
from ..data.sample import Batch, Sample
from ..models.encode import draw_latents, encode_image, encoder_of
from ..models.family import ONE_WINDOW, Conditioning, ModelFamily, Parts, PromptOptions
from ..models.noise.process import Noised, NoiseProcess
from ..models.stacks import Stacks
from ..models.to_device import to_device
from .loss import Error, error_of, masked_mean


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of one micro-batch."""

    total: Tensor  # (), this micro-batch's share of the step's loss
    per_sample: Tensor  # (B,), detached, before any weight


@dataclass(frozen=True, slots=True)
class Inputs:
    """A micro-batch as the denoiser sees it."""

    noised: Noised
    conditioning: Conditioning
    masks: Tensor | None  # (B, 1, height, width)


@dataclass(frozen=True, slots=True)
class Objective:
    """Denoising: mean over the samples of a step of weight * loss_weight * error(prediction, target).

    The mean is over all samples of the step, class images included. The example script of diffusers takes
    mean(instance) + lambda * mean(prior) instead: at one class image for each instance image that is twice this,
    with the same gradients' direction.
    """

    family: ModelFamily
    noise: NoiseProcess
    adapters: AdapterSet
    loss: LossSection
    seed: int
    batch_size: int  # samples of the whole step
    prompts: PromptOptions = ONE_WINDOW
    trains_text: bool = False  # whether gradients go through the text encoders
    stacks: Stacks = field(default_factory=Stacks)  # of cached embeddings
    error: Error = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "error", error_of(self.loss))  # frozen

    def __call__(self, parts: Parts, batch: Batch, device: torch.device) -> Losses:
        """Losses of a micro-batch; its random numbers are keyed by the samples' positions."""
        return self.losses(parts, batch, self.inputs(parts, batch, device))

    def inputs(self, parts: Parts, batch: Batch, device: torch.device) -> Inputs:
        """Latents with their noise, and embeddings; encoded here where they are not cached."""
        noised, draws = self.noised(parts, batch, device)
        return Inputs(noised, self._conditioning(parts, batch, device), self._masks(batch, draws))

    def losses(self, parts: Parts, batch: Batch, inputs: Inputs) -> Losses:
        """The denoiser's prediction beside its target."""
        per_sample = self._errors(parts, batch, inputs)
        weighted = per_sample * inputs.noised.weight * to_device(batch.loss_weights, per_sample.device)
        return Losses(weighted.sum() / self.batch_size, per_sample.detach())

    def noised(self, parts: Parts, batch: Batch, device: torch.device) -> tuple[Noised, Draws]:
        """What the denoiser is given, and the random numbers of the samples."""
        draws = Draws(self.seed, batch.positions)
        return self.noise.sample(self.latents(parts, batch, draws, device), draws), draws

    def latents(self, parts: Parts, batch: Batch, draws: Draws, device: torch.device) -> Tensor:
        """(B, C, h, w), drawn from what the VAE makes of the images."""
        moments = batch.moments
        if moments is None:
            assert batch.pixels is not None
            moments = torch.stack([encode_image(self.family, parts, pixels) for pixels in batch.pixels])
        moments = to_device(moments, device)
        if moments.shape[1] == 1:  # drawn once, for all times
            return moments[:, 0]
        return draw_latents(moments, draws.normal("vae", moments.shape[2:]))

    def _errors(self, parts: Parts, batch: Batch, inputs: Inputs) -> Tensor:
        """(B,), before any weight."""
        noised, masks = inputs.noised, inputs.masks
        sizes = to_device(size_conditions(batch.samples), noised.latents.device)
        target = noised.target
        if any(batch.keeps_base):
            target = self._kept(parts, batch, inputs, sizes)
        predicted = self.family.predict(parts, noised, inputs.conditioning, sizes)
        errors = self.error(predicted.float(), target.float(), noised.snr)
        if masks is None:
            return errors.mean((1, 2, 3))
        return masked_mean(errors, to_device(masks, errors.device), self.loss.unmasked_weight)

    @torch.no_grad()
    def _kept(self, parts: Parts, batch: Batch, inputs: Inputs, sizes: Tensor) -> Tensor:
        """Targets, of which those of sources with `target: base` are what the base says without the adapter."""
        noised, conditioning = inputs.noised, inputs.conditioning
        with self.adapters.disabled():
            if self.trains_text:
                conditioning = self._conditioning(parts, batch, noised.latents.device)
            base = self.family.predict(parts, noised, conditioning, sizes)
        keeps = torch.tensor(batch.keeps_base, device=base.device)[:, None, None, None]
        return torch.where(keeps, base.to(noised.target), noised.target)

    def _conditioning(self, parts: Parts, batch: Batch, device: torch.device) -> Conditioning:
        if batch.prompts is not None:
            return self.stacks.of(batch.prompts, device)
        if self.trains_text:
            return self.family.encode_prompts(parts, batch.captions, self.prompts)
        return encoder_of(self.family, parts, self.prompts)(batch.captions)

    def _masks(self, batch: Batch, draws: Draws) -> Tensor | None:
        """(B, 1, height, width); all is looked at where a draw says so."""
        if batch.masks is None or self.loss.unmasked_probability == 0:
            return batch.masks
        without = draws.uniform("unmasked") < self.loss.unmasked_probability
        return torch.where(without[:, None, None, None], torch.ones_like(batch.masks), batch.masks)


def size_conditions(samples: Sequence[Sample]) -> Tensor:
    """(B, 6), as `ModelFamily.predict` takes them."""
    rows = []
    for place in (sample.geometry for sample in samples):
        rows.append([size for pair in (place.original, place.corner_as_seen, place.target) for size in reversed(pair)])
    return torch.tensor(rows)
