"""loraloom grid: the same picture under everything that may change, side by side with labels."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.arguments import Parser, path_text
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.imports import importing
from ..configs.processes import joined
from ..configs.words import counted
from .pictures.arguments import add_request, given, use_threads, writable

if TYPE_CHECKING:
    from .pictures.axes import Axis

OUT = "folder for the picture and the cells; without it runs/grid, behind those that are there"
EPILOG = """\
axes: checkpoint, weight, prompt, negative_prompt, seed, scheduler, guidance, guidance_until, steps
  weight and checkpoint may name their adapter, by the name of its file or its number: weight:sks, weight:2
  a run folder as a checkpoint stands for all of its checkpoints
  --x and --y may be given again: every combination gets a column, or a row

examples:
  loraloom grid --adapter runs/demo/sks.safetensors --prompt "a sks creature" --x weight 0 0.5 1 --y seed 0 1 2
  loraloom grid --x checkpoint runs/demo --y prompt "a sks creature" "a creature" --seed 3
  loraloom grid --adapter a.safetensors --adapter b.safetensors --prompt "..." --x weight:a 0 0.5 1 --y weight:b 0 0.5 1
  loraloom grid grid.yaml

grid.yaml:
  prompt: "a sks creature"
  adapters: [{file: a.safetensors}, {file: b.safetensors}]
  x: {"weight:a": [0, 0.5, 1]}
  y: {"weight:b": [0, 0.5, 1], seed: [0, 1]}
"""


def main(arguments: Sequence[str]) -> int:
    """Makes the cells and the one picture, and says where they are; the same command goes on where it stopped."""
    with joined():
        return _make(_parser().parse_args(list(arguments)))


def _make(options: argparse.Namespace) -> int:
    from .pictures.axes import cells, lines
    from .pictures.prompts import advise, with_named_adapters
    from .pictures.request import PictureRequest, missing_files, validated

    request, across, down = _asked(options)
    columns, rows = lines(across), lines(down)
    name = options.file or "command line"
    asked = list(cells(request, columns, rows))
    if any("prompt" not in each for each in asked):
        raise UserError(f'{name}: prompt: is missing; give --prompt "a dog", or an axis: --y prompt "a dog" "a cat"')
    requests = [validated(PictureRequest, each, name) for each in asked]
    requests = with_named_adapters(requests, options.adapter_folder)
    advise(requests)
    if any(request.num_images != 1 for request in requests):
        raise UserError(f"{name}: num_images: a cell is one picture; make `seed` an axis for more")
    if problems := missing_files(requests):
        raise UserError(problems)
    folder = writable(options.out or "runs/grid")
    with importing():  # all that can be known to be wrong without torch is known
        from .pictures.batch import announce, behind, check_sheet, make_together, sheet_of, work_of
        from .pictures.sampler import Sampler

    use_threads(requests[0].threads)
    sampler = Sampler()
    work = work_of(requests, sampler, folder / "cells")
    if options.out is None and not options.overwrite:
        work = behind(work, sampler)
    check_sheet(folder / sheet_of(work), "grid", options.overwrite)
    (folder / "cells").mkdir(exist_ok=True)
    announce(sampler.words(requests))
    if make_together(work, sampler, "grid", options.overwrite).is_main:
        sheet = folder / sheet_of(work)
        _draw(work, columns, rows, options.title or "", _note(requests), sheet, options.overwrite)
        print(f"{counted(len(requests), 'cell')} in {folder / 'cells'}, all on {sheet}")
    return 0


def _asked(options: argparse.Namespace) -> "tuple[dict[str, Any], list[Axis], list[Axis]]":
    """What all cells have in common, and the axes: of the file, and of the command line, which holds over it."""
    from ..configs.document import read_document
    from .pictures.axes import axes_in, axis_of

    values: dict[str, Any] = {"micro_batch": 1}  # one cell is one picture
    across, down = [], []
    if options.file is not None:
        document = read_document(Path(options.file))
        if document.problems:
            raise UserError(document.problems)
        values |= document.values
        across, down = (axes_in(values.pop(name, {}), f"{options.file}: {name}") for name in ("x", "y"))
    if options.prompt is not None:
        values["prompt"] = options.prompt
    across = [axis_of(words) for words in options.x] or across
    down = [axis_of(words) for words in options.y] or down
    return values | given(options), across, down


def _draw(work: Any, columns: Any, rows: Any, title: str, note: str, file: Path, overwrite: bool) -> None:
    from .pictures.batch import pictures_of
    from .pictures.labelled import labelled
    from .pictures.png import SHEET, save_png

    labels = [line.label for line in columns], [line.label for line in rows]
    drawn = labelled([*pictures_of(work)], *labels, title=title, note=note)
    save_png(drawn, file, by="grid", over=overwrite, marks={SHEET: "grid"})


def _note(requests: Sequence[Any]) -> str:
    """What all cells have in common, of what decides a picture."""
    names = ("base", "prompt", "seed", "steps", "guidance", "scheduler")
    common = {name: {getattr(request, name) for request in requests} for name in names}
    return ", ".join(f"{name} {next(iter(found))}" for name, found in common.items() if len(found) == 1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom grid",
        description="Compare pictures along axes: one labelled picture, and every cell as a PNG with its request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = {"nargs": "+", "action": "append", "default": []}
    parser.add_argument(
        "file", type=path_text, nargs="?", metavar="GRID.yaml", help="axes x and y, and what all cells have in common"
    )
    parser.add_argument("--x", metavar=("AXIS", "VALUE"), help="from left to right", **words)
    parser.add_argument("--y", metavar=("AXIS", "VALUE"), help="from top to bottom", **words)
    parser.add_argument("--prompt", help="of all cells, where no axis is the prompt")
    add_request(parser)
    parser.add_argument("--title", help="written above the picture")
    parser.add_argument("--out", type=path_text, help=OUT)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
