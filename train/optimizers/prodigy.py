"""Prodigy (Mishchenko & Defazio 2023): finds the step size by itself; `learning_rate: 1.0` is usual."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.errors import UserError
from ...configs.schema import OptimizerSection
from ...configs.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

PACKAGE, EXTRA = "prodigyopt", "prodigy"


class Options(Section):
    """Options of Prodigy."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Memory of the mean gradient."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Memory of the squared gradient."""
    d_coef: float = Field(default=1.0, gt=0)
    """Factor on the step size that it finds."""
    safeguard_warmup: bool = False
    """Keeps the warm-up of the schedule out of the estimate."""
    bias_correction: bool = False
    """As Adam has it; slower at first."""


def make(groups: list[dict[str, Any]], section: OptimizerSection, options: Options) -> "Optimizer":
    """Decoupled weight decay, as in AdamW."""
    from prodigyopt import Prodigy

    if len({group["lr"] for group in groups}) > 1:
        raise UserError("optimizer.name prodigy: finds one step size for all parts, so they have one learning rate")
    return Prodigy(
        groups,
        lr=section.learning_rate,
        betas=(options.beta1, options.beta2),
        d_coef=options.d_coef,
        decouple=True,
        safeguard_warmup=options.safeguard_warmup,
        use_bias_correction=options.bias_correction,
    )
