"""loraloom adapter resize: an adapter of another rank, as near as that rank can come."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ...adapters.format import read
from ...configs.arguments import path_text
from ..adapter_output import add_output, add_rank, lost, rank_of, save, shown
from ..layers import Layers, names_for

EXAMPLES = [
    "loraloom adapter resize my-dog.safetensors --rank 8 --out my-dog-8.safetensors",
    "loraloom adapter resize my-dog.safetensors --norm 0.95 --out small.safetensors",
    "loraloom adapter resize loha.safetensors --energy 0.99 --base pocket --to diffusers --out lora.safetensors",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path_text, metavar="FILE", help="adapter file, or folder of PEFT's")
    add_rank(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    layers = Layers(options.base) if options.base else None
    names = names_for(file, layers)
    found = algebra.resized(read(file, names), rank_of(options), layers and layers.weight, shown("resizing"))
    ranks = sorted(weights.rank for weights in found.artifact.modules.values())
    print(f"ranks {ranks[0]} to {ranks[-1]}, half of them up to {ranks[len(ranks) // 2]}")
    print(lost(found))
    save(found.artifact, names, options, file, layers)
    return 0
