"""The golden files: one small adapter in every format and method, written once and kept.

    python tests/adapters/golden/make.py

Run by hand, and only where a format changes on purpose: files that were given to users do not change. Numbers are
sixteenths from Python's own generator, so that no rounding and no library has a part in them.
"""

import json
import random
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from loraloom.adapters import format
from loraloom.adapters.artifact import AdapterArtifact, Key, Weights
from loraloom.adapters.format import FormatNames

HERE = Path(__file__).parent
SEED, RANK, SCALE = 7, 2, 0.5

HELD = {
    "diffusers": ("lora", "dora"),
    "kohya": ("lora", "dora", "loha", "lokr"),
    "loraloom": ("lora", "dora", "loha", "lokr"),
    "peft": ("lora", "dora", "loha", "lokr"),
}
SHAPES: dict[Key, tuple[int, ...]] = {
    ("unet", "block.0.to_q"): (6, 4),
    ("unet", "block.0.conv"): (6, 4, 3, 3),
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): (8, 4),
}
NAMES = FormatNames(
    module_paths={
        part: {path: shape for (own, path), shape in SHAPES.items() if own == part} for part in ("unet", "text_encoder")
    },
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
    architecture="stable-diffusion-v1",
    kohya_version="sd_v1",
    flat=["text_encoder"],
)
VERSIONS = ("torch", "safetensors", "peft", "diffusers", "transformers")


def artifact(kind: str) -> AdapterArtifact:
    """DoRA is of the UNet alone: diffusers' format holds no other."""
    numbers = random.Random(SEED)

    def draw(*sizes: int) -> Tensor:
        several = [(numbers.randrange(31) - 15) / 16 for _ in range(torch.Size(sizes).numel())]
        return torch.tensor(several).reshape(sizes)

    def weights(out: int, into: int, *kernel: int) -> Weights:
        columns = into * torch.Size(kernel).numel()
        if kind == "loha":
            sides = {"a": (out, RANK), "b": (RANK, columns)}
            tensors = {f"hada_w{number}_{side}": draw(*size) for number in "12" for side, size in sides.items()}
            return Weights("loha", tensors, SCALE)
        if kind == "lokr":
            return Weights("lokr", {"lokr_w1": draw(2, 2), "lokr_w2": draw(out // 2, into // 2, *kernel)}, SCALE)
        tensors = {"down": draw(RANK, into, *kernel), "up": draw(out, RANK, *(1 for _ in kernel))}
        magnitude = {"magnitude": draw(out).abs() + 1} if kind == "dora" else {}
        return Weights("lora", tensors | magnitude, SCALE)

    chosen = {key: shape for key, shape in SHAPES.items() if kind != "dora" or key[0] == "unet"}
    modules = {key: weights(*shape) for key, shape in chosen.items()}
    return AdapterArtifact(modules, {"modelspec.title": f"golden {kind}", "ss_output_name": "gölden"})


def main() -> None:
    """Writes all of them."""
    for name, kinds in HELD.items():
        for kind in kinds:
            format.write(artifact(kind), HERE / format.file_name(kind, name), name, NAMES)
    versions = {package: version(package) for package in VERSIONS}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
