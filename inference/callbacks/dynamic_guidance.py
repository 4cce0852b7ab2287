"""Classifier-free guidance for a first part of the steps only: the rest cost half.

Guidance is largely unnecessary at low noise, towards the end (Kynkäänniemi et al. 2024, arXiv:2404.07724). Where it is
over, the negative half of every doubled tensor is dropped and the denoiser sees only the prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from ...configs.errors import UserError
from ..callback import Callback, fraction
from ..internals import DOUBLED, allowed_tensors, not_taken_back, set_guidance

Rows = TypeVar("Rows", Tensor, list[Tensor], None)


class DynamicGuidance(Callback):
    """Guidance for steps before the fraction `until` of them, in (0, 1]; without guidance it does nothing."""

    tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(self, until: float = 0.6) -> None:
        if not 0 < until <= 1:
            raise UserError(f"DynamicGuidance: until={until:g} is not above 0 and up to 1; none at all is guidance=1")
        self.until = until

    def tensors(self, pipeline: Any) -> Sequence[str]:
        """The latents, which are never doubled, and what a pipeline has of the rest."""
        shown = allowed_tensors(pipeline)
        return [*self.tensor_inputs, *(name for name in DOUBLED[1:] if name in shown)]

    @contextmanager
    def around(self, pipeline: Any, num_steps: int) -> Iterator[None]:
        if lost := set(not_taken_back(pipeline)) & set(self.tensors(pipeline)):
            raise UserError(f"DynamicGuidance: {type(pipeline).__name__} does not take back {', '.join(sorted(lost))}")
        if not hasattr(pipeline, "unet"):
            raise UserError(f"DynamicGuidance: {type(pipeline).__name__} has no UNet; only for those is it known how")
        if getattr(pipeline.unet, "encoder_hid_proj", None) is not None:  # its images stay doubled, unseen by callbacks
            raise UserError("DynamicGuidance cannot be used with an IP adapter: unload it, or leave out the callback")
        yield

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        is_last = step_index + 1 == pipeline.num_timesteps
        if not pipeline.do_classifier_free_guidance or is_last or fraction(pipeline, step_index + 1) < self.until:
            return callback_kwargs
        set_guidance(pipeline, 1.0)
        rows = len(callback_kwargs["latents"])
        return {name: positive_half(value, rows) for name, value in callback_kwargs.items()}


def positive_half(value: Rows, rows: int) -> Rows:
    """The second half of a tensor, or of each in a list, that has twice as many rows as there are latents.

    Others have no negative half: the latents, a ControlNet's image in guess mode.
    """
    if isinstance(value, list):
        return [positive_half(each, rows) for each in value]
    return value.chunk(2)[-1] if value is not None and len(value) == 2 * rows else value
