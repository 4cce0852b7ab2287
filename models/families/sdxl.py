"""Stable Diffusion XL: two text encoders, a pooled embedding, and the image's size and crop as conditions."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import PipelineFiles
from ..family import ONE_WINDOW, Conditioning, Parts, PromptOptions
from ..noise.process import Noised
from ..stable_diffusion import CLIP, UNET, Kind, StableDiffusion, as_inputs

ZEROS = "force_zeros_for_empty_prompt"
"""What diffusers' pipelines call the setting; true where an index does not say it."""


class SDXL(StableDiffusion):
    """Podell et al. 2023: CLIP ViT-L and OpenCLIP ViT-bigG, each without its last layer and without the norm."""

    name = "sdxl"
    pipelines = {
        "text_to_image": "StableDiffusionXLPipeline",
        "image_to_image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
        "controlnet": "StableDiffusionXLControlNetPipeline",
        "controlnet_image_to_image": "StableDiffusionXLControlNetImg2ImgPipeline",
        "controlnet_inpaint": "StableDiffusionXLControlNetInpaintPipeline",
    }
    text_encoders = ("text_encoder", "text_encoder_2")
    layers_left_out = 1
    final_norm = False
    pooled_from = ("text_encoder_2",)
    prompt_encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    targets = {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP}
    kohya_version = "sdxl_base_v1-0"
    kohya_original = True
    kohya_prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    kinds = {
        **StableDiffusion.kinds,
        "text_encoder_2": Kind("transformers", "CLIPTextModelWithProjection"),
        "tokenizer_2": Kind("transformers", "CLIPTokenizer"),
    }

    def detect(self, files: PipelineFiles) -> bool:
        return files.kind in (self.pipelines["text_to_image"], self.pipelines["image_to_image"])

    def problems(self, files: PipelineFiles) -> list[str]:
        found = super().problems(files)
        if not files.has("text_encoder") or files.index.get("requires_aesthetics_score"):
            found.append("it is the refiner of SDXL, which the family sdxl does not train; give the base model")
        return found

    def architecture(self, parts: Parts) -> str:
        return "stable-diffusion-xl-v1-base"

    def load(self, folder: Path, dtype: torch.dtype, only: Collection[str] | None = None) -> Parts:
        """With the setting of the base's index that says how a pipeline takes an empty negative prompt."""
        return super().load(folder, dtype, only) | {ZEROS: bool(PipelineFiles(folder).index.get(ZEROS, True))}

    def zeroes_empty_negative(self, parts: Parts) -> bool:
        return parts.get(ZEROS, True)

    def encode_prompts(
        self, parts: Parts, captions: Sequence[str], options: PromptOptions = ONE_WINDOW
    ) -> Conditioning:
        """Both encoders side by side; the pooled embedding is of the first window."""
        from ..clip import join_windows

        hidden, pooled = [], None
        for part in self.text_encoders:
            states, output = self._encode(parts, part, captions, options)
            hidden.append(join_windows(states))
            pooled = getattr(output, "text_embeds", pooled)
        assert pooled is not None
        return Conditioning(torch.cat(hidden, dim=-1), pooled.unflatten(0, (-1, options.windows))[:, 0])

    def pipeline_prompts(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {
            "prompt_embeds": positive.prompt_embeds,
            "pooled_prompt_embeds": positive.pooled_prompt_embeds,
            "negative_prompt_embeds": negative.prompt_embeds,
            "negative_pooled_prompt_embeds": negative.pooled_prompt_embeds,
        }

    def predict(self, parts: Parts, noised: Noised, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        unet, pooled = parts["unet"], conditioning.pooled_prompt_embeds
        latents, embeds = as_inputs(unet, noised.latents, conditioning.prompt_embeds)
        sizes = geometry.to(embeds.device, torch.float32)  # bf16 knows no 1333
        added = {"text_embeds": pooled, "time_ids": sizes}
        return unet(latents, noised.timesteps, embeds, added_cond_kwargs=added).sample


FAMILY = SDXL()
