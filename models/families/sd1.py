"""Stable Diffusion 1.x and models of its shape: one CLIP text encoder, a UNet with cross-attention, a 4-channel VAE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configs.errors import UserError
from ...configs.schema import NoiseSection
from ..family import Conditioning, Parts
from ..noise.ddpm import DDPMNoise
from ..noise.process import Noised


class SD1:
    """Latent diffusion with classifier-free guidance (Rombach et al. 2022)."""

    name = "sd1"
    pipeline = "StableDiffusionPipeline"
    denoiser = "unet"
    text_encoders = ("text_encoder",)
    targets = {
        "unet": {"attention": ("to_q", "to_k", "to_v", "to_out.0")},
        "text_encoder": {"attention": ("q_proj", "k_proj", "v_proj", "out_proj")},
    }
    size_multiple = 8
    token_window = 77
    architecture = "stable-diffusion-v1"
    kohya_version = "sd_v1"
    kohya_prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}

    def detect(self, index: Mapping[str, Any]) -> bool:
        return index.get("_class_name") == self.pipeline

    def load(self, folder: Path, dtype: torch.dtype) -> Parts:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # one bar for each part of the base is noise between ours
        try:
            parts: Parts = {
                "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype),
                "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
                "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype),
                "tokenizer": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
                "scheduler": DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
            }
        except (OSError, ValueError) as error:
            raise UserError(f"base {folder}: cannot be loaded ({str(error).splitlines()[0]})") from error
        if parts["unet"].config.in_channels != parts["vae"].config.latent_channels:
            raise UserError(
                f"base {folder}: its UNet takes {parts['unet'].config.in_channels} channels, which is an inpainting "
                "or other conditioned model; the family sd1 trains text-to-image models of 4 channels"
            )
        for name in ("unet", "vae", "text_encoder"):
            parts[name].requires_grad_(False).eval()
        return parts

    def noise(self, parts: Parts, section: NoiseSection) -> DDPMNoise:
        return DDPMNoise(parts["scheduler"], **section.model_dump())

    def encode_images(self, parts: Parts, pixels: Tensor, noise: Tensor) -> Tensor:
        vae = parts["vae"]
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return (posterior.mean + posterior.std * noise.to(posterior.mean)) * vae.config.scaling_factor

    def latent_shape(self, parts: Parts, resolution: int) -> tuple[int, int, int]:
        config = parts["vae"].config
        side = resolution // 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, side, side

    def count_tokens(self, parts: Parts, caption: str) -> int:
        return len(parts["tokenizer"](caption).input_ids)

    def encode_prompts(self, parts: Parts, captions: Sequence[str]) -> Conditioning:
        encoder = parts["text_encoder"]
        tokens = parts["tokenizer"](
            list(captions), padding="max_length", max_length=self.token_window, truncation=True, return_tensors="pt"
        )
        device = next(encoder.parameters()).device
        return Conditioning(prompt_embeds=encoder(tokens.input_ids.to(device)).last_hidden_state)

    def predict(self, parts: Parts, noised: Noised, conditioning: Conditioning) -> Tensor:
        embeds = conditioning.prompt_embeds
        return parts["unet"](noised.latents.to(embeds.dtype), noised.timesteps, embeds).sample


FAMILY = SD1()
