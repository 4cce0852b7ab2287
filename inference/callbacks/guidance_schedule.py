"""A guidance scale that changes from step to step."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...configs.errors import UserError
from ..callback import Callback, fraction
from ..internals import guidance_can_vary, set_guidance

ABOVE_ONE = 1 + 1e-6
"""The least scale: at 1 a pipeline predicts only with the words, while their embeddings stay doubled, and breaks."""


class GuidanceSchedule(Callback):
    """`scale` gives the guidance scale, at least 1, of a step from the fraction of steps before it, in [0, 1).

    `GuidanceSchedule(lambda done: 7.5 - 5 * done)` goes down from 7.5. Takes the place of the call's own scale. Where
    another callback has ended the guidance, it stays ended. UserError for a scale below 1 or not finite, and for
    pipelines that cannot change it.
    """

    def __init__(self, scale: Callable[[float], float]) -> None:
        self.scale = scale

    def arguments(self, num_steps: int) -> dict[str, Any]:
        return {"guidance_scale": self.value(0.0)}

    @contextmanager
    def around(self, pipeline: Any, num_steps: int) -> Iterator[None]:
        if not guidance_can_vary(pipeline):
            raise UserError(f"GuidanceSchedule: {type(pipeline).__name__} reads its guidance scale only once")
        for step in range(num_steps):  # a mistake in the last one is found before the first one
            self.value(step / num_steps)
        yield

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        is_last = step_index + 1 == pipeline.num_timesteps
        if pipeline.do_classifier_free_guidance and not is_last:
            set_guidance(pipeline, self.value(fraction(pipeline, step_index + 1)))
        return callback_kwargs

    def value(self, done: float) -> float:
        """The scale after a fraction of the steps, just above 1 where it is 1."""
        scale = float(self.scale(done))
        if not math.isfinite(scale) or scale < 1:
            raise UserError(f"GuidanceSchedule: the scale after {done:.0%} of the steps is {scale:g}, not 1 or more")
        return max(scale, ABOVE_ONE)
