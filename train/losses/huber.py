"""Pseudo-Huber: the square of small errors, which grows more slowly for outliers (Charbonnier et al. 1994)."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...configs.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class Options(Section):
    """Where a large error begins."""

    delta: float = Field(default=0.1, gt=0)
    """Error d from which on the loss grows more slowly."""
    delta_schedule: Literal["constant", "snr"] = "constant"
    """The same d at each noise level, or from 1 for clean images to `delta` for noise."""


def error(predicted: "Tensor", target: "Tensor", snr: "Tensor", options: Options) -> "Tensor":
    """2 d (sqrt(e^2 + d^2) - d)"""
    delta = deltas(snr, options)
    return root(predicted, target, delta) * delta


def root(predicted: "Tensor", target: "Tensor", delta: "Tensor") -> "Tensor":
    """2 (sqrt(e^2 + d^2) - d)"""
    return 2 * (((predicted - target).square() + delta.square()).sqrt() - delta)


def deltas(snr: "Tensor", options: Options) -> "Tensor":
    """(B, 1, 1, 1): d, or (1 - d) / (1 + sigma)^2 + d with sigma = 1 / sqrt(SNR), as sd-scripts has it."""
    delta = snr.new_full(snr.shape, options.delta)
    if options.delta_schedule == "snr":
        delta = (1 - options.delta) / (1 + snr.rsqrt()).square() + options.delta
    return delta[:, None, None, None]
