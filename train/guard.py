"""What becomes of a step whose loss or gradients are not finite: it is never applied, and its samples are named.

Whether a step is faulty is known on the device, and the optimiser leaves the step out there; the host learns of it
when the losses are read, every `guard.every` steps and before each checkpoint, so that nothing waits in between.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..adapters.sharded import is_sharded, own
from ..configs.errors import TrainingError
from ..configs.progress import say
from .footprint import RUN
from .journal import Journal
from .run import SampleLoss, StepResult

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Run

QUARANTINE = "quarantine.jsonl"
MOST_OVERFLOWS = 10  # of fp16 gradients in a row, each of which only lowers the loss scale


def fault_of(run: "Run", *values: "Tensor") -> "Tensor":
    """1 where a value is not finite on any process, else 0; on the device, nothing waits."""
    finite = values[0].isfinite()
    for value in values[1:]:
        finite = finite & value.isfinite()
    faults: Any = 1 - finite.float()
    if run.accelerator.num_processes > 1:
        faults = run.accelerator.reduce(faults, "sum")
    return faults.clamp(max=1)


def spoil(run: "Run", fault: "Tensor") -> None:
    """Makes a gradient NaN if `fault` is 1, so that the gradient scaler leaves the step out and lowers its scale.

    It does so with gradients that overflow; of a loss it knows nothing.
    """
    gradient = next((own(each.grad) for each in run.trained() if each.grad is not None), None)
    if gradient is not None:
        gradient.masked_fill_(fault > 0, math.nan)


def step_unless(optimizer: Any, fault: "Tensor") -> None:
    """One step of the optimiser unless `fault` is 1; where there is no gradient scaler, which decides by itself.

    Fused optimisers of torch take the answer as a tensor, by the attribute through which gradient scalers give it; all
    others have to wait for it.
    """
    inner = optimizer.optimizer
    sharded = any(is_sharded(each) for group in optimizer.param_groups for each in group["params"][:1])
    if getattr(inner, "_step_supports_amp_scaling", False) and not sharded:
        inner.found_inf = fault
        try:
            inner.step()  # accelerate's looks for a package on the disk each time
        finally:
            del inner.found_inf
    elif not fault.item():
        optimizer.step()


class Guard:
    """Looks at steps whose losses were read; one for each run."""

    overflows = 0  # in a row
    quarantine: Journal | None = None

    def look(self, run: "Run", results: Sequence[StepResult]) -> None:
        """TrainingError where the run has to end."""
        for result in results:
            overflow = math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
            if overflow and run.accelerator.scaler is not None:
                self._overflow(result)
                continue
            self.overflows = 0
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                self._leave_out(run, result)

    def _overflow(self, result: StepResult) -> None:
        """The gradient scaler has left such a step out by itself and lowered its scale."""
        self.overflows += 1
        if self.overflows >= MOST_OVERFLOWS:
            raise TrainingError(
                f"step {result.step}: gradients overflow fp16 for the {self.overflows}th time in a row "
                f"(norm {result.grad_norm:g}); take loop.precision bf16 or a lower learning rate"
            )

    def _leave_out(self, run: "Run", result: StepResult) -> None:
        """A step that was not applied: the end of the run, or a line in the quarantine list."""
        section, words = run.config.guard, describe(result)
        if section.on_fault == "stop":
            raise TrainingError(
                f"{words}; nothing of this step is kept. Look at its images; train anew with a lower learning rate, "
                "which a resumed run cannot change; or resume without such steps by `guard.on_fault: skip`"
            )
        run.skipped += 1
        if run.is_main:
            self.quarantine = self.quarantine or Journal(run.folder / QUARANTINE, run.folder, RUN)
            self.quarantine.add(_entry(result))
            say(f"warning: {words}; the step is left out ({run.skipped} of {section.max_skips} allowed)")
        if run.skipped > section.max_skips:
            allowed = f"guard.max_skips allows {section.max_skips}"
            raise TrainingError(f"{words}; {run.skipped} steps were left out, {allowed}")


def describe(result: StepResult) -> str:
    """The step, its rates and the files that are to blame: those whose own loss is not finite, or all."""
    rates = ", ".join(f"{part} {rate:g}" for part, rate in result.learning_rates.items())
    files = ", ".join(dict.fromkeys(sample.file for sample in blamed(result.samples)))
    found = f"the loss is {result.loss:g} and its gradient's norm {result.grad_norm:g}"
    return f"step {result.step}: {found} (rates: {rates}; images: {files})"


def blamed(samples: Sequence[SampleLoss]) -> list[SampleLoss]:
    """Samples whose own loss is not finite; all of them if there are none."""
    return [sample for sample in samples if not math.isfinite(sample.value)] or list(samples)


def _entry(result: StepResult) -> dict[str, Any]:
    """What the list says of a step that was left out, for `loraloom replay` and a look at the images."""
    files = [sample.file for sample in blamed(result.samples)]
    return {"step": result.step, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "files": files}
