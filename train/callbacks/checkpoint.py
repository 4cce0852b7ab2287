"""Saves the state of the run every so many steps, at the end, and when the run is stopped."""

from tqdm import tqdm

from ..callback import Callback
from ..run import Run, StepResult
from ..state import save_checkpoint


class Checkpoints(Callback):
    """Runs before validation, so that a checkpoint never waits for pictures."""

    def on_step(self, run: Run, result: StepResult) -> None:
        if run.is_due(run.config.checkpoint.every) or run.stop:
            checkpoint = save_checkpoint(run)
            if run.stop and run.is_main:
                tqdm.write(f"{run.stop}: saved {checkpoint}; go on with `loraloom resume {run.folder}`")
