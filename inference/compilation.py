"""`torch.compile` for a denoiser in one piece, or for its repeated blocks: equal ones share what is compiled."""

from collections.abc import Collection
from typing import Any

import torch

from ..configs.errors import UserError

RECOMPILE_LIMIT = 64
"""Compilations of one `forward` before torch gives up, without an error. Its own limit is 8, and Stable Diffusion's
UNet has 15 kinds of residual blocks: the last of them would silently stay as they are."""
ALL_RECOMPILE_LIMIT = 16 * RECOMPILE_LIMIT
"""The same over all modules that share a `forward`, each with guards of its own."""


def compile_blocks(denoiser: torch.nn.Module, blocks: Collection[str], **options: Any) -> int:
    """Compiles, when they first run, all blocks of the classes named, in place; returns how many there are.

    `blocks` are a family's `repeated_blocks`, `options` those of `torch.compile`. This is diffusers'
    `compile_repeated_blocks` for more than the one class that it knows of UNets. Adapters come first: a block that
    gets one afterwards is compiled again. UserError where there is no such block.
    """
    found = [module for module in denoiser.modules() if type(module).__name__ in blocks]
    if not found:
        raise UserError(f"{type(denoiser).__name__} has no blocks of the classes to compile: {', '.join(blocks)}")
    _lift_limits()
    for block in found:
        block.compile(**options)
    return len(found)


def compile_whole(denoiser: torch.nn.Module, **options: Any) -> None:
    """Compiles a denoiser in one piece when it first runs, in place; `options` are those of `torch.compile`."""
    _lift_limits()
    denoiser.compile(**options)


def _lift_limits() -> None:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, ALL_RECOMPILE_LIMIT)
