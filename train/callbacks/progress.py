"""A progress bar with the smoothed loss, the learning rate and the memory in use."""

from collections.abc import Sequence

from tqdm import tqdm

from ..callback import Callback
from ..run import Run, StepResult


class Progress(Callback):
    """Shown on the main process."""

    def on_start(self, run: Run) -> None:
        steps = run.config.loop.steps
        self.bar = tqdm(total=steps, initial=run.step, desc="training", unit="step", disable=not run.is_main)
        self.smoothed: float | None = None

    def on_step(self, run: Run) -> None:
        self.bar.update()

    def on_results(self, run: Run, results: Sequence[StepResult]) -> None:
        for result in results:
            self.smoothed = result.loss if self.smoothed is None else 0.95 * self.smoothed + 0.05 * result.loss
        rate = next(iter(results[-1].learning_rates.values()))
        said = f"loss {self.smoothed:.4f}, rate {rate:.3g}, {run.peak_memory / 2**30:.1f} GiB"
        self.bar.set_postfix_str(said, refresh=False)

    def on_exit(self, run: Run) -> None:
        self.bar.close()
