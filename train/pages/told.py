"""What the files of a run say, in words: lines of its report and of its model card. None of them names the data."""

from collections.abc import Mapping
from typing import Any

from ...configs.words import counted
from ..facts import at, final_loss, method_of, seconds_of, step_of, steps_of
from ..run_folder import RunFiles
from .words import duration, in_words, number


def adapter_of(run: RunFiles) -> str | None:
    """Method, rank and alpha where it has them, and how many modules of each part it trains."""
    modules = (run.record.get("modules") or {}).items()
    return " · ".join([*method_of(run), *(f"{part}: {counted(count, 'module')}" for part, count in modules)]) or None


def progress_of(run: RunFiles) -> str | None:
    """'120 of 300'."""
    known = [f"{value:,}" for value in (step_of(run), steps_of(run)) if value is not None]
    return " of ".join(known) or None


def batch_of(config: Mapping[str, Any]) -> str | None:
    """Samples of a step, and of one forward pass where that is fewer."""
    batch, micro = at(config, "loop.batch_size"), at(config, "loop.micro_batch")
    return batch and (f"{batch} · {micro} at a time" if micro and micro != batch else str(batch))


def learning_rate_of(config: Mapping[str, Any]) -> str | None:
    """The highest one, those of single parts, and the schedule."""
    rate, schedule = at(config, "optimizer.learning_rate"), at(config, "optimizer.schedule")
    own = {part: section.get("learning_rate") for part, section in (at(config, "optimizer.parts") or {}).items()}
    others = [f"{part}: {in_words(other)}" for part, other in own.items() if other is not None]
    words = [rate and in_words(rate), *others, schedule]
    return " · ".join(word for word in words if word) or None


def loss_of(run: RunFiles) -> str | None:
    """Mean over the last tenth of the run."""
    last = final_loss(run)
    return last and last.words()


def time_of(run: RunFiles) -> str | None:
    """Of all training, and of one step."""
    seconds = seconds_of(run)
    if seconds is None:
        return None
    each = [float(entry["seconds"]) for entry in run.history if entry.get("seconds") is not None]
    return duration(seconds) + (f" · {number(sum(each) / len(each), 2)} s per step" if each else "")
