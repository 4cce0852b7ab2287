"""How far a prediction is from its target: the contract of the files in `losses/`, and the mean under a mask."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from ..configs.choices import find
from ..configs.schema import LossSection
from ..configs.section import Section
from ..models.encode import pool_masks

if TYPE_CHECKING:
    from torch import Tensor

Error = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(prediction, target, SNR) to the error of each value: (B, C, h, w) twice and (B,) to (B, C, h, w), all float32."""


class Loss(Protocol):
    """What a file in `losses/`, or of a package that offers one, has. It imports no torch at its top."""

    Options: type[Section]

    def error(self, predicted: "Tensor", target: "Tensor", snr: "Tensor", options: Section) -> "Tensor":
        """(B, C, h, w): the error of each value, at least 0; `snr` (B,) is the noise level's signal-to-noise ratio."""
        ...


def error_of(section: LossSection) -> Error:
    """The error that `loss.kind` names, with its options."""
    loss = cast(Loss, find("train.losses", section.kind))
    options = loss.Options.model_validate(section.options)
    return lambda predicted, target, snr: loss.error(predicted, target, snr, options)


def masked_mean(errors: "Tensor", masks: "Tensor", unmasked_weight: float = 0.0) -> "Tensor":
    """(B,) means of (B, C, h, w) over where masks (B, 1, height, width) are 1: small subjects count as large ones.

    The rest takes part with `unmasked_weight`; both are divided by the sum of all weights.
    """
    weights = pool_masks(masks, errors)
    weights = unmasked_weight + (1 - unmasked_weight) * weights
    return (errors * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * errors.shape[1]).clamp(min=1e-6)
