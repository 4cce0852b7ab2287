"""What the files of a run say, as values: for its report, the list of runs, and their comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..configs.words import counted
from .footprint import LOCK
from .pages.words import in_words, number
from .run_folder import RunFiles, is_locked


@dataclass(frozen=True, slots=True)
class Mean:
    """Of the loss over the last steps."""

    loss: float
    steps: int

    def words(self) -> str:
        """'0.0312 · mean of 30 steps'."""
        return f"{number(self.loss)} · mean of {counted(self.steps, 'step')}"


@dataclass(frozen=True, slots=True)
class Measured:
    """The held-out loss of one validation."""

    step: int
    loss: float

    def words(self) -> str:
        """'0.0312 at step 200'."""
        return f"{number(self.loss)} at step {self.step:,}"


def at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path such as `adapter.rank`; None if the config has no such place."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def state_of(run: RunFiles) -> str:
    """As run.json says; whoever holds the lock is running, and who says so without holding it was killed."""
    said, locked = run.record.get("state"), is_locked(run.folder)
    if locked:
        return "running"
    if said is None:
        return "killed" if (run.folder / LOCK).exists() else "not started"
    return "killed" if said == "running" and locked is False else said


def method_of(run: RunFiles) -> list[str]:
    """The method, with rank and alpha where it has them: as the run said, or as its config does before it began."""
    method, rank, alpha = (at(run.config, f"adapter.{key}") for key in ("method", "rank", "alpha"))
    asked = [method, rank and f"rank {rank}", alpha and f"alpha {in_words(alpha)}"]
    return [in_words(word) for word in run.record.get("adapter") or asked if word]


def step_of(run: RunFiles) -> int | None:
    """Steps done: where run.json was written for the last time, or further if the history is."""
    steps = [run.record.get("step"), *(entry["step"] for entry in run.history[-1:] if _is_behind(run))]
    return max((step for step in steps if step is not None), default=None)


def steps_of(run: RunFiles) -> int | None:
    """Steps in all."""
    steps = run.record.get("steps", at(run.config, "loop.steps"))
    return steps if isinstance(steps, int) else None


def seconds_of(run: RunFiles) -> float | None:
    """Time in training steps, over all parts of a run that was resumed."""
    known, step = run.record.get("train_seconds"), run.record.get("step") or 0
    later = [entry.get("seconds") or 0.0 for entry in run.history if entry["step"] > step and _is_behind(run)]
    return (known or 0.0) + sum(later) if later else known


def _is_behind(run: RunFiles) -> bool:
    """Whether run.json is as old as the start of the run; it is written again at the end."""
    return run.record.get("state") in (None, "running")


def trigger_words(config: Mapping[str, Any]) -> str | None:
    """The words that call what was learnt; the caption of all images where no word was named."""
    sources = [source for source in at(config, "data.sources") or [] if "prior" not in source]
    rules = [source.get("captions") or at(config, "data.captions") or {} for source in sources]
    words = [token["token"] for token in at(config, "adapter.tokens") or []]
    words += [rule["trigger"] for rule in rules if rule.get("trigger")]
    words = words or [source["caption"] for source in sources if source.get("caption")]
    return ", ".join(dict.fromkeys(words)) or None


def final_loss(run: RunFiles) -> Mean | None:
    """Mean over the last tenth of the run: single steps say little, their noise levels differ."""
    losses = [float(entry["loss"]) for entry in run.history if entry.get("loss") is not None]
    last = losses[-max(1, len(losses) // 10) :]
    return Mean(sum(last) / len(last), len(last)) if last else None


def held_out_losses(run: RunFiles) -> list[Measured]:
    """One for each validation with held-out images, rising steps."""
    known = [entry for entry in run.held_out if entry.get("held_out") is not None]
    return [Measured(entry["step"], float(entry["held_out"])) for entry in known]


def best_held_out(run: RunFiles) -> Measured | None:
    """The first of the lowest."""
    return min(held_out_losses(run), key=lambda found: found.loss, default=None)
