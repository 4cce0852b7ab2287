"""Seconds of a training step beside a bare hand-written loop and, where they are given, the peers:

    python -m loraloom.benchmarks.speed                                       pocket, in a few minutes
    python -m loraloom.benchmarks.speed --suite --docs                        all that docs/benchmarks.md shows
    python -m loraloom.benchmarks.speed --model sd1 --resolution 128 --dtype bf16

Every contestant is a whole program in a process of its own. They train the same adapter on the same base and images
and take turns of a few steps, so that what else the machine does falls on all; the bare loop takes part twice.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..adapters.format import read
from ..configs.arguments import positive
from ..configs.dtypes import DTYPES
from ..configs.errors import run_command
from ..configs.files import replace_file
from ..configs.machine import cores
from ..configs.marked import fill_marked
from ..configs.schema import ModelSection
from ..inference.adapter_file import names_of
from ..inference.merged import MergedBase
from .arithmetic import matrix_rate, step_flops
from .contestants import bare, diffusers_example, kohya, loraloom
from .machine import machine, machine_line
from .turns import Contestant, Turn, Whole, middle, take_turns, whole
from .work import Prepared, Work, prepare

SUITE = (
    Work("pocket", 64, 1, "fp32", threads=1),
    Work("pocket", 64, 4, "fp32", threads=1),
    Work("sd1", 128, 1, "fp32", threads=2),
    Work("sd1", 128, 1, "bf16", threads=2),
)
GPU_SUITE = tuple(
    work
    for batch in (1, 4)
    for work in (Work("sd1", 512, batch, "bf16", cores()), Work("sdxl", 1024, batch, "bf16", cores()))
)
PAGE, FIGURES = Path("docs/benchmarks.md"), Path("docs/speed.json")
BARE, AGAIN = "bare", "bare, again"
EVEN = 0.02
"""How far bare may be from bare: what is measured beside a wider gap does not count."""
NEAR = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}
"""Rounding: how far, relatively, the loss of any step may be from the bare loop's."""
COLUMNS = (
    *("contestant", "step, ms", "ratio to bare", "turns, ms", "images/s", "of matrix rate"),
    *("start to first step, s", "last step to exit, s", "peak, MiB", "ratio to bare", "loss off by", "modules"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One contestant in one work."""

    name: str
    seconds: float  # median of a step
    turns: tuple[float, float]  # medians of the fastest and of the slowest turn
    others: float  # most that other programs took of the processors in a turn
    to_first_step: float
    after_last_step: float
    peak: int  # bytes, of the GPU where there is one
    modules: int  # that its adapter has
    losses_off: float | None  # largest relative difference to the bare loop's; None for peers, who draw otherwise


@dataclass(frozen=True, slots=True)
class Measured:
    """All contestants in one work."""

    work: Work
    results: Sequence[Result]
    flops: int  # of a step of the bare loop
    matrix_rate: float  # operations a second in products of large matrices, in this work's type

    def named(self, name: str) -> Result:
        """The result of one contestant."""
        return next(result for result in self.results if result.name == name)

    def ratio(self, result: Result) -> float:
        """Of its step to that of the bare loop, both times taken together."""
        return result.seconds / statistics.mean(self.named(name).seconds for name in (BARE, AGAIN))

    def utilisation(self, result: Result) -> float:
        """Of what the device can, by the bare loop's arithmetic (PaLM, Chowdhery et al. 2022, appendix B)."""
        return self.flops / result.seconds / self.matrix_rate

    @property
    def is_even(self) -> bool:
        """Whether the machine was quiet enough: bare took as long as bare."""
        return abs(self.named(AGAIN).seconds / self.named(BARE).seconds - 1) <= EVEN


def main(arguments: Sequence[str]) -> int:
    """Prints a table for each work; 1 where a variant of loraloom trains something else than the bare loop."""
    options = _parser().parse_args(list(arguments))
    found = []
    for work in works_of(options):
        measured = measure(work, options)
        print(table(measured), flush=True)
        found.append(measured)
    figures = {"machine": machine(), "works": [asdict(each) for each in found]}
    if options.json:
        replace_file(options.json, json.dumps(figures, indent=1) + "\n")
    if options.docs:
        replace_file(FIGURES, json.dumps(figures, indent=1) + "\n")
        page = "\n".join([f"{machine_line()}\n", *map(table, found)])
        replace_file(PAGE, fill_marked(PAGE.read_text(), "speed", page))
    return int(any(_trains_otherwise(each.work, result) for each in found for result in each.results))


def works_of(options: argparse.Namespace) -> Sequence[Work]:
    """The suite, or what the other options say."""
    if options.suite:
        return GPU_SUITE if torch.cuda.is_available() else SUITE
    resolution = options.resolution or (64 if options.model == "pocket" else 128)
    threads = options.threads or (1 if options.model == "pocket" else cores())
    own = (options.dtype, threads, options.rank, options.steps)
    return [Work(options.model, resolution, batch, *own) for batch in options.batch]


def measure(work: Work, options: argparse.Namespace) -> Measured:
    """Each contestant alone from start to exit, then all in turn."""
    print(f"\n{work}", file=sys.stderr)
    prepared = prepare(work, Path(options.work).resolve())
    wholes = {each.name: whole(each, steps) for each, steps in contestants(prepared, options)}
    endless = [each for each, _ in contestants(prepared.in_turn(), options, endless=True)]
    turns = take_turns(endless, options.rounds)
    reference = losses_of(prepared, BARE)
    results = [_result(prepared, name, turns[name], wholes[name], reference) for name in turns]
    return Measured(work, results, step_flops(prepared), matrix_rate(work.dtype, work.threads))


def contestants(prepared: Prepared, options: argparse.Namespace, endless: bool = False) -> list[tuple[Contestant, int]]:
    """All that take part, and how many steps they train when they run alone."""
    alone = prepared.work.steps
    few, many = (1_000_000, 1_000_000) if endless else (3, alone)
    ours = options.variants or loraloom.USUAL[prepared.work.model]
    found = [(bare.contestant(prepared, BARE, many), alone)]
    found += [(loraloom.contestant(prepared, name, many), alone) for name in ours]
    peers = [(diffusers_example, options.diffusers_example, options.diffusers_python)]
    peers += [(kohya, options.kohya, options.kohya_python)]
    for peer, place, python in peers:
        if place is not None and prepared.work.model in peer.MODELS:
            found.append((peer.contestant(prepared, place, python, few), few))
    return [*found, (bare.contestant(prepared, AGAIN, many), alone)]


def _result(prepared: Prepared, name: str, turns: Sequence[Turn], alone: Whole, reference: Sequence[float]) -> Result:
    medians = [statistics.median(turn.seconds) for turn in turns]
    own = losses_of(prepared, name)
    apart = [abs(one - other) / other for one, other in zip(own, reference, strict=True)] if own else None
    return Result(
        name,
        seconds=middle(turns),
        turns=(min(medians), max(medians)),
        others=max(turn.others for turn in turns),
        to_first_step=alone.to_first_step,
        after_last_step=alone.after_last_step,
        peak=alone.peak.get("device", alone.peak["process"]),
        modules=modules_of(prepared, name),
        losses_off=max(apart) if apart else None,
    )


def losses_of(prepared: Prepared, name: str) -> list[float]:
    """Of all steps of the run that a contestant made alone; none of a peer."""
    run = prepared.run(name)
    if (file := run / "losses.json").is_file():
        return json.loads(file.read_text())
    history = run / "logs" / "history.jsonl"
    return [json.loads(line)["loss"] for line in history.read_text().splitlines()] if history.is_file() else []


def modules_of(prepared: Prepared, name: str) -> int:
    """How many modules the adapter has that a contestant wrote; all must have those of the bare loop."""
    model = prepared.work.model
    names = MergedBase(ModelSection(base=model)).names if model == "pocket" else names_of(model)
    files = [next(prepared.run(each).glob("*.safetensors")) for each in (name, BARE)]
    found, wanted = ({*read(file, names).modules} for file in files)
    if found != wanted:
        print(f"warning: {name} adapts other modules: {len(found)}, not {len(wanted)}", file=sys.stderr)
    return len(found)


def _trains_otherwise(work: Work, result: Result) -> bool:
    return result.losses_off is not None and not result.losses_off <= NEAR[work.dtype]


def table(measured: Measured) -> str:
    """Markdown."""
    lines = [f"**{measured.work}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_row(measured, result))} |" for result in measured.results]
    even = measured.named(AGAIN).seconds / measured.named(BARE).seconds
    verdict = "counts" if measured.is_even else "does not count"
    others = max(result.others for result in measured.results)
    lines += ["", f"bare to bare {even:.3f}: {verdict}; other programs took at most {others:.0%} in a turn."]
    rate, giga = measured.matrix_rate, 1e9
    lines += [f"A step of bare is {measured.flops / giga:.1f} GFLOP; matrices: {rate / giga:.0f} GFLOP/s.", ""]
    return "\n".join(lines)


def _row(measured: Measured, result: Result) -> list[str]:
    reference, milli, mebi = measured.named(BARE), 1e3, 2**20
    off = "" if result.losses_off is None else f"{result.losses_off:.1e}"
    if _trains_otherwise(measured.work, result):
        off += ", not counted"
    return [
        result.name,
        f"{result.seconds * milli:.1f}",
        f"{measured.ratio(result):.2f}",
        f"{result.turns[0] * milli:.1f} .. {result.turns[1] * milli:.1f}",
        f"{measured.work.batch / result.seconds:.2f}",
        f"{measured.utilisation(result):.0%}",
        f"{result.to_first_step:.1f}",
        f"{result.after_last_step:.1f}",
        f"{result.peak / mebi:.0f}",
        f"{result.peak / reference.peak:.2f}",
        off,
        f"{result.modules}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loraloom.benchmarks.speed",
        description="Measure the step of loraloom beside a bare hand-written loop, in turn.",
        epilog="Peers run as they are, each in an environment of its own: see docs/benchmarks.md for how to make one.",
    )
    add = parser.add_argument
    add("--suite", action="store_true", help="all works of docs/benchmarks.md, instead of one")
    add("--model", choices=("pocket", "sd1", "sdxl"), default="pocket", help="sd1, sdxl: real shapes, random weights")
    add("--resolution", type=positive, help="pixels (64 for pocket, else 128)")
    add("--batch", type=positive, nargs="+", default=[1, 4], help="samples of a step (1 and then 4)")
    add("--dtype", choices=DTYPES, default="fp32", help="type of the frozen weights (fp32)")
    add("--threads", type=positive, help="of each contestant (1 for pocket, else all cores)")
    add("--rank", type=positive, default=4, help="of the LoRA (4)")
    add("--rounds", type=positive, default=6, help="turns of each contestant (6)")
    add("--steps", type=positive, default=50, help="of a run that is made alone, and whose losses are compared (50)")
    add("--variants", nargs="+", choices=[*loraloom.VARIANTS], help="of loraloom (compiled only for pocket)")
    add("--diffusers-example", type=Path, metavar="FILE", help="train_dreambooth_lora.py of diffusers")
    add("--diffusers-python", type=Path, metavar="FILE", help="interpreter of the environment that it runs in")
    add("--kohya", type=Path, metavar="FOLDER", help="checkout of sd-scripts")
    add("--kohya-python", type=Path, metavar="FILE", help="interpreter of the environment that it runs in")
    add("--work", default="runs/speed", help="folder for bases, caches and runs (runs/speed)")
    add("--json", type=Path, help="file for all figures")
    add("--docs", action="store_true", help=f"write {PAGE} and {FIGURES}")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
