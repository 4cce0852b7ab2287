"""Curves: `logs/history.jsonl` in the run folder, and accelerate's trackers (TensorBoard, W&B), once a second."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ...configs.errors import UserError
from ...configs.ownership import claim_logs
from ..callback import Callback
from ..footprint import RUN, events_of
from ..journal import Journal, tolerated
from ..run import Run, StepResult

EVERY = 1.0  # seconds


class Tracking(Callback):
    """Writes a line for each step; trackers get theirs together."""

    history: Journal | None = None
    told = 0.0  # when the trackers were, by the monotonic clock

    def on_start(self, run: Run) -> None:
        start_trackers(run)
        if run.is_main:
            with tolerated("logs"):
                claim_logs(events_of(run.folder), run.folder, RUN)
            self.history = Journal(run.folder / "logs" / "history.jsonl", run.folder, RUN)

    def on_results(self, run: Run, results: Sequence[StepResult]) -> None:
        for result in results:
            self._write(run, result)

    def _write(self, run: Run, result: StepResult) -> None:
        values = {
            "loss": result.loss,
            **{f"loss/{source}": loss for source, loss in result.source_losses.items()},
            **{f"learning_rate/{part}": rate for part, rate in result.learning_rates.items()},
            "grad_norm": result.grad_norm,
        }
        if self.history is not None:
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            self.history.add({"step": result.step, **known, "seconds": round(result.seconds, 4)})
        run.log(values, result.step)

    def on_step(self, run: Run) -> None:
        if time.monotonic() - self.told > EVERY:
            tell_trackers(run)
            self.told = time.monotonic()

    def on_exit(self, run: Run) -> None:
        tell_trackers(run)
        finish_trackers(run)
        if self.history is not None:
            self.history.close()


def start_trackers(run: Run) -> None:
    """Those of the config, one by one: what cannot start (no key, no network) is left out with a warning."""
    accelerator, started = run.accelerator, []
    about = {"name": run.config.output.name, "dir": str(run.folder / "logs"), "config": run.config.model_dump()}
    for tracker in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers("loraloom", init_kwargs={"wandb": about})
            started += accelerator.trackers
        except ImportError as error:
            raise UserError(f"trackers: {tracker} cannot be imported ({error})") from error
        except Exception as error:  # whatever a tracker's service does, training goes on without it
            if run.is_main:
                tqdm.write(f"warning: {tracker} cannot start, training goes on without it: {error}")
    accelerator.trackers = started


def tell_trackers(run: Run) -> None:
    """All that was logged since the last time; a tracker that fails is left out, and training goes on without it."""
    unlogged, run.unlogged = run.unlogged, []
    for tracker in list(run.accelerator.trackers) if unlogged else ():
        step = 0
        try:
            for step, values in unlogged:
                _tell(tracker, values, step)
            if tracker.name == "tensorboard":
                tracker.tracker.flush()
        except Exception as error:  # whatever a tracker's service does
            run.accelerator.trackers.remove(tracker)
            tqdm.write(f"warning: {tracker.name} stopped at step {step}, training goes on: {error}")


def _tell(tracker: Any, values: Mapping[str, float], step: int) -> None:
    """As accelerate does, but that it would wait for TensorBoard's file after every step."""
    if tracker.name != "tensorboard":
        tracker.log(dict(values), step=step)
        return
    for name, value in values.items():
        tracker.tracker.add_scalar(name, value, step)


def finish_trackers(run: Run) -> None:
    """Closes them; what their services say then is only a warning."""
    for tracker in run.accelerator.trackers if run.is_main else ():
        try:
            tracker.finish()
        except Exception as error:  # whatever a tracker's service does, the run is over
            tqdm.write(f"warning: {tracker.name} could not finish: {error}")
    run.accelerator.trackers = []
