"""What becomes of a step whose loss or gradients are not finite: it is never applied, and its samples are named."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..configs.errors import TrainingError

if TYPE_CHECKING:
    from .run import Run

QUARANTINE = "quarantine.jsonl"
MOST_OVERFLOWS = 10  # of fp16 gradients in a row, each of which only lowers the loss scale


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """The loss of one sample, before any weight."""

    source: str
    file: str
    value: float


@dataclass(slots=True)
class Guard:
    """Counts what went wrong; one for each run."""

    overflows: int = 0  # in a row

    def allows(self, run: "Run", loss: float, norm: float, samples: Sequence[SampleLoss]) -> bool:
        """Whether the step may be applied; TrainingError where the run has to end."""
        if run.accelerator.scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
            return self._overflow(run, norm)
        self.overflows = 0
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        section, words = run.config.guard, describe(run, loss, norm, samples)
        if section.on_fault == "stop":
            raise TrainingError(
                f"{words}; nothing of this step is kept. Lower the learning rate, look at its images, or go on "
                "without such steps by `guard.on_fault: skip`"
            )
        run.skipped += 1
        if run.is_main:
            _quarantine(run, loss, norm, samples)
            tqdm.write(f"warning: {words}; the step is left out ({run.skipped} of {section.max_skips} allowed)")
        if run.skipped > section.max_skips:
            allowed = f"guard.max_skips allows {section.max_skips}"
            raise TrainingError(f"{words}; {run.skipped} steps were left out, {allowed}")
        return False

    def _overflow(self, run: "Run", norm: float) -> bool:
        """The gradient scaler leaves such a step out by itself and lowers its scale."""
        self.overflows += 1
        if self.overflows >= MOST_OVERFLOWS:
            raise TrainingError(
                f"step {run.step + 1}: gradients overflow fp16 for the {self.overflows}th time in a row "
                f"(norm {norm:g}); take loop.precision bf16 or a lower learning rate"
            )
        return True


def describe(run: "Run", loss: float, norm: float, samples: Sequence[SampleLoss]) -> str:
    """The step, its rates and the files that are to blame: those whose own loss is not finite, or all."""
    rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in run.optimizer.param_groups)
    files = ", ".join(dict.fromkeys(sample.file for sample in blamed(samples)))
    found = f"the loss is {loss:g} and its gradient's norm {norm:g}"
    return f"step {run.step + 1}: {found} (rates: {rates}; images: {files})"


def blamed(samples: Sequence[SampleLoss]) -> list[SampleLoss]:
    """Samples whose own loss is not finite; all of them if there are none."""
    return [sample for sample in samples if not math.isfinite(sample.value)] or list(samples)


def _quarantine(run: "Run", loss: float, norm: float, samples: Sequence[SampleLoss]) -> None:
    """A line for each step that was left out, for `loraloom replay` and a look at the images."""
    files = [sample.file for sample in blamed(samples)]
    entry = {"step": run.step + 1, "loss": str(loss), "grad_norm": str(norm), "files": files}
    with (run.folder / QUARANTINE).open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
