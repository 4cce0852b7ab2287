"""Saves the state of the run: every so many steps or minutes, on request, at the end, and when the run is stopped."""

import time
from pathlib import Path

from ...configs.errors import TrainingError
from ...configs.progress import say
from ..callback import Callback
from ..run import Run
from ..state import SaveError, save_checkpoint, saved_so_far


class Checkpoints(Callback):
    """Runs before validation, so that a checkpoint never waits for pictures."""

    saved = 0.0  # when, in seconds of a clock that only goes forward
    asked = next_ask = 0  # steps: when all processes looked at the clock of the main one, and will next

    def on_start(self, run: Run) -> None:
        self.saved = self.looked = time.monotonic()
        self.asked = self.next_ask = run.step

    def on_step(self, run: Run) -> None:
        if not (run.is_due(run.config.checkpoint.every) or run.stop or run.save or self._is_late(run)):
            return
        run.read()  # a fault that nobody has seen yet ends the run before anything is saved
        try:
            checkpoint = save_checkpoint(run)
        except SaveError as error:
            _go_on_unsaved(run, str(error))
        else:
            run.unsaved = None
            _tell(run, checkpoint)
        run.save, self.saved = False, time.monotonic()

    def _is_late(self, run: Run) -> bool:
        """Whether the minutes have passed by the clock of the main process."""
        minutes = run.config.checkpoint.minutes
        if minutes is None:
            return False
        now = time.monotonic()
        left = self.saved + 60 * minutes - now
        if run.accelerator.num_processes == 1:
            return left <= 0
        if run.step < self.next_ask:
            return False
        from accelerate.utils import broadcast_object_list

        # all wait for the answer, so the question comes again when half of the time that is left has passed
        seconds = (now - self.looked) / max(1, run.step - self.asked)
        answer = [(left <= 0, max(1, int(left / 2 / max(seconds, 1e-3))))]
        late, steps = broadcast_object_list(answer)[0]
        self.looked, self.asked, self.next_ask = now, run.step, run.step + (1 if late else steps)
        return late


def _tell(run: Run, checkpoint: Path) -> None:
    """What somebody has asked for is there."""
    if run.is_main and run.stop:
        say(f"{run.stop}: saved {checkpoint}; go on with `loraloom resume {run.folder}`")
    elif run.is_main and run.save:
        say(f"save: wrote {checkpoint}")


def _go_on_unsaved(run: Run, why: str) -> None:
    """Memory still has what the disk refuses, and later there may be room: only a run that stops loses anything."""
    words = f"step {run.step}: no checkpoint is saved ({why}); {saved_so_far(run.folder)}"
    if run.stop:
        raise TrainingError(f"{run.stop}: {words}, and the steps after it are lost")
    run.unsaved = why
    if run.is_main:
        say(f"warning: {words}; training goes on: make room, then `touch {run.folder / 'save'}` to try again")
