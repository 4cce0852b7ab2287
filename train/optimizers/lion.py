"""Lion (Chen et al. 2023): the sign of a mean gradient; a third to a tenth of AdamW's rate is usual."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import OptimizerSection
from ...configs.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

PACKAGE, EXTRA = "lion_pytorch", "lion"


class Options(Section):
    """Options of Lion."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the memory in a step."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Memory of the mean gradient."""


def make(groups: list[dict[str, Any]], section: OptimizerSection, options: Options) -> "Optimizer":
    """One state for each weight, where AdamW has two."""
    from lion_pytorch import Lion

    return Lion(groups, lr=section.learning_rate, betas=(options.beta1, options.beta2))
