"""loraloom adapter extract: what one checkpoint has learnt beside another, as a LoRA."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ...configs.arguments import path_text
from ...configs.errors import UserError
from ..adapter_output import add_output, add_rank, lost, rank_of, save, shown
from ..layers import Layers

EXAMPLES = [
    "loraloom adapter extract runs/full/dog stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 64 --out a.safetensors",
    "loraloom adapter extract tuned.safetensors base.safetensors --energy 0.99 --to kohya --out tuned-lora.safetensors",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tuned", type=path_text, metavar="TUNED", help="pipeline folder, .safetensors checkpoint or hub id"
    )
    parser.add_argument("original", type=path_text, metavar="ORIGINAL", help="the same of what it was trained from")
    parser.add_argument(
        "--min-change", type=float, default=0.0, help="leave layers whose numbers changed by no more (0)"
    )
    add_rank(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    tuned, original = Layers(options.tuned), Layers(options.original)
    sizes = [layers.names.module_paths for layers in (tuned, original)]
    if sizes[0] != sizes[1]:
        names = [f"{layers.title} ({layers.names.architecture})" for layers in (tuned, original)]
        raise UserError(f"{names[0]} has other layers than {names[1]}: one was not trained from the other")
    if options.out is None:
        raise UserError("--out is needed: the file of the adapter")
    options.to = options.to or "diffusers"
    found = algebra.extracted(
        tuned.weight, original.weight, original.keys, rank_of(options), shown("extracting"), options.min_change
    )
    print(lost(found))
    save(found.artifact, original.names, options, Path(options.out), original)
    return 0
