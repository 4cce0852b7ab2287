"""Callback: something that happens at the start, after steps, or at the end of a run. All hooks default to nothing."""

from collections.abc import Sequence

from ..configs.choices import Kind, find_class
from ..configs.errors import UserError
from ..configs.schema import CallbackSection, OwnCallback
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


def own_callbacks(sections: Sequence[OwnCallback], base: type[Kind], setting: str) -> list[Kind]:
    """Callbacks that a config names. UserError for what cannot be imported, is none, or cannot be made."""
    made = []
    for number, given in enumerate(sections):
        section = CallbackSection(use=given) if isinstance(given, str) else given
        kind = find_class(section.use, base, f"{setting}.{number}:")
        try:
            made.append(kind(**section.options))
        except (TypeError, ValueError) as error:
            raise UserError(f"{setting}.{number}: {section.use} does not take its options ({error})") from error
    return made
