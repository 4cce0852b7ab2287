"""What can watch and change a picture while it is sampled: the contract of the callbacks in `callbacks/`.

A callback runs after each step, so what concerns the first step is set before the call. They are diffusers' own
`PipelineCallback`s, without the cutoff that those demand, and stand beside them in one list:

    with attached(pipeline, [Recorder(), SDCFGCutoffCallback(0.6)], num_steps=20) as arguments:
        pipeline("a red star", num_inference_steps=20, **arguments)
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..configs.choices import did_you_mean
from ..configs.errors import UserError
from ..models.family import ModelFamily
from .internals import allowed_tensors, restored

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Call:
    """What a pipeline does not know of its own call."""

    family: ModelFamily | None = None  # where it is known, latents can be shown in colour without the VAE
    images: Sequence[int] | None = None  # the place of each image in the request; later rows of the batch are padding

    def by_image(self, rows: Iterable[Row]) -> dict[int, Row]:
        """Rows of the batch under the places of their images, without the padding; all rows where no places are."""
        return dict(enumerate(rows) if self.images is None else zip(self.images, rows, strict=False))


class Callback(PipelineCallback):
    """The base of ours; all it does is nothing."""

    tensor_inputs: list[str] = []  # pyright: ignore[reportIncompatibleMethodOverride]  a property only there
    """Tensors of the pipeline that it reads or replaces, such as `latents`."""
    call = Call()
    """The call that is running, while the callback is attached to it."""
    stopped = False
    """Whether nothing more of the request should be begun."""

    def __init__(self) -> None:
        """Not diffusers', which wants to know where to cut off."""

    def tensors(self, pipeline: Any) -> Sequence[str]:
        """`tensor_inputs`, where they depend on the pipeline."""
        return self.tensor_inputs

    def begin(self) -> None:
        """A request begins: one call of a pipeline, or as many as the engine makes for its images."""

    def arguments(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call that concern its first step, such as `guidance_scale`."""
        return {}

    @contextmanager
    def around(self, pipeline: Any, num_steps: int) -> Iterator[None]:
        """Lasts as long as the call; whatever the callback changes is as before when it ends, in whatever way.

        What it changes through `internals` is restored without it. UserError where it cannot work with the pipeline.
        """
        yield

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """After step `step_index` (from 0): the tensors that it asked for, some of them perhaps replaced."""
        return callback_kwargs


@contextmanager
def attached(
    pipeline: Any, callbacks: Sequence[PipelineCallback], num_steps: int, call: Call | None = None
) -> Iterator[dict[str, Any]]:
    """Arguments for one call of a pipeline with callbacks, ours or diffusers'; what they change is restored after it.

    A `call` whose images have places is one of several: whoever makes them calls `begin` before the first. UserError,
    before anything is sampled, for a tensor that the pipeline does not show.
    """
    if not callbacks:
        yield {}
        return
    names = _asked_for(pipeline, callbacks)
    call = call or Call()
    if call.images is None:
        begin(callbacks)
    arguments: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(restored(pipeline))
        for callback in _ours(callbacks):
            callback.call = call
            stack.callback(setattr, callback, "call", Call())
            stack.enter_context(callback.around(pipeline, num_steps))
            arguments |= callback.arguments(num_steps)
        # as a function: the pipeline would ask an object itself, which does not know what the pipeline has
        run = MultiPipelineCallbacks(list(callbacks)).__call__
        yield {**arguments, "callback_on_step_end": run, "callback_on_step_end_tensor_inputs": names}


def begin(callbacks: Sequence[PipelineCallback]) -> None:
    """Tells callbacks of ours that a request begins."""
    for callback in _ours(callbacks):
        callback.begin()


def stopped(callbacks: Sequence[PipelineCallback]) -> bool:
    """Whether one of them wants nothing more of the request to be begun."""
    return any(callback.stopped for callback in _ours(callbacks))


def fraction(pipeline: Any, step_index: int) -> float:
    """How much of the denoising is behind a step that is about to run, in [0, 1): 0 for the first one."""
    return step_index / pipeline.num_timesteps


def is_due(pipeline: Any, step_index: int, every: int) -> bool:
    """Whether the step that has just run is an `every`-th one, or the last."""
    done = step_index + 1
    return done % every == 0 or done == pipeline.num_timesteps


def _ours(callbacks: Sequence[PipelineCallback]) -> list[Callback]:
    return [callback for callback in callbacks if isinstance(callback, Callback)]


def _asked_for(pipeline: Any, callbacks: Sequence[PipelineCallback]) -> list[str]:
    allowed, found = allowed_tensors(pipeline), {}
    for callback in callbacks:
        for name in callback.tensors(pipeline) if isinstance(callback, Callback) else callback.tensor_inputs:
            if name not in allowed:
                raise UserError(
                    f"{type(callback).__name__} asks for {name!r}{did_you_mean(name, allowed)}, which "
                    f"{type(pipeline).__name__} does not show; it shows: {', '.join(allowed) or 'none'}"
                )
            found[name] = True
    return list(found)
