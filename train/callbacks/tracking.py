"""Curves: `logs/history.jsonl` in the run folder, and accelerate's trackers (TensorBoard, W&B)."""

import json
import math
from pathlib import Path
from typing import TextIO

from ...configs.errors import UserError
from ..callback import Callback
from ..run import Run, StepResult


class Tracking(Callback):
    """Writes a line for each step."""

    file: TextIO | None = None

    def on_start(self, run: Run) -> None:
        try:
            run.accelerator.init_trackers("loraloom", init_kwargs={"wandb": {"name": run.config.output.name}})
        except (ImportError, ValueError) as error:
            raise UserError(f"trackers {list(run.config.trackers)}: cannot start ({error})") from error
        if run.is_main:
            folder = run.folder / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / "history.jsonl").open("a", buffering=1)
            self.file.truncate(_whole_lines(folder / "history.jsonl"))

    def on_step(self, run: Run, result: StepResult) -> None:
        values = {
            "loss": result.loss,
            **{f"loss/{source}": loss for source, loss in result.source_losses.items()},
            **{f"learning_rate/{part}": rate for part, rate in result.learning_rates.items()},
            "grad_norm": result.grad_norm,
        }
        if self.file is not None:
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            self.file.write(json.dumps({"step": run.step, **known, "seconds": round(result.seconds, 4)}) + "\n")
        run.log(values)

    def on_exit(self, run: Run) -> None:
        if self.file is not None:
            self.file.close()


def _whole_lines(file: Path) -> int:
    """Bytes up to the last newline: a run that was killed may have left half a line."""
    return file.read_bytes().rfind(b"\n") + 1
