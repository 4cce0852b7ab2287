"""The squared error, which diffusion models are trained with (Ho et al. 2020, equation 14)."""

from typing import TYPE_CHECKING

from ...configs.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class Options(Section):
    """It has none."""


def error(predicted: "Tensor", target: "Tensor", snr: "Tensor", options: Options) -> "Tensor":
    """e^2"""
    return (predicted - target).square()
