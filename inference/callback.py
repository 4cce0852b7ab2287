"""What can watch and change a picture while it is sampled: the contract of the callbacks in `callbacks/`.

A callback runs after each step, so what concerns the first step is set before the call. They are diffusers' own
`PipelineCallback`s, without the cutoff that those demand, and stand beside them in one list:

    with attached(pipeline, [Preview(...), SDCFGCutoffCallback(0.6)], num_steps=20) as arguments:
        pipeline("a red star", num_inference_steps=20, **arguments)
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from .internals import allowed_tensors


class Callback(PipelineCallback):
    """The base of ours; all it does is nothing."""

    tensor_inputs: list[str] = []  # pyright: ignore[reportIncompatibleMethodOverride]  a property only there
    """Tensors of the pipeline that it reads or replaces, such as `latents`."""

    def __init__(self) -> None:
        """Not diffusers', which wants to know where to cut off."""

    def arguments(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call that concern its first step, such as `guidance_scale`."""
        return {}

    @contextmanager
    def around(self, pipeline: Any, num_steps: int) -> Iterator[None]:
        """Lasts as long as the call; whatever the callback changes is as before when it ends, in whatever way."""
        yield

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """After step `step_index` (from 0): the tensors of `tensor_inputs`, some of them perhaps replaced."""
        return callback_kwargs


@contextmanager
def attached(pipeline: Any, callbacks: Sequence[PipelineCallback], num_steps: int) -> Iterator[dict[str, Any]]:
    """Arguments for one call of a pipeline with callbacks, ours or diffusers'; what they change is restored after it.

    UserError, before anything is sampled, for a tensor that the pipeline does not show.
    """
    if not callbacks:
        yield {}
        return
    _check_tensors(pipeline, callbacks)
    arguments: dict[str, Any] = {}
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, Callback):
                stack.enter_context(callback.around(pipeline, num_steps))
                arguments |= callback.arguments(num_steps)
        yield {**arguments, "callback_on_step_end": MultiPipelineCallbacks(list(callbacks))}


def fraction(pipeline: Any, step_index: int) -> float:
    """How much of the denoising is behind a step that is about to run, in [0, 1): 0 for the first one."""
    return step_index / pipeline.num_timesteps


def _check_tensors(pipeline: Any, callbacks: Sequence[PipelineCallback]) -> None:
    allowed = allowed_tensors(pipeline)
    for callback in callbacks:
        for name in callback.tensor_inputs:
            if name not in allowed:
                raise UserError(
                    f"{type(callback).__name__} asks for {name!r}{did_you_mean(name, allowed)}, which "
                    f"{type(pipeline).__name__} does not show; it shows: {', '.join(allowed)}"
                )
