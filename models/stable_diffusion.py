"""What the Stable Diffusion families have in common: a UNet with cross-attention, CLIP, and a VAE of 4 channels."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs.errors import UserError
from ..configs.faults import is_out_of_memory
from ..configs.schema import NoiseSection
from .aligned import align
from .base import PipelineFiles
from .family import ONE_WINDOW, Conditioning, Parts, PromptOptions
from .latent_rgb import latent_rgb
from .noise.ddpm import DDPMNoise
from .noise.process import Noised
from .part_files import check_part
from .weights_file import read_tensors, weight_files


class Kind(NamedTuple):
    """What loads a part."""

    library: str
    name: str


UNET = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
"""Presets of target modules: endings of their names, as diffusers calls them."""
CLIP = {"attention": ("q_proj", "k_proj", "v_proj", "out_proj"), "ff": ("fc1", "fc2")}


class StableDiffusion:
    """Latent diffusion with classifier-free guidance (Rombach et al. 2022); a family says how its parts differ."""

    denoiser = "unet"
    image_encoders = ("vae",)
    size_multiple = 8
    token_window = 77
    layers_left_out = 0  # at the end of each text encoder
    final_norm = True  # whether its last layer norm follows
    pooled_from: Sequence[str] = ()  # text encoders whose pooled output is read too, which is that of all layers

    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer"}
    embedding_keys: Mapping[str, str] = {"text_encoder": "emb_params"}
    name: str
    pipelines: Mapping[str, str] = {
        "text_to_image": "StableDiffusionPipeline",
        "image_to_image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
        "controlnet": "StableDiffusionControlNetPipeline",
        "controlnet_image_to_image": "StableDiffusionControlNetImg2ImgPipeline",
        "controlnet_inpaint": "StableDiffusionControlNetInpaintPipeline",
    }
    text_encoders: Sequence[str] = ("text_encoder",)
    prompt_encoders: Sequence[str] = ("text_encoder", "tokenizer")
    targets: Mapping[str, Mapping[str, Sequence[str]]] = {"unet": UNET, "text_encoder": CLIP}
    kohya_original = False
    kohya_prefixes: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    kinds: Mapping[str, Kind] = {
        "unet": Kind("diffusers", "UNet2DConditionModel"),
        "vae": Kind("diffusers", "AutoencoderKL"),
        "text_encoder": Kind("transformers", "CLIPTextModel"),
        "tokenizer": Kind("transformers", "CLIPTokenizer"),
        "scheduler": Kind("diffusers", "DDPMScheduler"),
    }

    def problems(self, files: PipelineFiles) -> list[str]:
        unet, scheduler = files.config("unet"), files.config("scheduler")
        problems = []
        if (channels := unet.get("in_channels", 4)) != unet.get("out_channels", 4):
            problems.append(
                f"its UNet takes {channels} channels, which is an inpainting or other conditioned model; "
                f"the family {self.name} trains text-to-image models of 4 channels"
            )
        if (prediction := scheduler.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            problems.append(f"its scheduler predicts {prediction!r}: only epsilon and v_prediction can be trained")
        return problems

    def load(self, folder: Path, dtype: torch.dtype, only: Collection[str] | None = None) -> Parts:
        from transformers.utils import logging

        logging.disable_progress_bar()  # one bar for each part of the base is noise between ours
        parts: Parts = {}
        for name, kind in self.kinds.items():
            if only is None or name in only:  # a library is imported when a part needs it
                parts[name] = _load_part(folder, name, kind, dtype)
        _check_marks(folder, parts)
        return parts

    def noise(self, parts: Parts, section: NoiseSection) -> DDPMNoise:
        return DDPMNoise(parts["scheduler"], section)

    def encode_images(self, parts: Parts, pixels: Tensor) -> Tensor:
        vae = parts["vae"]
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float() * vae.config.scaling_factor

    def latent_shape(self, parts: Parts, width: int, height: int) -> tuple[int, int, int]:
        config = parts["vae"].config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, height // factor, width // factor

    def native_latents(self, parts: Parts) -> tuple[int, int, int]:
        config = parts["unet"].config
        return config.in_channels, config.sample_size, config.sample_size

    def latent_rgb(self, parts: Parts) -> Tensor:
        return latent_rgb(parts["vae"])

    def count_tokens(self, parts: Parts, captions: Sequence[str]) -> list[int]:
        from .clip import expanded

        encoded = parts["tokenizer"](expanded(parts["tokenizer"], captions), add_special_tokens=False, verbose=False)
        return [len(tokens) for tokens in encoded.input_ids]

    def encode_prompts(
        self, parts: Parts, captions: Sequence[str], options: PromptOptions = ONE_WINDOW
    ) -> Conditioning:
        from .clip import join_windows

        hidden, _ = self._encode(parts, "text_encoder", captions, options)
        return Conditioning(prompt_embeds=join_windows(hidden))

    def _encode(self, parts: Parts, part: str, captions: Sequence[str], options: PromptOptions) -> tuple[Tensor, Any]:
        """(B, windows, 77, width), and the whole output of this text encoder for the words without their weights."""
        from .clip import encode_tokens, window_tokens

        encoder, tokenizer, skip = parts[part], parts[self.tokenizers[part]], self.layers_left_out + options.clip_skip
        if not options.weighted:
            tokens = window_tokens(tokenizer, captions, options.windows)
            return encode_tokens(encoder, tokens, skip, norm=self.final_norm)
        from .weighted import plain_text, weighted_states

        def states(tokens: Tensor, mask: Tensor | None) -> Tensor:
            return encode_tokens(encoder, tokens[:, None], skip, norm=self.final_norm, attention_mask=mask)[0][:, 0]

        hidden = [weighted_states(caption, tokenizer, encoder, options.windows, states) for caption in captions]
        plain = window_tokens(tokenizer, [plain_text(caption) for caption in captions], options.windows)
        return torch.cat(hidden), encode_tokens(encoder, plain, skip, norm=self.final_norm)[1]

    def zeroes_empty_negative(self, parts: Parts) -> bool:
        return False

    def unread(self, parts: Parts, part: str, clip_skip: int = 0) -> list[str]:
        if part not in self.text_encoders or part in self.pooled_from:
            return []
        model = parts[part]
        prefix, layers = "text_model." if hasattr(model, "text_model") else "", model.config.num_hidden_layers
        skipped = range(max(0, layers - self.layers_left_out - clip_skip), layers)
        behind = [f"{prefix}encoder.layers.{number}" for number in skipped]
        return behind if self.final_norm else [*behind, f"{prefix}final_layer_norm"]

    def pipeline_prompts(self, positive: Conditioning, negative: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": positive.prompt_embeds, "negative_prompt_embeds": negative.prompt_embeds}

    def predict(self, parts: Parts, noised: Noised, conditioning: Conditioning, geometry: Tensor) -> Tensor:
        latents, embeds = as_inputs(parts["unet"], noised.latents, conditioning.prompt_embeds)
        return parts["unet"](latents, noised.timesteps, embeds).sample


def as_inputs(denoiser: Any, latents: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of the denoiser's weights, which is not that of the text encoders where one of them trains.

    Autocast casts by itself.
    """
    if embeds.device.type != "meta" and torch.is_autocast_enabled(embeds.device.type):
        return latents.to(embeds.dtype), embeds
    dtype = next(denoiser.parameters()).dtype
    return latents.to(dtype), embeds.to(dtype)


_LONGEST = 10**6  # tokens of a caption


def _check_marks(folder: Path, parts: Parts) -> None:
    """UserError where what a tokenizer puts around every caption has no vector in its text encoder."""
    for name in parts.keys() & {"tokenizer", "tokenizer_2"}:
        tokenizer, encoder = parts[name], parts.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        size = encoder.get_input_embeddings().num_embeddings
        for mark in ("bos_token", "eos_token", "pad_token"):
            number = getattr(tokenizer, f"{mark}_id")
            if number is None or not 0 <= number < size:
                raise UserError(f"base {folder}: its {name} has a {mark} that its text encoder does not know")


def _load_part(folder: Path, name: str, kind: Kind, dtype: torch.dtype) -> Any:
    check_part(folder / name)
    loader = getattr(import_module(kind.library), kind.name)
    if name == "unet" and (unet := _read_unet(loader, folder / name, dtype)) is not None:
        return unet.requires_grad_(False).eval()
    weights = {"diffusers": "torch_dtype", "transformers": "dtype"}[kind.library]
    is_model = not kind.name.endswith(("Tokenizer", "Scheduler"))
    options = {weights: dtype, "use_safetensors": True, "output_loading_info": True} if is_model else {}
    try:
        with _quietly(kind):  # its table of what is missing or of another shape
            part = loader.from_pretrained(folder, subfolder=name, **options)
    except Exception as error:  # whatever libraries raise for files that are not as they wrote them
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"base {folder}: its {name} cannot be loaded ({reason})") from error
    if is_model:
        part, about = part
        if missing := [key for key in about["missing_keys"] if "position_ids" not in key]:  # it draws numbers for them
            raise UserError(f"base {folder}: the weights of its {name} lack {len(missing)} tensors, as {min(missing)}")
    if not isinstance(part, torch.nn.Module):
        if getattr(part, "model_max_length", 0) > _LONGEST:  # what transformers says where the file does not
            raise UserError(f"base {folder}: its {name} says no length: model_max_length is missing")
        return part
    align(part)
    return part.requires_grad_(False).eval()


def _quietly(kind: Kind) -> AbstractContextManager[None]:
    if kind.library != "transformers":
        return nullcontext()
    from .quiet import quietly

    return quietly()


def _read_unet(kind: Any, folder: Path, dtype: torch.dtype) -> torch.nn.Module | None:
    """A UNet on the mapped weights of its files; None where the folder is for diffusers to make sense of."""
    try:
        with torch.device("meta"):
            unet = kind.from_config(kind.load_config(folder))
        files = weight_files(folder, "diffusion_pytorch_model")
        state = {name: tensor for file in files for name, tensor in read_tensors(file, dtype).items()}
        unet.load_state_dict(state, assign=True)
    except UserError:  # of a file that is damaged
        raise
    except Exception as error:  # names of older versions, among others: the library says what is wrong
        if is_out_of_memory(error):
            raise
        return None
    return None if any(buffer.is_meta for buffer in unet.buffers()) else unet
