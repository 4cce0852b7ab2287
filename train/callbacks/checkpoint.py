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

    def on_start(self, run: Run) -> None:
        self.saved = time.monotonic()

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
        late = [time.monotonic() - self.saved >= 60 * minutes]
        if run.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(late)
        return late[0]


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
