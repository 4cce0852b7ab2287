"""The names that diffusers keeps to itself and that callbacks need all the same: nothing else of ours touches them.

A test fails when the pipelines of an installed diffusers have or use others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SHOWN = "_callback_tensor_inputs"
CHANGED = ("_guidance_scale", "_interrupt")
"""Attributes that callbacks set; a call of the pipeline sets them too, before its first step."""

DOUBLED = (
    "prompt_embeds",
    "add_text_embeds",
    "add_time_ids",
    "image",
    "control_image",
    "mask",
    "masked_image_latents",
)
"""Variables of a pipeline's call that have a negative half and a positive one while there is guidance."""

NOT_TAKEN_BACK = {
    "StableDiffusionControlNetInpaintPipeline": ("mask", "masked_image_latents"),
    "StableDiffusionXLControlNetInpaintPipeline": ("add_text_embeds", "add_time_ids", "mask", "masked_image_latents"),
}
"""Pipeline -> what it shows its callbacks, but does not replace by what they answer."""

GUIDED_BY_ARGUMENT = (
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)
"""Pipelines whose steps multiply by the argument of the call, whatever the attribute has become."""


def allowed_tensors(pipeline: Any) -> Sequence[str]:
    """The tensors that a pipeline shows its callbacks, and takes back from them."""
    return getattr(pipeline, SHOWN, ())


def not_taken_back(pipeline: Any) -> Sequence[str]:
    """Those of them that it does not take back after all."""
    return [name for kind in _kinds(pipeline) if kind in NOT_TAKEN_BACK for name in NOT_TAKEN_BACK[kind]]


def guidance_can_vary(pipeline: Any) -> bool:
    """Whether a guidance scale other than 1 has an effect when it is set between two steps."""
    return not any(kind in GUIDED_BY_ARGUMENT for kind in _kinds(pipeline))


def set_guidance(pipeline: Any, scale: float) -> None:
    """The guidance scale of the next step; at 1 and below there is no prediction without the words any more."""
    pipeline._guidance_scale = scale


def set_interrupt(pipeline: Any, value: bool) -> None:
    """Whether the pipeline skips the steps that are left and decodes what it has."""
    pipeline._interrupt = value


@contextmanager
def restored(pipeline: Any) -> Iterator[None]:
    """At the end the attributes in CHANGED are as before: a pipeline that was never called has none of them."""
    before = {name: value for name, value in vars(pipeline).items() if name in CHANGED}
    try:
        yield
    finally:
        for name in CHANGED:
            vars(pipeline).pop(name, None)
        vars(pipeline).update(before)


def _kinds(pipeline: Any) -> list[str]:
    return [kind.__name__ for kind in type(pipeline).__mro__]
