"""A flow-matching transformer of 60 lines, so that the contract of families does not become one of UNets."""

from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline
from torch import nn

from loraloom.models.family import ONE_WINDOW, Conditioning
from loraloom.models.noise.process import Noised


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return tokens + self.to_out(nn.functional.scaled_dot_product_attention(q, k, v))


class Transformer(nn.Module):
    """Each latent pixel is a token, and so is the caption."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.enter, self.time, self.leave = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(width, 4)
        self.transformer_blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.config = SimpleNamespace(in_channels=4, sample_size=4)

    device = property(lambda self: self.enter.weight.device)
    dtype = property(lambda self: self.enter.weight.dtype)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        tokens = self.enter(latents.flatten(2).transpose(1, 2)) + self.time(time[:, None, None])
        tokens = torch.cat([caption, tokens], 1)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        return self.leave(tokens[:, caption.shape[1] :]).transpose(1, 2).reshape(latents.shape)


class Flow:
    """x_t = (1 - t) x_0 + t eps, the target is eps - x_0   (Lipman et al. 2023)."""

    def sample(self, latents, draws) -> Noised:
        timesteps = draws.integers("timestep", 1, 1000)
        return self.noised(latents, draws.normal("noise", latents.shape[1:]), timesteps)

    def grid(self, count):
        return torch.linspace(1, 999, count).long()

    def noised(self, latents, noise, timesteps) -> Noised:
        t = timesteps[:, None, None, None] / 1000
        snr = ((1 - t) / t).square().flatten()
        return Noised((1 - t) * latents + t * noise, timesteps, noise - latents, torch.ones_like(snr), snr)


class Pipeline(DiffusionPipeline):
    """Euler steps along the flow, and a picture of the first three channels."""

    def __init__(self, transformer, text_encoder=None, vae=None, scheduler=None):
        super().__init__()
        self.parts = {"transformer": transformer}

    @torch.no_grad()
    def __call__(self, prompt_embeds, num_inference_steps, generator, **_):
        latents = torch.stack([torch.randn(4, 4, 4, generator=each) for each in generator])
        for k in range(num_inference_steps, 0, -1):
            time = torch.full((len(latents),), k / num_inference_steps)
            latents -= self.parts["transformer"](latents, time, prompt_embeds) / num_inference_steps
        pixels = (latents[:, :3].clamp(-1, 1) + 1).mul(127).byte().permute(0, 2, 3, 1).numpy()
        return SimpleNamespace(images=self.numpy_to_pil(pixels / 255))


class ToyFlow:
    """A caption is its first eight letters, a latent pixel what a convolution makes of 8 x 8."""

    name, pipelines, denoiser = "toy_flow", {"text_to_image": Pipeline}, "transformer"
    text_encoders, image_encoders, prompt_encoders = ("text_encoder",), ("vae",), ("text_encoder",)
    targets = {"transformer": {"attention": ("to_q", "to_k", "to_v", "to_out")}, "text_encoder": {}}
    tokenizers, embedding_keys = {}, {}
    size_multiple, token_window, repeated_blocks = 8, 77, ("Block",)
    kohya_version, kohya_original, kohya_prefixes = "toy", False, {"transformer": "lora_unet"}

    def problems(self, files) -> list[str]:
        return []

    def architecture(self, parts) -> str:
        return "toy"

    def load(self, folder, dtype, only=None):
        torch.manual_seed(0)
        parts = {
            "transformer": Transformer(),
            "text_encoder": nn.Embedding(128, 16),
            "vae": nn.Conv2d(3, 4, 8, stride=8),
        }
        return {name: part.to(dtype).requires_grad_(False).eval() for name, part in parts.items()}

    def noise(self, parts, section) -> Flow:
        return Flow()

    def encode_images(self, parts, pixels):
        latents = parts["vae"](pixels)
        return torch.stack([latents, torch.zeros_like(latents)], 1)

    def latent_shape(self, parts, width, height):
        return 4, height // 8, width // 8

    def native_latents(self, parts):
        return 4, 4, 4

    def latent_rgb(self, parts):
        return torch.eye(5)[:, :3]

    def count_tokens(self, parts, captions):
        return [len(caption) for caption in captions]

    def encode_prompts(self, parts, captions, options=ONE_WINDOW) -> Conditioning:
        letters = torch.tensor([[ord(letter) % 128 for letter in caption[:8].ljust(8)] for caption in captions])
        return Conditioning(parts["text_encoder"](letters))

    def zeroes_empty_negative(self, parts):
        return False

    def unread(self, parts, part, clip_skip=0):
        return []

    def pipeline_prompts(self, positive, negative):
        return {"prompt_embeds": positive.prompt_embeds}

    def predict(self, parts, noised, conditioning, geometry):
        return parts["transformer"](noised.latents, noised.timesteps / 1000, conditioning.prompt_embeds)


FAMILY = ToyFlow()
