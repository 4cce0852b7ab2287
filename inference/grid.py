"""loraloom grid: the same picture under everything that may change, side by side with labels."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..configs.errors import UserError, run_command
from .__main__ import writable
from .pictures.arguments import add_request, given, use_threads

EPILOG = """\
axes: checkpoint, weight, prompt, negative_prompt, seed, scheduler, guidance, guidance_until, steps
  weight and checkpoint may name their adapter, by the name of its file or its number: weight:sks, weight:2
  a run folder as a checkpoint stands for all of its checkpoints
  --x and --y may be given again: every combination gets a column, or a row

examples:
  loraloom grid --adapter runs/demo/sks.safetensors --prompt "a sks creature" --x weight 0 0.5 1 --y seed 0 1 2
  loraloom grid --x checkpoint runs/demo --y prompt "a sks creature" "a creature" --seed 3
  loraloom grid --adapter a.safetensors --adapter b.safetensors --prompt "..." --x weight:a 0 0.5 1 --y weight:b 0 0.5 1
"""


def main(arguments: Sequence[str]) -> int:
    """Makes the cells and the one picture, and says where they are; the same command goes on where it stopped."""
    options = _parser().parse_args(list(arguments))
    folder = writable(options.out)

    from .pictures.axes import axis_of, cells, lines
    from .pictures.batch import make, pictures_of, process, wait_for_all, work_of
    from .pictures.labelled import labelled
    from .pictures.request import PictureRequest, missing_files, validated
    from .pictures.sampler import Sampler

    columns, rows = (lines([axis_of(words) for words in axes]) for axes in (options.x, options.y))
    common = {"prompt": options.prompt, "micro_batch": 1} | given(options)  # one cell is one picture
    asked = list(cells({key: value for key, value in common.items() if value is not None}, columns, rows))
    requests = [validated(PictureRequest, each, "cell") for each in asked]
    if problems := missing_files(requests):
        raise UserError(problems)
    use_threads(options.threads)
    rank, processes = process()
    sampler = Sampler(options.device)
    work = work_of(requests, sampler, folder / "cells")
    (folder / "cells").mkdir(exist_ok=True)
    try:
        make(work, sampler, "grid", rank, processes)
    except KeyboardInterrupt:
        print(f"what is done is in {folder}; the same command goes on from there", file=sys.stderr)
        raise
    if processes > 1:
        wait_for_all(options.device)
    if rank == 0:
        labels = [line.label for line in columns], [line.label for line in rows]
        page = labelled([*pictures_of(work)], *labels, title=options.title or "", note=_note(requests))
        page.save(folder / "grid.png")
        print(f"{len(requests)} cells in {folder / 'cells'}, all on {folder / 'grid.png'}")
    return 0


def _note(requests: Sequence[Any]) -> str:
    """What all cells have in common, of what decides a picture."""
    names = ("base", "prompt", "seed", "steps", "guidance", "scheduler")
    common = {name: {getattr(request, name) for request in requests} for name in names}
    return ", ".join(f"{name} {next(iter(found))}" for name, found in common.items() if len(found) == 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraloom grid",
        description="Compare pictures along axes: one labelled picture, and every cell as a PNG with its request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = {"nargs": "+", "action": "append", "default": []}
    parser.add_argument("--x", metavar=("AXIS", "VALUE"), help="from left to right", **words)
    parser.add_argument("--y", metavar=("AXIS", "VALUE"), help="from top to bottom", **words)
    parser.add_argument("--prompt", help="of all cells, where no axis is the prompt")
    add_request(parser)
    parser.add_argument("--title", help="written above the picture")
    parser.add_argument("--out", default="runs/grid", help="folder for the picture and the cells (runs/grid)")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
