"""A progress bar with the smoothed loss, the learning rate and the memory in use."""

import resource
import sys
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
        self.bar.set_postfix_str(f"loss {self.smoothed:.4f}, rate {rate:.3g}, {memory(run)}", refresh=False)

    def on_exit(self, run: Run) -> None:
        self.bar.close()


def memory(run: Run) -> str:
    """The most that was in use until now: of the GPU where there is one, else of the process."""
    import torch

    if run.accelerator.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(run.accelerator.device) / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
