"""Progress with the smoothed loss, the learning rate and the memory in use: a bar on a terminal, lines in a log."""

import sys
from collections.abc import Sequence

from ...configs.progress import Bar
from ..callback import Callback
from ..run import Run, StepResult

LINES = 20
"""In a log, of a whole run."""


class Progress(Callback):
    """Shown on the main process."""

    def on_start(self, run: Run) -> None:
        steps = run.config.loop.steps
        self.is_shown = run.is_main and sys.stderr.isatty()
        self.bar = Bar(total=steps, initial=run.step, desc="training", unit="step", disable=not self.is_shown)
        self.smoothed: float | None = None

    def on_step(self, run: Run) -> None:
        self.bar.update()

    def on_results(self, run: Run, results: Sequence[StepResult]) -> None:
        for result in results:
            self.smoothed = result.loss if self.smoothed is None else 0.95 * self.smoothed + 0.05 * result.loss
        rate = next(iter(results[-1].learning_rates.values()))
        said = f"loss {self.smoothed:.4f}, rate {rate:.3g}, {run.peak_memory / 2**30:.1f} GiB"
        self.bar.set_postfix_str(said, refresh=False)
        if run.is_main and not self.is_shown and is_line_due(results[0].step, results[-1].step, run.config.loop.steps):
            print(f"step {results[-1].step} of {run.config.loop.steps}: {said}", file=sys.stderr, flush=True)

    def on_exit(self, run: Run) -> None:
        self.bar.close()


def is_line_due(first: int, last: int, steps: int) -> bool:
    """Whether one of the steps `first..last` is a twentieth of the run, or its last one."""
    every = max(1, steps // LINES)
    return last == steps or last // every > (first - 1) // every
