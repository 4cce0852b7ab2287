"""Losses that are still on the device: kept for some steps, then read together, over all processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .run import SampleLoss, StepResult

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from .objective import Losses


@dataclass(frozen=True, slots=True)
class Unread:
    """One optimiser step of this process."""

    step: int
    parts: "Sequence[tuple[Sequence[str], Sequence[str], Losses]]"  # sources, files, losses: the batches may go
    norm: "Tensor"
    learning_rates: dict[str, float]
    seconds: float


def read_all(accelerator: "Accelerator", unread: Sequence[Unread]) -> list[StepResult]:
    """Waits for the device once; every process has to take part, each with the same steps."""
    own = [_values(each) for each in unread]
    everyones = [own]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        everyones = gather_object([own])
    return [
        StepResult(
            step=each.step,
            loss=sum(values[index][0] for values in everyones),
            samples=[sample for values in everyones for sample in values[index][1]],
            grad_norm=float(each.norm),
            learning_rates=each.learning_rates,
            seconds=each.seconds,
        )
        for index, each in enumerate(unread)
    ]


def _values(unread: Unread) -> tuple[float, list[SampleLoss]]:
    """The loss of this process, and that of each of its samples."""
    samples = [
        SampleLoss(*each)
        for sources, files, losses in unread.parts
        for each in zip(sources, files, losses.per_sample.tolist(), strict=True)
    ]
    return sum(losses.total.item() for *_, losses in unread.parts), samples
