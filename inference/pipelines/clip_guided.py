"""Stable Diffusion that a CLIP model pulls towards a text at every step, beside classifier-free guidance.

The formulas are in `clip_guidance.py`. The gradient goes through CLIP, the VAE's decoder and the UNet, which has to run
only once for a step; memory is that of training at this size.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Generator, Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ...configs.errors import UserError
from ..clip_guidance import predicted_original, similarity, steered, text_features

OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


class ClipGuidedPipeline(StableDiffusionPipeline):
    """Stable Diffusion 1.x or 2.x with a CLIP model, which takes everything else from an official pipeline:

        ClipGuidedPipeline(**pipeline.components, clip=clip, clip_tokenizer=clip_tokenizer)
        ClipGuidedPipeline.from_pipe(pipeline, clip=clip, clip_tokenizer=clip_tokenizer)

    The components are shared, not copied, with the adapters in them. `from_pipe` casts them to float32 unless it is
    given a `dtype`.
    """

    unet: Any
    vae: Any
    clip: Any
    clip_tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        clip: CLIPModel,
        clip_tokenizer: CLIPTokenizer,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
    ):
        """UserError for a UNet that wants more than words, as SDXL's and those of latent consistency models."""
        shared: dict[str, Any] = {"safety_checker": safety_checker, "feature_extractor": feature_extractor}
        shared |= {"image_encoder": image_encoder, "requires_safety_checker": requires_safety_checker}
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, **shared)
        if self.unet.config.addition_embed_type or self.unet.config.time_cond_proj_dim:
            raise UserError("ClipGuidedPipeline is for Stable Diffusion 1.x and 2.x: this UNet has further conditions")
        self.register_modules(clip=clip, clip_tokenizer=clip_tokenizer)

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  fewer arguments than its parent's, and two more
        self,
        prompt: str | list[str] | None = None,
        *,
        clip_prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        clip_guidance_scale: float = 100.0,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Arguments and output are those of `StableDiffusionPipeline`, except for two.

        `clip_prompt` is the text that CLIP pulls towards, `prompt` where there is none. `clip_guidance_scale` is `s` of
        the formula, any real number: 0 is the plain pipeline to the bit. 100 is what diffusers' community pipeline of
        this kind has; here it was tried on tiny models only. A callback may change one that is not 0 during the call,
        as `_clip_guidance_scale`. UserError where there is no text for CLIP, or not one for each prompt.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height, width = self._size(height, width)
        shown, own = list(callback_on_step_end_tensor_inputs), (prompt_embeds, negative_prompt_embeds)
        self.check_inputs(prompt, height, width, None, negative_prompt, *own, None, None, shown)
        self._begin(guidance_scale, clip_guidance_scale)

        tensors, count = self._embeds(prompt, negative_prompt, num_images_per_prompt, *own)
        text = self._text_features(clip_prompt or prompt, count) if clip_guidance_scale else None
        dtype, device = tensors["prompt_embeds"].dtype, self._execution_device
        shape = (count, self.unet.config.in_channels, height, width)
        tensors["latents"] = self.prepare_latents(*shape, dtype, device, generator, latents)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self._denoise(tensors, text, generator, callback_on_step_end, shown)
        images, unsafe = self._decode(latents, dtype, generator, output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images, unsafe) if return_dict else (images, unsafe)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The UNet's own where one of them is not given, as in the plain pipeline."""
        size, factor = self.unet.config.sample_size, self.vae_scale_factor
        own = (size, size) if isinstance(size, int) else size
        return (height, width) if height and width else (own[0] * factor, own[1] * factor)

    def _begin(self, guidance_scale: float, clip_guidance_scale: float) -> None:
        """What callbacks may look at and change during the call; the rest is what a plain pipeline starts with."""
        self._guidance_scale, self._clip_guidance_scale = guidance_scale, clip_guidance_scale
        self._guidance_rescale, self._clip_skip, self._cross_attention_kwargs = 0.0, None, None
        self._interrupt = False

    def _embeds(
        self, prompt: Any, negative_prompt: Any, num_images_per_prompt: int, *own: Tensor | None
    ) -> tuple[dict[str, Tensor], int]:
        """The embeddings as the plain pipeline shows them to callbacks, and the number of images.

        `prompt_embeds` has those of the negative prompt in front when there is classifier-free guidance.
        """
        guided = self.do_classifier_free_guidance
        positive, negative = cast(Any, self.encode_prompt)(
            prompt, self._execution_device, num_images_per_prompt, guided, negative_prompt,
            prompt_embeds=own[0], negative_prompt_embeds=own[1],
        )  # fmt: skip
        both = torch.cat([negative, positive]) if guided else positive
        return {"prompt_embeds": both, "negative_prompt_embeds": negative}, len(positive)

    def _text_features(self, text: str | list[str] | None, count: int) -> Tensor:
        """(count, width): what CLIP makes of the texts, each repeated for the images of its prompt."""
        texts = [text] if isinstance(text, str) else text
        if not texts or count % len(texts):
            raise UserError(
                f"CLIP has {len(texts or [])} texts for {count} images; give clip_prompt, one or one for each prompt"
            )
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.clip_tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = text_features(self.clip, **tokens.to(self._execution_device))
        return features.repeat_interleave(count // len(texts), dim=0)

    def _denoise(
        self,
        tensors: dict[str, Tensor],
        text: Tensor | None,
        generator: Any,
        callback: OnStepEnd | None,
        shown: Sequence[str],
    ) -> Tensor:
        extra = self.prepare_extra_step_kwargs(generator, 0.0)
        self._num_timesteps = len(self.scheduler.timesteps)
        with cast(Any, self.progress_bar)(total=self._num_timesteps) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                sample = self.scheduler.scale_model_input(tensors["latents"], timestep)
                prediction = self._predict(sample, timestep, tensors["prompt_embeds"], text)
                latents = self.scheduler.step(prediction, timestep, tensors["latents"], **extra, return_dict=False)[0]
                tensors["latents"] = latents
                if callback is not None:
                    tensors |= callback(self, index, timestep, {name: tensors[name] for name in shown})
                progress.update()
        return tensors["latents"]

    def _predict(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, text: Tensor | None) -> Tensor:
        """What the scheduler takes for the UNet's prediction."""
        if text is None or not self._clip_guidance_scale:
            return self._plain_prediction(sample, timestep, prompt_embeds)
        alpha, kind = self.scheduler.alphas_cumprod[timestep.long().cpu()].item(), self.scheduler.config.prediction_type
        with torch.enable_grad():
            sample = sample.detach().requires_grad_()
            prediction = self._plain_prediction(sample, timestep, prompt_embeds)
            original = predicted_original(sample, prediction, alpha, kind) / self.vae.config.scaling_factor
            images = self.vae.decode(original, return_dict=False)[0]
            # scaled before it goes back, so that half precision has more than zeros to carry
            wanted = self._clip_guidance_scale * similarity(self.clip, images, text).sum()
            (gradient,) = torch.autograd.grad(wanted, sample)
        return steered(prediction.detach(), gradient, alpha, kind)

    def _plain_prediction(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """With classifier-free guidance (Ho and Salimans 2022), where there is some."""
        if not self.do_classifier_free_guidance:
            return self.unet(sample, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        both = self.unet(torch.cat([sample] * 2), timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        negative, positive = both.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _decode(self, latents: Tensor, dtype: torch.dtype, generator: Any, output_type: str) -> tuple[Any, Any]:
        """The images, and which of them the safety checker has blacked out."""
        if output_type == "latent":
            return latents, None
        latents = latents / self.vae.config.scaling_factor
        images = self.vae.decode(latents, return_dict=False, generator=generator)[0]
        images, unsafe = self.run_safety_checker(images, self._execution_device, dtype)
        shown = [not found for found in unsafe] if unsafe else [True] * len(images)
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=shown), unsafe
