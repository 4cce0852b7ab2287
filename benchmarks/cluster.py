"""Arithmetic for 8, 64 and 1,000 GPUs: what lies where, and what goes over the wire in a step. Nothing is measured.

    python -m loraloom.benchmarks.cluster          writes nothing, prints the tables of docs/scaling.md
    python -m loraloom.benchmarks.cluster --docs   and puts them there

A ring all-reduce of b bytes over N processes sends 2 (N - 1) / N b from each (Patarasuk & Yuan 2009); sharding with
FSDP gathers the weights for forward and backward and scatters the gradients: 3 (N - 1) / N b (Rajbhandari et al. 2020,
section 7).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..configs.choices import find
from ..configs.command import run_command
from ..configs.files import replace_file
from ..configs.marked import fill_marked
from ..configs.schema import RunConfig
from ..models.part_tensors import meta_model
from ..models.single_file import shipped_configs
from ..train.build import make_adapters

PAGE = Path("docs/scaling.md")
WORLDS = (8, 64, 1000)
RANK = 16
SIDES = {"sd1": 512, "sdxl": 1024}
FP32, BF16 = 4, 2  # bytes
ADAM = 8  # bytes of its two moments, for each trained weight
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of weights, and bytes of what is cached of a sample."""

    family: str
    denoiser: int
    adapter: int
    latents: int  # of an image: mean and standard deviation
    prompt: int  # of a caption


def sizes_of(kind: str) -> Sizes:
    """From the shapes of a family; the weights themselves are nowhere."""
    family = find("models.families", kind).FAMILY
    configs = {name.removesuffix("/config.json"): each for name, each in shipped_configs(kind).items()}
    unet = meta_model("unet", configs["unet"])
    denoiser = sum(each.numel() for each in unet.parameters())
    section = {"rank": RANK, "alpha": RANK, "parts": {"unet": "attention"}}
    config = RunConfig.model_validate(
        {
            "model": {"base": "x", "family": kind},
            "data": {"sources": [{"path": "x"}]},
            "adapter": section,
            "loop": {"steps": 1},
            "output": {"dir": "x"},
        }
    )
    with torch.device("meta"):
        adapters = make_adapters(config, family, {"unet": unet.requires_grad_(False)})
    adapter = sum(each.numel() for each in adapters.parameters()["unet"])
    side = SIDES[kind] // 8
    words = configs["unet"]["cross_attention_dim"] * family.token_window + (1280 if kind == "sdxl" else 0)
    return Sizes(kind, denoiser, adapter, latents=2 * 4 * side * side * FP32, prompt=words * BF16)


def reduced(world: int, size: float) -> float:
    """Bytes that each process sends in an all-reduce."""
    return 2 * (world - 1) / world * size


def sharded(world: int, size: float) -> float:
    """Bytes that each process sends in a step with FSDP."""
    return 3 * (world - 1) / world * size


def rows(sizes: Sizes) -> Iterator[str]:
    """One family's tables."""
    yield f"**{sizes.family}**, {SIDES[sizes.family]} px: {sizes.denoiser / 1e6:,.0f} M weights in the denoiser, "
    yield f"{sizes.adapter / 1e6:.1f} M in a LoRA of rank {RANK} on its attention\n"
    yield "| each GPU, in a step | " + " | ".join(f"{world:,} GPUs" for world in WORLDS) + " |"
    yield "|---" * (1 + len(WORLDS)) + "|"
    gradients = {"LoRA, DDP: sent": FP32 * sizes.adapter, "full, DDP: sent": FP32 * sizes.denoiser}
    for name, size in gradients.items():
        yield _line(name, [f"{reduced(world, size) / MIB:,.1f} MiB" for world in WORLDS])
    yield _line("full, FSDP: sent", [f"{sharded(world, FP32 * sizes.denoiser) / MIB:,.1f} MiB" for world in WORLDS])
    states = (FP32 + FP32 + ADAM) * sizes.denoiser
    held = BF16 * sizes.denoiser + (FP32 + FP32 + ADAM) * sizes.adapter
    yield _line("LoRA, DDP: held beside activations", [f"{held / GIB:.2f} GiB"] * len(WORLDS))
    yield _line("full, DDP: held", [f"{states / GIB:.2f} GiB"] * len(WORLDS))
    yield _line("full, FSDP: held", [f"{states / world / GIB:.2f} GiB" for world in WORLDS])
    yield ""
    entry = sizes.latents + sizes.prompt
    yield f"A cached sample is {sizes.latents / 1024:,.0f} KiB of latents and {sizes.prompt / 1024:,.0f} KiB of words: "
    yield f"{entry * 1_000_000 / GIB:,.0f} GiB for a million, {entry * 1000 / MIB:,.0f} MiB read in a step of 1,000. "
    yield f"A checkpoint is {(FP32 + ADAM) * sizes.adapter / MIB:,.0f} MiB, written by one process.\n"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m loraloom.benchmarks.cluster", description=__doc__)
    parser.add_argument("--docs", action="store_true", help=f"write them into {PAGE}")
    options = parser.parse_args(list(arguments))
    table = "\n".join(line for kind in SIDES for line in rows(sizes_of(kind))) + "\n"
    print(table)
    if options.docs:
        replace_file(PAGE, fill_marked(PAGE.read_text(), "cluster", table))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
