"""Curves: `logs/history.jsonl` in the run folder, and accelerate's trackers (TensorBoard, W&B), once a second."""

import math
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from ...configs.errors import UserError
from ...configs.ownership import claim_logs
from ...configs.progress import say
from ..callback import Callback
from ..footprint import RUN, events_of
from ..journal import Journal, tolerated
from ..record import hashed, hidden
from ..run import Run, StepResult

EVERY = 1.0  # seconds


class Tracking(Callback):
    """Writes a line for each step; trackers get theirs together."""

    history: Journal | None = None
    told = 0.0  # when the trackers were, by the monotonic clock

    hook: Any = None  # what says that a thread has failed, as it was before

    def on_start(self, run: Run) -> None:
        self.hook, threading.excepthook = threading.excepthook, partial(_quiet, threading.excepthook)
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
        if self.hook is not None:
            threading.excepthook = self.hook


def _quiet(others: Any, failed: Any) -> None:
    """What TensorBoard's thread cannot write is told by the next call, and needs no traceback."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        others(failed)


def start_trackers(run: Run) -> None:
    """Those of the config, one by one: what cannot start (no key, no network) is left out with a warning."""
    accelerator, started = run.accelerator, []
    for tracker in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers("loraloom", init_kwargs=_told(run))
            started += accelerator.trackers
        except ImportError as error:
            raise UserError(f"trackers: {tracker} cannot be imported ({error})") from error
        except Exception as error:  # whatever a tracker's service does, training goes on without it
            if run.is_main:
                say(f"warning: {tracker} cannot start, training goes on without it: {error}")
    accelerator.trackers = started


def _told(run: Run) -> dict[str, dict[str, Any]]:
    """What trackers get besides the curves: the config as `output.metadata` allows it, and nothing that their
    libraries would collect by themselves, as far as they can be asked: command line, terminal, code, git."""
    own = {"name": run.config.output.name, "dir": str(run.folder / "logs"), "config": hidden(run.config)}
    collect = {"console": "off", "x_disable_meta": True, "disable_code": True, "disable_git": True}
    return {
        "wandb": own | {"settings": collect},
        "aim": {"capture_terminal_logs": False, "log_system_params": False},
        "clearml": {"auto_connect_arg_parser": False, "auto_connect_streams": False},
    }


def tell_trackers(run: Run) -> None:
    """All that was logged since the last time; a tracker that fails is left out, and training goes on without it."""
    unlogged, run.unlogged = run.unlogged, []
    data = run.config.data.sources, run.config.validation.sources
    given = {"prior", *(source.name for sources in data for source in sources)}
    for tracker in list(run.accelerator.trackers) if unlogged else ():
        step = 0
        try:
            for step, values in unlogged:
                _tell(tracker, values, step, given)
            if tracker.name == "tensorboard":
                tracker.tracker.flush()
        except Exception as error:  # whatever a tracker's service does
            run.accelerator.trackers.remove(tracker)
            say(f"warning: {tracker.name} stopped at step {step}, training goes on: {error}")


def _tell(tracker: Any, values: Mapping[str, float], step: int, given: Collection[str | None]) -> None:
    """As accelerate does, but that it would wait for TensorBoard's file after every step.

    What goes to a service names no folder: a source is called so only where it was `given` the name for that.
    """
    if tracker.name != "tensorboard":
        tracker.log({_public(name, given): value for name, value in values.items()}, step=step)
        return
    for name, value in values.items():
        tracker.tracker.add_scalar(name, value, step)


def _public(name: str, given: Collection[str | None]) -> str:
    kind, _, source = name.partition("/")
    is_private = kind in ("loss", "held_out") and source and source not in given
    return f"{kind}/source-{hashed(source)[7:13]}" if is_private else name


def finish_trackers(run: Run) -> None:
    """Closes them; what their services say then is only a warning."""
    for tracker in run.accelerator.trackers if run.is_main else ():
        try:
            tracker.finish()
        except Exception as error:  # whatever a tracker's service does, the run is over
            say(f"warning: {tracker.name} could not finish: {error}")
    run.accelerator.trackers = []
