"""What a run folder says of its run, in words: for the report and for the model card. None of it names the data."""

import json
from collections.abc import Mapping
from typing import Any

from ..configs.choices import find, names
from .chart import number
from .page import counted
from .run_folder import RunFiles


def at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path such as `adapter.rank`; None if the config has no such place."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def adapter_of(run: RunFiles) -> str | None:
    """Method, rank and alpha where it has them, and how many modules of each part it adapts."""
    method, rank, alpha = (at(run.config, f"adapter.{key}") for key in ("method", "rank", "alpha"))
    words = [method]
    if _has_rank(method):
        words += [rank and f"rank {rank}", alpha and f"alpha {in_words(alpha)}"]
    words += [f"{part}: {counted(count, 'module')}" for part, count in (run.record.get("modules") or {}).items()]
    return " · ".join(str(word) for word in words if word) or None


def _has_rank(method: Any) -> bool:
    if method not in names("adapters.methods"):
        return True
    found = find("adapters.methods", method)
    return found.SELECTION is not None and not found.CHANGES_BASE


def steps_of(run: RunFiles) -> str | None:
    """'120 of 300'."""
    step = run.record.get("step", run.history[-1]["step"] if run.history else None)
    steps = run.record.get("steps", at(run.config, "loop.steps"))
    known = [f"{value:,}" for value in (step, steps) if value is not None]
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


def loss_of(history: list[dict[str, Any]]) -> str | None:
    """Mean over the last tenth of the run: single steps say little, their noise levels differ."""
    losses = [float(entry["loss"]) for entry in history if entry.get("loss") is not None]
    last = losses[-max(1, len(losses) // 10) :]
    return f"{number(sum(last) / len(last))} · mean of {counted(len(last), 'step')}" if last else None


def time_of(run: RunFiles) -> str | None:
    """Of all training, and of one step."""
    seconds = run.record.get("train_seconds")
    if seconds is None:
        return None
    each = [float(entry["seconds"]) for entry in run.history if entry.get("seconds") is not None]
    return duration(seconds) + (f" · {number(sum(each) / len(each), 2)} s per step" if each else "")


def duration(seconds: float) -> str:
    """'41.2 s', '12 min 5 s' or '3 h 20 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def in_words(value: Any) -> str:
    """A value of a config or a record as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
