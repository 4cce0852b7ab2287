"""Callback: something that happens at the start, after steps, or at the end of a run. All hooks default to nothing."""

from collections.abc import Sequence

from .run import Run, StepResult


class Callback:
    """Sees the Run, never the Trainer. Called on every process; writes files on the main one."""

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def on_step(self, run: Run) -> None:
        """After each optimiser step; `run.step` counts it already."""

    def on_results(self, run: Run, results: Sequence[StepResult]) -> None:
        """When losses were read from the device: those of all steps since the last time."""

    def on_end(self, run: Run) -> None:
        """After the last step, also when the run was stopped (`run.stop`), but not when it failed."""

    def on_exit(self, run: Run) -> None:
        """Last of all, whatever happened: gives back what `on_start` took."""
