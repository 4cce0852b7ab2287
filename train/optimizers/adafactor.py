"""Adafactor (Shazeer & Stern 2018) of torch: the squared gradient by rows and columns only."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import OptimizerSection
from ...configs.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

PACKAGE, EXTRA = None, None


class Options(Section):
    """Options of Adafactor."""

    beta2_decay: float = Field(default=-0.8, lt=0)
    """Exponent of the memory of squared gradients over the steps."""
    clip: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update."""


def make(groups: list[dict[str, Any]], section: OptimizerSection, options: Options) -> "Optimizer":
    """The rate is that of the config, not one of its own."""
    import torch

    return torch.optim.Adafactor(groups, lr=section.learning_rate, beta2_decay=options.beta2_decay, d=options.clip)
