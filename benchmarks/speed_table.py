"""What `speed.py` measures, as tables of docs/benchmarks.md and figures of docs/speed.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..configs.files import replace_file
from ..configs.marked import fill_marked
from .work import Work

PAGE, FIGURES = Path("docs/benchmarks.md"), Path("docs/speed.json")
BARE, AGAIN = "bare", "bare, again"
EVEN = 0.02
"""How far bare may be from bare: what is measured beside a wider gap does not count."""
NEAR = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}
"""Rounding: how far, relatively, the loss of any step may be from the bare loop's."""
COLUMNS = (
    *("contestant", "step, ms", "ratio to bare", "turns, ms", "images/s", "of matrix rate"),
    *(
        "start to first step, s",
        "last step to exit, s",
        "peak, MiB",
        "ratio to bare",
        "loss off by",
        "modules",
        "overhead",
    ),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One contestant in one work."""

    name: str
    seconds: float  # median of a step
    ratio: float  # of a step to bare's, both of them, in the same round: the median over the rounds
    turns: tuple[float, float]  # medians of the fastest and of the slowest turn
    others: float  # most that other programs took of the processors in a turn
    to_first_step: float
    after_last_step: float
    peak: int  # bytes, of the GPU where there is one
    modules: int  # that its adapter has
    losses_off: float | None  # largest relative difference to the bare loop's; None for peers, who draw otherwise
    overhead: float | None  # share of a step that is neither the denoiser's nor the optimiser's; of loraloom


@dataclass(frozen=True, slots=True)
class Measured:
    """All contestants in one work."""

    work: Work
    results: Sequence[Result]
    flops: int  # of a step of the bare loop
    matrix_rate: float  # operations a second in products of large matrices, in this work's type
    even: float  # ratio of bare to bare, as all others
    machine: str  # a line

    def named(self, name: str) -> Result:
        """The result of one contestant."""
        return next(result for result in self.results if result.name == name)

    def utilisation(self, result: Result) -> float:
        """Of what the device can, by the bare loop's arithmetic (PaLM, Chowdhery et al. 2022, appendix B)."""
        return self.flops / result.seconds / self.matrix_rate


def is_even(ratio: float) -> bool:
    """Whether the machine was quiet enough: bare took as long as bare."""
    return abs(ratio - 1) <= EVEN


def trains_otherwise(work: Work, result: Result) -> bool:
    """Whether the losses of a variant are further from the bare loop's than rounding."""
    return result.losses_off is not None and not result.losses_off <= NEAR[work.dtype]


def table(measured: Measured) -> str:
    """Markdown."""
    lines = [f"**{measured.work}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_row(measured, result))} |" for result in measured.results]
    verdict = "counts" if is_even(measured.even) else "does not count"
    others = max(result.others for result in measured.results)
    lines += ["", f"bare to bare {measured.even:.3f}: {verdict}; other programs took at most {others:.0%} in a turn."]
    rate, giga = measured.matrix_rate, 1e9
    lines += [f"A step of bare is {measured.flops / giga:.1f} GFLOP; matrices: {rate / giga:.0f} GFLOP/s."]
    lines += [f"Machine: {measured.machine}.", ""]
    return "\n".join(lines)


def _row(measured: Measured, result: Result) -> list[str]:
    reference, milli, mebi = measured.named(BARE), 1e3, 2**20
    off = "" if result.losses_off is None else f"{result.losses_off:.1e}"
    if trains_otherwise(measured.work, result):
        off += ", not counted"
    return [
        result.name,
        f"{result.seconds * milli:.1f}",
        f"{result.ratio:.2f}",
        f"{result.turns[0] * milli:.1f} .. {result.turns[1] * milli:.1f}",
        f"{measured.work.batch / result.seconds:.2f}",
        f"{measured.utilisation(result):.0%}",
        f"{result.to_first_step:.1f}",
        f"{result.after_last_step:.1f}",
        f"{result.peak / mebi:.0f}",
        f"{result.peak / reference.peak:.2f}",
        off,
        f"{result.modules}",
        "" if result.overhead is None else f"{result.overhead:.1%}",
    ]


def write_docs(found: Sequence[Measured]) -> None:
    """Adds works to the page and to its figures, or puts them in the place of the same works measured before."""
    kept = {str(each.work): each for each in (*_stored(), *found)}
    write_figures(FIGURES, [*kept.values()])
    replace_file(PAGE, fill_marked(PAGE.read_text(), "speed", "\n".join(map(table, kept.values()))))


def write_figures(file: Path, found: Sequence[Measured]) -> None:
    """JSON: all that was measured."""
    replace_file(file, json.dumps({"works": [asdict(each) for each in found]}, indent=1) + "\n")


def _stored() -> list[Measured]:
    stored = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"works": []}
    return [
        Measured(**each | {"work": Work(**each["work"]), "results": [Result(**result) for result in each["results"]]})
        for each in stored["works"]
    ]
