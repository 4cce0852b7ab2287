"""Pseudo-Huber divided by its delta: an error's size itself for outliers."""

from typing import TYPE_CHECKING

from .huber import Options, deltas, root

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Options", "error"]


def error(predicted: "Tensor", target: "Tensor", snr: "Tensor", options: Options) -> "Tensor":
    """2 (sqrt(e^2 + d^2) - d)"""
    return root(predicted, target, deltas(snr, options))
