"""The smallest pipeline there is: one call of a UNet on pure noise, and one step of a scheduler.

As diffusers' own example of a community pipeline (docs, "Community pipelines and components"), for UNets that look at
words too. How far one step comes is up to the scheduler: DDIM's goes straight to the predicted original.
"""

import inspect
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ...configs.errors import UserError

OUTPUT_TYPES = ("pt", "np", "pil")


class OneStepUNetPipeline(DiffusionPipeline):
    """Registers a UNet and a scheduler; calling it gives a batch of samples."""

    unet: Any
    scheduler: Any

    def __init__(self, unet: UNet2DModel | UNet2DConditionModel, scheduler: DDIMScheduler):
        """The scheduler is copied, with the spacing whose first timestep is the one where noise is all there is."""
        super().__init__()
        from_noise = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
        self.register_modules(unet=unet, scheduler=from_noise)  # they are saved, loaded and moved with the pipeline

    @torch.no_grad()
    def __call__(
        self,
        encoder_hidden_states: Tensor | None = None,
        *,
        batch_size: int = 1,
        generator: Generator | None = None,
        output_type: str = "pt",
    ) -> ImagePipelineOutput:
        """Samples of the UNet's own size and channels, the same ones for a generator of the same seed.

        `encoder_hidden_states` (B, tokens, width) are what a conditional UNet looks at; their number is the batch's.
        `images` is a tensor (B, C, H, W) as the scheduler gives it ("pt"), an array (B, H, W, C) in [0, 1] ("np"), or a
        list of PIL images ("pil", of 1 or 3 channels). UserError for what does not fit the UNet.
        """
        self._check(encoder_hidden_states, output_type)
        count = batch_size if encoder_hidden_states is None else len(encoder_hidden_states)
        sample = self._step(self._noise(count, generator), encoder_hidden_states, generator)
        return ImagePipelineOutput(images=cast(Any, _images(sample, output_type)))

    def _check(self, encoder_hidden_states: Tensor | None, output_type: str) -> None:
        conditional, channels = isinstance(self.unet, UNet2DConditionModel), self.unet.config.out_channels
        if conditional != (encoder_hidden_states is not None):
            wants = "needs" if conditional else "takes no"
            raise UserError(f"a {type(self.unet).__name__} {wants} encoder_hidden_states (B, tokens, width)")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type {output_type!r} is unknown; there are: {', '.join(OUTPUT_TYPES)}")
        if output_type == "pil" and channels not in (1, 3):
            raise UserError(f"a sample of {channels} channels is no picture; take output_type='pt'")

    def _noise(self, count: int, generator: Generator | None) -> Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, self.unet.config.in_channels, height, width)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)

    def _step(self, noise: Tensor, encoder_hidden_states: Tensor | None, generator: Generator | None) -> Tensor:
        self.scheduler.set_timesteps(1, device=self._execution_device)
        timestep, sample = self.scheduler.timesteps[0], noise * self.scheduler.init_noise_sigma
        words = () if encoder_hidden_states is None else (encoder_hidden_states,)
        prediction = self.unet(self.scheduler.scale_model_input(sample, timestep), timestep, *words).sample
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if draws else {}
        return self.scheduler.step(prediction, timestep, sample, **extra).prev_sample


def _images(sample: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return sample
    images = (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(images) if output_type == "pil" else images
