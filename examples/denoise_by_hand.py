"""A lesson: one image of Stable Diffusion made step by step from its parts, without a pipeline.

    python -m loraloom.examples.denoise_by_hand --prompt "a red star on a blue background" --steps 20 --every 5

writes what the model has in mind after every 5 steps, and the final image, which is the pipeline's to the bit
(tests/examples/test_denoise_by_hand.py). For bases with one text encoder: `pocket`, Stable Diffusion 1 and 2.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..configs.arguments import positive
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.schema import ModelSection
from ..models.family import Parts
from ..models.load import Base


class Moment(NamedTuple):
    """The state after a step."""

    step: int  # from 1
    latents: Tensor  # (1, 4, h, w), with the noise that is left
    clean: Tensor  # (1, 4, h, w), what the scheduler takes for the image without noise


def embed(parts: Parts, text: str) -> Tensor:
    """(1, 77, width): the words become tokens, padded to 77, and the text encoder turns each into a vector."""
    tokenizer = parts["tokenizer"]
    tokens = tokenizer(
        text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return parts["text_encoder"](tokens.input_ids)[0]


def denoise(
    parts: Parts, prompt: str, negative_prompt: str, steps: int, guidance: float, seed: int
) -> Iterator[Moment]:
    """From pure noise to the latents of an image, a step at a time."""
    unet = parts["unet"]
    # The noise schedule is the one that the model was trained with; how to walk down it is our choice: DPM-Solver++
    # (Lu et al. 2022) needs 20 steps where plain ancestral sampling needs hundreds.
    scheduler: Any = DPMSolverMultistepScheduler.from_config(parts["scheduler"].config)
    scheduler.set_timesteps(steps)

    # What the image should be, and what it should not be, side by side: both go through the UNet as one batch.
    words = torch.cat([embed(parts, negative_prompt), embed(parts, prompt)])  # (2, 77, width)

    # The model works on latents: 4 channels, several times smaller than the image. The first ones are noise alone.
    size = unet.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, unet.config.in_channels, size, size, generator=generator) * scheduler.init_noise_sigma

    for step, timestep in enumerate(scheduler.timesteps, start=1):  # 999 is noise alone, 0 the image
        both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        without, with_words = unet(both, timestep, encoder_hidden_states=words).sample.chunk(2)
        # Classifier-free guidance (Ho and Salimans 2022): further in the direction in which the prompt changes the
        # prediction. 1 is the plain prediction; more follows the prompt more closely, at the price of variety.
        predicted = without + guidance * (with_words - without)
        clean = without_noise(scheduler, latents, predicted, timestep)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
        yield Moment(step, latents, clean)


def without_noise(scheduler: Any, latents: Tensor, predicted: Tensor, timestep: Tensor) -> Tensor:
    """What a prediction of eps or v makes of latents = signal * clean + noise * eps; v = signal * eps - noise * clean.

    Ho et al. 2020, equation 15; Salimans and Ho 2022, appendix D, for models that predict v.
    """
    signal = scheduler.alphas_cumprod[timestep].sqrt()
    noise = (1 - scheduler.alphas_cumprod[timestep]).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * latents - noise * predicted
    return (latents - noise * predicted) / signal


def decode(parts: Parts, latents: Tensor) -> Image.Image:
    """The VAE turns latents into pixels in [-1, 1], the image processor those into 8 bits."""
    vae = parts["vae"]
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    processor: Any = VaeImageProcessor(vae_scale_factor=factor)
    return processor.postprocess(pixels, output_type="pil")[0]


@torch.no_grad()
def main(arguments: Sequence[str]) -> int:
    """Denoises, looks in between, and saves what it saw."""
    options = _parser().parse_args(list(arguments))
    base = Base(ModelSection(base=options.base))
    if len(base.family.text_encoders) > 1:
        raise UserError(f"base {options.base}: has two text encoders; this lesson is about models with one")
    parts, folder = base.load(), Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    moments = denoise(parts, options.prompt, options.negative_prompt, options.steps, options.guidance, options.seed)
    for moment in tqdm(moments, total=options.steps, desc="denoising", unit="step"):
        if moment.step % options.every == 0:
            decode(parts, moment.clean).save(folder / f"step-{moment.step:03d}.png")
        if moment.step == options.steps:
            decode(parts, moment.latents).save(folder / "image.png")
    print(f"wrote {folder / 'image.png'} and {options.steps // options.every} looks at the image on its way")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loraloom.examples.denoise_by_hand")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--base", default="pocket", help="pocket, a pipeline folder, a checkpoint (pocket)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    parser.add_argument("--every", type=positive, default=5, help="steps between two looks (5)")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/by-hand", help="folder for the images (runs/by-hand)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
