"""Bases with the shapes of Stable Diffusion 1.5 or SDXL and random weights: real work for speed, and no download.

    python -m loraloom.benchmarks.random_base sd1 --dtype bf16 --out runs/bases/sd1-bf16

A weight of n inputs is drawn from a normal distribution of deviation 1 / sqrt(n), weights of norms are 1 and biases 0,
so that what a layer says is as large as what it is told, and nothing overflows. What the model paints is noise.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from tqdm import tqdm

from ..configs.command import run_command
from ..configs.dtypes import DTYPES, torch_dtype
from ..configs.errors import UserError
from ..configs.ownership import write_folder as replace_folder
from ..models.original_names import TEXT_ENCODERS, Shape
from ..models.part_tensors import expected_shapes, weights_name
from ..models.single_file import shipped_configs, write_config

FAMILIES = ("sd1", "sdxl")
EPILOG = """\
The folder is a pipeline of diffusers with everything in it: weights of the UNet, the VAE and the text encoders, CLIP's
real tokenizer, and the configs. It is written whole or not at all, with one tensor in memory at a time. Calling again
with the same arguments does nothing.

           in fp32    in bf16 or fp16
  sd1      4.3 GB     2.1 GB
  sdxl     13.9 GB    6.9 GB

examples:
  python -m loraloom.benchmarks.random_base sd1 --dtype fp32 --out runs/bases/sd1
  python -m loraloom.benchmarks.random_base sdxl --dtype bf16 --out runs/bases/sdxl-bf16
  loraloom train configs/sd1/lora-8gb.yaml model.base=runs/bases/sd1      to see what a step costs
"""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # of types, in files of safetensors


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """A safetensors file of random weights, all of which its header tells: names, shapes, type and seed."""

    shapes: Mapping[str, Shape]
    dtype: torch.dtype
    seed: int

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        """Its length in 8 bytes, then JSON (github.com/huggingface/safetensors, "Format"), filled with spaces to 8."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", "random_seed": str(self.seed)}}
        end = 0
        for name, shape in self.shapes.items():
            begin, end = end, end + math.prod(shape) * self.dtype.itemsize
            entries[name] = {"dtype": _NAMES[self.dtype], "shape": shape, "data_offsets": (begin, end)}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, file: Path, told: Callable[[int], object]) -> None:
        """Tensor by tensor, and tells the bytes of each."""
        with file.open("wb") as stream:
            stream.write(self.header)
            for name, shape in self.shapes.items():
                tensor = random_weight(name, shape, self.seed).to(self.dtype)
                told(stream.write(tensor.flatten().view(torch.uint8).numpy().data))

    def is_in(self, file: Path) -> bool:
        """Whether this is what the file holds, by its header and its length."""
        header = self.header
        if not file.is_file() or file.stat().st_size != len(header) + self.size:
            return False
        with file.open("rb") as stream:
            return stream.read(len(header)) == header


def random_weight(name: str, shape: Shape, seed: int) -> Tensor:
    """N(0, 1 / n) for n inputs of each output; 1 for a norm and 0 for a bias, the only ones with one dimension."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)


def write_base(
    family: str, folder: Path, dtype: str = "fp32", seed: int = 0, contents: Mapping[str, Any] | None = None
) -> None:
    """A pipeline folder of `family`, whole or not at all; nothing is done where it is already.

    `contents` are the configs of its files, by default those of the real model (`shipped_configs`). UserError for a
    folder with anything else in it.
    """
    contents = contents or shipped_configs(family)
    weights = random_weights(family, contents, torch_dtype(dtype), seed)
    if all(each.is_in(folder / name) for name, each in weights.items()):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else than this base; remove it, or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    total = sum(each.size for each in weights.values())
    with tqdm(total=total, desc=f"random {family}", unit="B", unit_scale=True, leave=False) as bar:
        writers = {name: partial(write_config, content) for name, content in contents.items()}
        replace_folder(folder, writers | {name: partial(each.write, told=bar.update) for name, each in weights.items()})


def random_weights(family: str, contents: Mapping[str, Any], dtype: torch.dtype, seed: int) -> dict[str, RandomWeights]:
    """Path in the folder -> what is in it."""
    parts = ("unet", "vae", *TEXT_ENCODERS[family])
    shapes = {part: expected_shapes(part, contents[f"{part}/config.json"]) for part in parts}
    return {f"{part}/{weights_name(part)}": RandomWeights(shapes[part], dtype, seed) for part in parts}


def main(arguments: Sequence[str]) -> int:
    """Writes a base of random weights and real size, on which to measure speed without downloading a model."""
    options = _parser().parse_args(list(arguments))
    write_base(options.family, Path(options.out), options.dtype, options.seed)
    print(f"{options.out}: {options.family} with random weights in {options.dtype}, seed {options.seed}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loraloom.benchmarks.random_base",
        description=main.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "family", choices=FAMILIES, help="Stable Diffusion 1.5 (UNet of 0.86 billion weights) or SDXL (2.57)"
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="the type of the weights (fp32)")
    parser.add_argument("--seed", type=int, default=0, help="other weights for another number (0)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
