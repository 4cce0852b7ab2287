"""Stopping a request on demand or after a time: the steps that are left are skipped, what is done is decoded."""

import math
from time import monotonic
from typing import Any

from ...configs.errors import UserError
from ..callback import Callback
from ..internals import set_interrupt


class Interrupt(Callback):
    """Stops after the step in which `stop()` is called, or `seconds` after the request began, whichever comes first.

    A call that has begun makes one step at least. The next request begins anew, whatever was called before.
    """

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise UserError(f"Interrupt: seconds={seconds:g} is not a finite number above 0")
        self.seconds = seconds
        self.begin()

    def begin(self) -> None:
        self._asked = False
        self._deadline = None if self.seconds is None else monotonic() + self.seconds

    def stop(self) -> None:
        """From another thread or a signal handler, at any time."""
        self._asked = True  # no threading.Event, whose lock a signal handler could wait for in vain

    @property
    def stopped(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._asked or (self._deadline is not None and monotonic() >= self._deadline)

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if self.stopped:
            set_interrupt(pipeline, True)
        return callback_kwargs
