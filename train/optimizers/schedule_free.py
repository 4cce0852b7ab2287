"""Schedule-free AdamW (Defazio et al. 2024): averages weights instead of lowering the rate."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import OptimizerSection
from ...configs.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

PACKAGE, EXTRA = "schedulefree", "schedule-free"


class Options(Section):
    """Options of schedule-free AdamW."""

    beta1: float = Field(default=0.9, gt=0, lt=1)
    """Weight of the average in the point where gradients are taken."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Memory of the squared gradient."""


def make(groups: list[dict[str, Any]], section: OptimizerSection, options: Options) -> "Optimizer":
    """Its `eval()` puts the averaged weights in place, its `train()` takes them back: `Run.exported` calls both."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, lr=section.learning_rate, betas=(options.beta1, options.beta2))
    optimizer.train()
    return optimizer
