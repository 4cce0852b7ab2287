"""AdamW (Loshchilov & Hutter 2019) of torch."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import OptimizerSection
from ...configs.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

PACKAGE, EXTRA = None, None


class Options(Section):
    """Options of AdamW."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Memory of the mean gradient."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Memory of the squared gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


def make(groups: list[dict[str, Any]], section: OptimizerSection, options: Options) -> "Optimizer":
    """One kernel for all weights of a group, which also leaves a faulty step out without waiting for the device."""
    import torch

    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=options.eps, fused=True)
