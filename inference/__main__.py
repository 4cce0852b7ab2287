"""python -m loraloom.inference: images from a base and adapters, as files and as one grid."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..configs.arguments import positive
from ..configs.errors import UserError, run_command


def main(arguments: Sequence[str]) -> int:
    """Samples, writes the files, and says where they are."""
    options = _parser().parse_args(list(arguments))
    folder = Path(options.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: cannot be written")

    import torch

    from ..models.family import PromptOptions
    from .adapter_file import AdapterFile
    from .engine import Engine, Request
    from .mixing import attach
    from .pictures import image_grid, png_info

    if options.threads:
        torch.set_num_threads(options.threads)
    engine = Engine.load(
        options.base,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        scheduler=options.scheduler,
    )
    attach(engine, [AdapterFile.parse(text) for text in options.adapter])
    request = Request.repeat(
        options.prompt,
        options.num_images,
        options.seed,
        steps=options.steps,
        guidance=options.guidance,
        negative_prompt=options.negative_prompt,
        resolution=options.resolution,
        prompt_options=PromptOptions(options.token_windows, options.clip_skip),
    )
    images = engine.generate(request, progress="sampling")
    for index, (image, prompt, seed) in enumerate(zip(images, request.prompts, request.seeds, strict=True)):
        info = png_info(
            prompt=prompt,
            seed=seed,
            steps=options.steps,
            guidance=options.guidance,
            scheduler=options.scheduler,
            base=options.base,
            adapters=" ".join(options.adapter),
        )
        image.save(folder / f"{index:04d}.png", pnginfo=info)
    image_grid(images, options.num_images).save(folder / "grid.png")
    print(f"wrote {len(images)} images and {folder / 'grid.png'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraloom sample",
        description="Sample images from a base model with adapters.",
        epilog='example: loraloom sample --adapter runs/demo/sks.safetensors:0.8 --prompt "a sks creature"',
    )
    parser.add_argument("--base", default="pocket", help="pocket, a diffusers pipeline folder, or a hub id (pocket)")
    parser.add_argument("--revision", help="commit hash of a hub id")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be given again")
    parser.add_argument("--prompt", action="append", required=True, help="may be given again: one row of the grid each")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--num-images", type=positive, default=4, help="of each prompt (4)")
    parser.add_argument("--seed", type=_seed, default=0, help="image k of a prompt has the seed SEED + k (0)")
    parser.add_argument("--steps", type=positive, default=20, help="denoising steps (20)")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale (4)")
    parser.add_argument("--resolution", type=positive, help="pixels each way (the base's own)")
    parser.add_argument("--scheduler", default="dpmsolver++", help="sampler (dpmsolver++)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights (fp32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (cpu)")
    parser.add_argument(
        "--token-windows",
        type=positive,
        default=1,
        help="of 75 tokens, as data.token_windows in training (1)",
    )
    parser.add_argument(
        "--clip-skip", type=int, default=0, help="layers left out at the text encoder's end, as model.clip_skip (0)"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads; other numbers give other bits (all cores)")
    parser.add_argument("--out", default="runs/samples", help="folder for the images (runs/samples)")
    return parser


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2^62")
    return value


if __name__ == "__main__":
    sys.exit(run_command(main))
