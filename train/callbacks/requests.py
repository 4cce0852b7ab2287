"""What is asked of a run from outside: TERM, INT and USR1, and files named `stop` and `save` in its folder.

Each finishes the step and saves a checkpoint; all but `save` then end the run. A second signal ends it at once.
"""

import signal
from pathlib import Path
from types import FrameType

from ...configs.ownership import take_request
from ..callback import Callback
from ..run import Run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FILES = ("stop", "save")


class Requests(Callback):
    """Sets `run.stop` and `run.save`, which the checkpoint callback and the loop look at."""

    received: str | None = None

    def on_start(self, run: Run) -> None:
        self.previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def on_step(self, run: Run) -> None:
        several = run.accelerator.num_processes > 1
        if several and not run.is_due(run.config.guard.every or 1):  # to ask the others, all wait for their devices
            return
        asked = [self.received or (_file(run.folder) if run.is_main else None)]
        if several:
            from accelerate.utils import gather_object

            asked = gather_object(asked)
        for request in filter(None, asked):
            if request == "save":
                run.save = True
            elif run.step < run.config.loop.steps:
                run.stop = request

    def on_exit(self, run: Run) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def _file(folder: Path) -> str | None:
    """A request by file, which is taken away."""
    for name in FILES:
        if take_request(folder / name):
            return name
    return None
