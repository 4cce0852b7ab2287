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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import trange

from ..adapters.format import read
from ..configs.arguments import positive
from ..configs.command import run_command
from ..configs.dtypes import DTYPES
from ..configs.machine import cores
from ..configs.schema import ModelSection
from ..inference.adapter_file import names_of
from ..inference.merged import MergedBase
from ..train.measure import PARTS
from .arithmetic import matrix_rate, step_flops
from .contestants import bare, diffusers_example, kohya, loraloom
from .machine import machine_line
from .speed_table import (
    AGAIN,
    BARE,
    FIGURES,
    PAGE,
    Measured,
    Result,
    is_even,
    table,
    trains_otherwise,
    write_docs,
    write_figures,
)
from .turns import Contestant, Turn, Whole, middle, ratio, take_turns, whole
from .work import Prepared, Work, prepare

SUITE = (
    Work("pocket", 64, 1, "fp32", threads=1),
    Work("pocket", 64, 4, "fp32", threads=1),
    Work("sd1", 128, 1, "fp32", threads=2),
    Work("sd1", 128, 1, "bf16", threads=2),
    Work("sdxl", 256, 4, "bf16", threads=2, steps=3),
)
GPU_SUITE = tuple(
    work
    for batch in (1, 4)
    for work in (Work("sd1", 512, batch, "bf16", cores()), Work("sdxl", 1024, batch, "bf16", cores()))
)
ENDLESS, FEW = 1_000_000, 3  # steps


def main(arguments: Sequence[str]) -> int:
    """Prints a table for each work; 1 where a variant of loraloom trains something else than the bare loop."""
    options = _parser().parse_args(list(arguments))
    found = []
    for work in works_of(options):
        measured = measure(work, options)
        print(table(measured), flush=True)
        found.append(measured)
        if options.json:
            write_figures(options.json, found)
        if options.docs:
            write_docs([measured])
    return int(any(trains_otherwise(each.work, result) for each in found for result in each.results))


def works_of(options: argparse.Namespace) -> Sequence[Work]:
    """The suite, or what the other options say."""
    if options.suite:
        return GPU_SUITE if torch.cuda.is_available() else SUITE
    resolution = options.resolution or (64 if options.model == "pocket" else 128)
    threads = options.threads or (1 if options.model == "pocket" else cores())
    own = (options.dtype, threads, options.rank, options.steps)
    return [Work(options.model, resolution, batch, *own) for batch in options.batch]


def measure(work: Work, options: argparse.Namespace) -> Measured:
    """Each contestant alone from start to exit, then all in turn, and again from start to exit, but shortly.

    All are started anew, for more turns, where the two bare loops were not alike.
    """
    print(f"\n{work}", file=sys.stderr)
    prepared = prepare(work, Path(options.work).resolve())
    alone = {each.name: whole(each, steps) for each, steps in contestants(prepared, options, work.steps)}
    in_turn = prepared.in_turn()
    endless = [each for each, _ in contestants(in_turn, options, ENDLESS)]
    turns = take_turns(endless, options.rounds, lambda turns: is_even(ratio(turns[AGAIN], turns[BARE])))
    short: dict[str, list[Whole]] = {name: [] for name in alone}
    for _ in trange(options.starts, desc="from start to exit", unit="round"):
        for each, steps in contestants(in_turn, options, FEW):
            short[each.name].append(whole(each, steps))
    reference = losses_of(prepared, BARE)
    results = [_result(prepared, name, turns, alone[name], short[name], reference) for name in turns]
    even = ratio(turns[AGAIN], turns[BARE])
    rate = matrix_rate(work.dtype, work.threads)
    return Measured(work, results, step_flops(prepared), rate, even, machine_line())


def contestants(prepared: Prepared, options: argparse.Namespace, steps: int) -> list[tuple[Contestant, int]]:
    """All that take part, and how many steps each trains; peers no more than FEW where it has an end."""
    few = steps if steps == ENDLESS else FEW
    ours = options.variants or loraloom.USUAL[prepared.work.model]
    found = [(bare.contestant(prepared, BARE, steps), steps)]
    found += [(loraloom.contestant(prepared, name, steps), steps) for name in ours]
    peers = [(diffusers_example, options.diffusers_example, options.diffusers_python)]
    peers += [(kohya, options.kohya, options.kohya_python)]
    for peer, place, python in peers:
        if place is not None and prepared.work.model in peer.MODELS:
            found.append((peer.contestant(prepared, place, python, few), few))
    return [*found, (bare.contestant(prepared, AGAIN, steps), steps)]


def _result(
    prepared: Prepared,
    name: str,
    all_turns: Mapping[str, Sequence[Turn]],
    alone: Whole,
    short: Sequence[Whole],
    reference: Sequence[float],
) -> Result:
    turns = all_turns[name]
    medians = [middle([turn]) for turn in turns]
    own = losses_of(prepared, name)
    apart = [abs(one - other) / other for one, other in zip(own, reference, strict=True)] if own else None
    return Result(
        name,
        seconds=middle(turns),
        ratio=ratio(turns, all_turns[BARE], all_turns[AGAIN]),
        turns=(min(medians), max(medians)),
        others=max(turn.others for turn in turns),
        to_first_step=statistics.median(each.to_first_step for each in short),
        after_last_step=statistics.median(each.after_last_step for each in short),
        peak=alone.peak.get("device", alone.peak["process"]),
        modules=modules_of(prepared, name),
        losses_off=max(apart) if apart else None,
        overhead=overhead_of(prepared, name),
    )


def losses_of(prepared: Prepared, name: str) -> list[float]:
    """Of all steps of the run that a contestant made alone; none of a peer."""
    run = prepared.run(name)
    if (file := run / "losses.json").is_file():
        return json.loads(file.read_text())
    history = run / "logs" / "history.jsonl"
    return [json.loads(line)["loss"] for line in history.read_text().splitlines()] if history.is_file() else []


def overhead_of(prepared: Prepared, name: str) -> float | None:
    """Share of the steps in which neither denoiser nor optimiser worked; the checkpoint at the end is left out."""
    if not (file := prepared.run(name) / "run.json").is_file():
        return None
    facts = json.loads(file.read_text())
    seconds_of = facts["seconds_of"]
    worked = sum(seconds_of[part] for part in ("forward", "backward", "optimiser"))
    callbacks = sum(seconds for part, seconds in seconds_of.items() if part not in (*PARTS, "Checkpoints"))
    return 1 - worked / (facts["train_seconds"] + callbacks)


def modules_of(prepared: Prepared, name: str) -> int:
    """How many modules the adapter has that a contestant wrote; all must have those of the bare loop."""
    model = prepared.work.model
    names = MergedBase(ModelSection(base=model)).names if model == "pocket" else names_of(model)
    files = [next(prepared.run(each).glob("*.safetensors")) for each in (name, BARE)]
    found, wanted = ({*read(file, names).modules} for file in files)
    if found != wanted:
        print(f"warning: {name} adapts other modules: {len(found)}, not {len(wanted)}", file=sys.stderr)
    return len(found)


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
    add("--rounds", type=positive, default=20, help="turns of each (20; again, all started anew, if bare is uneven)")
    add("--starts", type=positive, default=3, help="times that each is run from start to exit (3)")
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
