"""A custom pipeline to start from: text to image, in as few lines as that takes, and nothing but diffusers.

Copy the folder, rename the class, change `__call__`. It may be all of Stable Diffusion 1.x and 2.x: every line that you
would want to change stands here. How to load, save and share it: docs/custom-pipelines.md.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer


class MyPipeline(DiffusionPipeline):  # one class in the file that is a DiffusionPipeline: loaders look for it
    """Words to images."""

    # The names are those of the base's components, which are handed over by name; the types are for diffusers' checks.
    # A component with a default of None goes into `_optional_components` too.
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
    ):
        super().__init__()
        ddim = DDIMScheduler.from_config(scheduler.config)  # whatever the base has: the steps of this one draw nothing
        # What is registered becomes an attribute, is saved and loaded, and moves with `pipeline.to("cuda")`.
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=ddim)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)  # pixels for each pixel of the latents
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 7.5,
        generator: torch.Generator | None = None,
        output_type: str = "pil",  # or "np", "pt", "latent"
    ) -> ImagePipelineOutput:
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds = self.encode([negative_prompt] * len(prompts) + prompts)

        # Noise, as large as the scheduler wants it. All that is random comes from the generator.
        size = self.unet.config.sample_size
        shape = (len(prompts), self.unet.config.in_channels, size, size)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=embeds.dtype)
        latents = latents * self.scheduler.init_noise_sigma

        for timestep in self.progress_bar(self.scheduler.timesteps):  # type: ignore
            # One pass for both prompts. Other schedulers want the UNet's input scaled.
            both = self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            without, with_words = self.unet(both, timestep, encoder_hidden_states=embeds).sample.chunk(2)
            prediction = without + guidance_scale * (with_words - without)  # classifier-free guidance
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample

        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images)  # type: ignore

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """(B, tokens, width): what the UNet looks at."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
