"""Stable Diffusion 1.x and models of its shape: one CLIP text encoder, a UNet with cross-attention, a 4-channel VAE."""

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
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
    image_encoders = ("vae",)
    prompt_encoders = ("text_encoder", "tokenizer")
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

    def load(self, folder: Path, dtype: torch.dtype, only: Collection[str] | None = None) -> Parts:
        from transformers.utils import logging

        logging.disable_progress_bar()  # one bar for each part of the base is noise between ours
        loaders: dict[str, tuple[str, str, dict[str, Any]]] = {
            "unet": ("diffusers", "UNet2DConditionModel", {"torch_dtype": dtype, "use_safetensors": True}),
            "vae": ("diffusers", "AutoencoderKL", {"torch_dtype": dtype, "use_safetensors": True}),
            "text_encoder": ("transformers", "CLIPTextModel", {"dtype": dtype, "use_safetensors": True}),
            "tokenizer": ("transformers", "CLIPTokenizer", {}),
            "scheduler": ("diffusers", "DDPMScheduler", {}),
        }
        parts: Parts = {}
        try:
            for name, (library, kind, options) in loaders.items():
                if only is None or name in only:  # a library is imported when a part needs it
                    loader = getattr(import_module(library), kind)
                    parts[name] = loader.from_pretrained(folder, subfolder=name, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"base {folder}: cannot be loaded ({str(error).splitlines()[0]})") from error
        if "unet" in parts and parts["unet"].config.in_channels != parts["unet"].config.out_channels:
            raise UserError(
                f"base {folder}: its UNet takes {parts['unet'].config.in_channels} channels, which is an inpainting "
                "or other conditioned model; the family sd1 trains text-to-image models of 4 channels"
            )
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        return parts

    def noise(self, parts: Parts, section: NoiseSection) -> DDPMNoise:
        return DDPMNoise(parts["scheduler"], **section.model_dump())

    def encode_images(self, parts: Parts, pixels: Tensor) -> Tensor:
        vae = parts["vae"]
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float() * vae.config.scaling_factor

    def latent_shape(self, parts: Parts, width: int, height: int) -> tuple[int, int, int]:
        config = parts["vae"].config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, height // factor, width // factor

    def count_tokens(self, parts: Parts, captions: Sequence[str]) -> list[int]:
        encoded = parts["tokenizer"](list(captions), add_special_tokens=False, verbose=False)
        return [len(tokens) for tokens in encoded.input_ids]

    def encode_prompts(self, parts: Parts, captions: Sequence[str], windows: int = 1) -> Conditioning:
        encoder = parts["text_encoder"]
        tokens = window_tokens(parts["tokenizer"], captions, windows).to(next(encoder.parameters()).device)
        hidden = encoder(tokens.flatten(0, 1)).last_hidden_state.unflatten(0, tokens.shape[:2])
        return Conditioning(prompt_embeds=join_windows(hidden))

    def pipeline_prompts(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": positive.prompt_embeds, "negative_prompt_embeds": negative.prompt_embeds}

    def predict(self, parts: Parts, noised: Noised, conditioning: Conditioning) -> Tensor:
        embeds = conditioning.prompt_embeds
        return parts["unet"](noised.latents.to(embeds.dtype), noised.timesteps, embeds).sample


def window_tokens(tokenizer: Any, captions: Sequence[str], windows: int) -> Tensor:
    """(B, windows, 77): each window is begin, up to 75 tokens, end, padding; what fills more windows is cut."""
    room = tokenizer.model_max_length - 2
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for words in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
        pieces = [words[room * k : room * (k + 1)] for k in range(windows)]
        rows.append([[begin, *piece, end, *[pad] * (room - len(piece))] for piece in pieces])
    return torch.tensor(rows)


def join_windows(hidden: Tensor) -> Tensor:
    """(B, windows, 77, width) to (B, 75 * windows + 2, width): begin of the first, end of the last, as kohya does."""
    first, last = hidden[:, 0, :1], hidden[:, -1, -1:]
    return torch.cat([first, hidden[:, :, 1:-1].flatten(1, 2), last], dim=1)


FAMILY = SD1()
