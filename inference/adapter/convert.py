"""loraloom adapter convert: the same adapter in another format or type, read again and compared."""

import argparse
from pathlib import Path

from ...adapters import algebra
from ...adapters.algebra import fixed
from ...adapters.artifact import AdapterArtifact
from ...configs.arguments import path_text, positive
from ...configs.errors import UserError
from ..adapter_input import opened
from ..adapter_output import add_output, lost, out_of, save, shown
from ..layers import Layers

EXAMPLES = [
    "loraloom adapter convert my-dog.safetensors --to kohya",
    "loraloom adapter convert web-ui.safetensors --to peft --out my-dog.peft",
    "loraloom adapter convert runs/my-dog/checkpoints/step-000080 --to kohya",
    "loraloom adapter convert dora.safetensors --to diffusers --bake-dora --rank 32 --base sd15/",
    "loraloom adapter convert my-dog.safetensors --to diffusers --without ^text_encoder --out unet.safetensors",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=path_text, metavar="FILE", help="adapter file, folder of PEFT's, or checkpoint of a run"
    )
    parser.add_argument("--bake-dora", action="store_true", help="make plain LoRAs of DoRAs; tells what is lost")
    parser.add_argument("--rank", type=positive, default=32, help="of baked modules (32)")
    parser.add_argument("--scale", type=float, help="multiply the change with this")
    parser.add_argument(
        "--without", metavar="REGEX", help="leave out modules, such as ^text_encoder or up_blocks, or words: ^words"
    )
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    file = Path(options.file)
    out_of(options, file)
    layers = Layers(options.base) if options.base else None
    artifact, names = opened(file, layers, as_stored=True)
    if options.without:
        artifact = algebra.without(artifact, options.without)
    if options.bake_dora:
        artifact = _baked(artifact, options, layers)
    if options.scale is not None:
        artifact = algebra.scaled(artifact, options.scale)
    save(artifact, names, options, file, layers)
    return 0


def _baked(artifact: AdapterArtifact, options: argparse.Namespace, layers: Layers | None) -> AdapterArtifact:
    if layers is None:
        raise UserError("--bake-dora needs the base, whose weights decide what DoRA changes: give --base")
    found = algebra.baked(artifact, layers.weight, fixed(options.rank), shown("baking"))
    if found.lost:
        print(lost(found))
    return found.artifact
