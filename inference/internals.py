"""The names that diffusers keeps to itself and that callbacks need all the same: nothing else of ours touches them."""

from collections.abc import Sequence
from typing import Any

NAMES = ("_callback_tensor_inputs", "_guidance_scale", "_interrupt")
"""Attributes of a pipeline; a test fails when an installed diffusers has others."""


def allowed_tensors(pipeline: Any) -> Sequence[str]:
    """The tensors that a pipeline shows its callbacks, and takes back from them."""
    return getattr(pipeline, "_callback_tensor_inputs", ())


def set_guidance(pipeline: Any, scale: float) -> None:
    """The guidance scale of the next step; at 1 and below there is no prediction without the words any more."""
    pipeline._guidance_scale = scale


def set_interrupt(pipeline: Any, value: bool) -> None:
    """Whether the pipeline skips the steps that are left and decodes what it has."""
    pipeline._interrupt = value
