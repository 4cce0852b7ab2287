"""AdamW with its state in 8 bits (Dettmers et al. 2022), of bitsandbytes: a quarter of the memory."""

from typing import TYPE_CHECKING, Any

from ...configs.schema import OptimizerSection
from .adamw import Options

if TYPE_CHECKING:
    from torch.optim import Optimizer

PACKAGE, EXTRA = "bitsandbytes", "8bit"

__all__ = ["EXTRA", "PACKAGE", "Options", "make"]


def make(groups: list[dict[str, Any]], section: OptimizerSection, options: Options) -> "Optimizer":
    """Weights of fewer than 4,096 values keep their state in 32 bits."""
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(groups, lr=section.learning_rate, betas=(options.beta1, options.beta2), eps=options.eps)
