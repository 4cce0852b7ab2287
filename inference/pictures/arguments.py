"""Arguments of `loraloom sample` and `loraloom grid` that say what a picture is like: one for each key of a request.

What is not given leaves to the file, or to the key's default, what it says.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ...configs.arguments import path_text, positive
from ...configs.dtypes import AUTO, DTYPES
from ...configs.errors import UserError
from ...configs.paths import expanded

ASKED_ELSEWHERE = ("prompt", "num_images")
"""Keys of a request that a command asks for with an argument of its own."""
DTYPE = "type of the weights (auto: bf16 on a GPU, fp16 on one that has no bf16, fp32 elsewhere and for pocket)"


def add_request(parser: argparse.ArgumentParser) -> None:
    """Everything but the prompts. An option that is called as a key of a request is that key."""
    add = parser.add_argument
    add(
        "--base",
        type=path_text,
        help="pocket, a diffusers pipeline folder, a .safetensors checkpoint, or a hub id (pocket)",
    )
    add("--revision", help="commit hash of a hub id")
    add(
        "--adapter",
        type=path_text,
        action="append",
        metavar="FILE[:WEIGHT]",
        help="file, folder or checkpoint; may be given again",
    )
    add(
        "--adapter-folder",
        type=path_text,
        action="append",
        metavar="FOLDER",
        default=[],
        help="where <lora:NAME:WEIGHT> in a prompt finds NAME.safetensors; may be given again",
    )
    add("--fuse", action="store_true", default=None, help="add the adapters to the base's weights: faster, other bits")
    add("--negative-prompt", help="what the pictures should not show")
    add("--seed", type=_seed, help="picture k of a prompt has the seed SEED + k (0)")
    add("--steps", type=positive, help="denoising steps (20)")
    add("--guidance", type=float, help="classifier-free guidance scale (4)")
    add("--guidance-until", type=float, metavar="FRACTION", help="without guidance, at half the cost, from there (1)")
    add("--resolution", type=_size, metavar="SIDE|WxH", help="pixels (the base's own)")
    add("--scheduler", help="sampler (dpmsolver++), or its name in web UIs; an unknown one answers with the list")
    add("--dtype", choices=(AUTO, *DTYPES), help=DTYPE)
    add("--attention", help="sdpa, auto, or a back-end of diffusers; an unknown name answers with the list (sdpa)")
    add("--compile", action="store_true", default=None, help="compile the denoiser's blocks: slow start, then faster")
    add("--token-windows", type=positive, help="of 75 tokens that a prompt may fill (1)")
    add(
        "--weighted",
        action="store_true",
        default=None,
        help="weights of words: 'a (red)1.4 star', 'red++', '(red:1.4)'",
    )
    add("--clip-skip", type=int, help="layers left out at the text encoder's end, as model.clip_skip (0)")
    add("--image", type=path_text, help="picture to begin with (image-to-image)")
    add("--mask", type=path_text, help="where that picture may change, white (inpainting)")
    add("--strength", type=float, help="how much of the denoising that picture goes through (0.8)")
    add("--control", action="append", metavar="MODEL=IMAGE[:SCALE]", help="ControlNet and its picture; again for more")
    add("--micro-batch", type=positive, help="pictures of one forward pass; other numbers give other bits")
    add("--overwrite", "--force", action="store_true", help="replace pictures of other requests that are in the folder")
    add("--device", help="cpu, cuda, mps or xpu (auto: the best one there is)")
    add("--threads", type=positive, help="CPU threads; other numbers give other bits (all cores)")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of a request that were given. UserError for an adapter or a ControlNet that cannot be read."""
    from .request import AdapterChoice, PictureRequest  # bring torch, which --help can do without

    said = {name: getattr(options, name, None) for name in PictureRequest.model_fields if name not in ASKED_ELSEWHERE}
    found = {name: value for name, value in said.items() if value is not None}
    if options.adapter is not None:
        found["adapters"] = [AdapterChoice.parse(text).model_dump(exclude_defaults=True) for text in options.adapter]
    if options.control is not None:
        found["controls"] = [_control(text) for text in options.control]
    if options.resolution is not None:
        found["width"], found["height"] = options.resolution
    return found


def writable(name: str) -> Path:
    """A folder that is there and can be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: cannot be written")
    return folder


def use_threads(threads: int | None) -> None:
    """For torch; those of the first request that names some."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def _control(text: str) -> dict[str, Any]:
    model, equals, rest = text.partition("=")
    if not equals or not model or not rest:
        raise UserError(f"--control {text}: should be MODEL=IMAGE or MODEL=IMAGE:SCALE")
    model, rest = expanded(model), expanded(rest)
    image, colon, scale = rest.rpartition(":")
    try:
        return {"model": model, "image": image, "scale": float(scale)} if colon else {"model": model, "image": rest}
    except ValueError:
        if os.path.exists(image) and not os.path.lexists(rest):
            raise UserError(f"--control {text}: scale {scale!r} is no number") from None
        return {"model": model, "image": rest}


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2^62")
    return value


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    try:
        return positive(width), positive(height if cross else width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} should be SIDE or WIDTHxHEIGHT in pixels") from error
