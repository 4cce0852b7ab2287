"""Saves the state of the run: every so many steps or minutes, on request, at the end, and when the run is stopped."""

import time

from tqdm import tqdm

from ..callback import Callback
from ..run import Run
from ..state import save_checkpoint


class Checkpoints(Callback):
    """Runs before validation, so that a checkpoint never waits for pictures."""

    saved = 0.0  # when, in seconds of a clock that only goes forward

    def on_start(self, run: Run) -> None:
        self.saved = time.monotonic()

    def on_step(self, run: Run) -> None:
        if not (run.is_due(run.config.checkpoint.every) or run.stop or run.save or self._is_late(run)):
            return
        run.read()  # a fault that nobody has seen yet ends the run before anything is saved
        checkpoint = save_checkpoint(run)
        if run.is_main and run.stop:
            tqdm.write(f"{run.stop}: saved {checkpoint}; go on with `loraloom resume {run.folder}`")
        elif run.is_main and run.save:
            tqdm.write(f"save: wrote {checkpoint}")
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
