"""What is asked of a run from outside: TERM, INT, USR1 and HUP, and files named `stop` and `save` in its folder.

Each finishes the step and saves a checkpoint; all but `save` then end the run. A second signal ends it at once, but for
HUP, which comes twice where a terminal is closed, and what a launcher hands on of a signal that came already.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from ...configs.ownership import take_request
from ...configs.processes import launched, launcher
from ...configs.progress import say
from ..callback import Callback
from ..run import Run

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
HANGUP = getattr(signal, "SIGHUP", None)
ECHO = 5.0  # seconds in which a launcher hands a signal on
FILES = ("stop", "save")


class Requests(Callback):
    """Sets `run.stop` and `run.save`, which the checkpoint callback and the loop look at."""

    received: str | None = None

    def __init__(self) -> None:
        self.previous: dict[int, object] = {}
        self.told: set[str] = set()

    def on_start(self, run: Run) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there Python hands signals out; files are looked at all the same
        self.launched = launched()[1] > 1 or launcher() is not None
        ignored = {HANGUP} if HANGUP is not None and signal.getsignal(HANGUP) is signal.SIG_IGN else set()  # by nohup
        self.previous = {number: signal.signal(number, self._remember) for number in SIGNALS if number not in ignored}

    def on_step(self, run: Run) -> None:
        several = run.accelerator.num_processes > 1
        if several and not run.is_due(run.config.guard.every or 1):  # to ask the others, all wait for their devices
            return
        asked = [self.received or (self._file(run.folder) if run.is_main else None)]
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
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for each in self.previous:
            if each == HANGUP:
                signal.signal(each, signal.SIG_IGN)
            elif not self.launched:
                signal.signal(each, signal.SIG_DFL)

    def _file(self, folder: Path) -> str | None:
        """A request by file, which is taken away. What is no such file is left alone, with a line about it."""
        for name in FILES:
            file = folder / name
            try:
                if take_request(file):
                    return name
                if os.path.lexists(file):
                    words = f"is no empty file, so nothing is done about it; `rm` it and `touch` it to {name}"
                    self._tell(file, words)
            except OSError as error:
                self._tell(file, f"cannot be taken away ({error.strerror}), so nothing is done about it")
        return None

    def _tell(self, file: Path, words: str) -> None:
        if file.name not in self.told:
            self.told.add(file.name)
            say(f"warning: {file} {words}")
