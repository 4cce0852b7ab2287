"""A progress bar with the smoothed loss."""

from tqdm import tqdm

from ..callback import Callback
from ..run import Run, StepResult


class Progress(Callback):
    """Shown on the main process."""

    def on_start(self, run: Run) -> None:
        steps = run.config.loop.steps
        self.bar = tqdm(total=steps, initial=run.step, desc="training", unit="step", disable=not run.is_main)
        self.smoothed: float | None = None

    def on_step(self, run: Run, result: StepResult) -> None:
        self.smoothed = result.loss if self.smoothed is None else 0.95 * self.smoothed + 0.05 * result.loss
        self.bar.set_postfix(loss=f"{self.smoothed:.4f}", refresh=False)
        self.bar.update()

    def on_exit(self, run: Run) -> None:
        self.bar.close()
