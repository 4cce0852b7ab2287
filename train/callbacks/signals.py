"""TERM, INT and USR1: finish the step, save a checkpoint, end. A second signal ends at once."""

import signal
from types import FrameType

from ..callback import Callback
from ..run import Run, StepResult

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopOnSignal(Callback):
    """Sets `run.stop`, which the checkpoint callback and the loop look at."""

    received: str | None = None

    def on_start(self, run: Run) -> None:
        self.previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def on_step(self, run: Run, result: StepResult) -> None:
        received = self.received
        if run.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            received = next((name for name in gather_object([received]) if name), None)
        if received and run.step < run.config.loop.steps:
            run.stop = received

    def on_exit(self, run: Run) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
