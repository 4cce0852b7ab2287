"""loraloom runs: the runs of some folders in a table, or what is different between some of them."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ..configs.arguments import Parser, path_text
from ..configs.command import run_command
from ..configs.errors import UserError
from ..configs.ownership import check_file
from ..configs.plain import plain
from .facts import (
    Measured,
    at,
    best_held_out,
    final_loss,
    held_out_losses,
    method_of,
    seconds_of,
    state_of,
    step_of,
    steps_of,
)
from .pages.words import aligned, duration, number, shortened
from .run_folder import RunFiles, checkpoints, is_run_folder, read_run

DEPTH = 3  # folders below those that are named
WIDEST = 32  # characters of a base's name
COMPARISON = "runs"
"""What wrote a page, in the record of its folder."""
HEAD = ("run", "state", "step", "base", "adapter", "loss", "best held-out loss", "time", "started")
SIDES = "<<><<>>><"
HELP = """\
List runs, the newest first: how far each came, its loss at the end (mean of the last tenth), and
the best loss on held-out images where it has some. With --compare, show what is different between
runs, and write one page with their curves and validation images side by side."""
EXAMPLES = """\
A run that says it is running although no process holds its folder was "killed"; loraloom resume
goes on with it. Folders whose files are damaged are listed with the reason.

examples:
  loraloom runs                                   all runs in runs/
  loraloom runs experiments old/runs --json       of two folders, for programs
  loraloom runs --compare runs/rank-4 runs/rank-16 --out ranks.html

The comparison prints what is not the same, such as

  differences     rank-4       rank-16
  adapter.rank    4            16
  output.dir      runs/rank-4  runs/rank-16

with `-` where a config has no such key, and then how each run ended."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of the table; None is what is not known."""

    run: str  # path
    state: str  # that of run.json, or "running", "killed", "not started", "damaged"
    resumable: bool = False  # whether it is not done and has a checkpoint
    step: int | None = None
    steps: int | None = None
    base: str | None = None
    adapter: Sequence[str] = ()  # method, rank and alpha
    loss: float | None = None  # mean of the last tenth
    held_out: Measured | None = None  # the best
    last_held_out: Measured | None = None
    seconds: float | None = None
    started: str | None = None  # the last time
    problem: str | None = None  # what is damaged


def main(arguments: Sequence[str]) -> int:
    """Prints the table, or the differences."""
    options = _parser().parse_intermixed_args(list(arguments))
    if options.compare:
        return _compare([Path(folder) for folder in options.folders], Path(options.out or "compare.html"), options.json)
    if options.out:
        raise UserError("--out is where --compare writes its page; the table is printed")
    found = list_runs(find_runs(Path(folder) for folder in options.folders or ["runs"]))
    if options.json:
        print(json.dumps([asdict(listed) for listed in found], indent=1))
    else:
        print("\n".join(describe(found) if found else ["no runs here: a run folder has a config.yaml or a run.json"]))
    return 0


def _compare(folders: list[Path], out: Path, as_json: bool) -> int:
    from .comparison import compare, describe
    from .pages.comparison_page import comparison_page
    from .pages.page import write_page

    check_file(out, by=COMPARISON)
    comparison = compare(folders)
    page = comparison_page(comparison)
    try:
        write_page(out, page, by=COMPARISON)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    if as_json:
        listed = {name: asdict(look(run.folder)) for name, run in comparison.runs.items()}
        print(json.dumps({"differences": comparison.differences, "runs": listed, "page": str(out)}, indent=1))
    else:
        print("\n".join([*describe(comparison), f"wrote {out}"]))
    return 0


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Run folders among these folders and up to DEPTH below them, each once; UserError for a folder that is not there.

    Links are followed. What is hidden, and what a run holds, is not searched.
    """
    folders = list(folders)
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(
            [f"{folder}: there is no such folder; loraloom runs FOLDER lists those in it" for folder in missing]
        )
    found = [path for folder in folders for path in _walk(folder)]
    return list({path.resolve(): path for path in reversed(found)}.values())  # by the first of its names


def _walk(top: Path) -> Iterator[Path]:
    if not os.access(top, os.R_OK | os.X_OK):
        raise UserError(f"{top}: cannot be looked into (Permission denied)")
    for name, below, files in os.walk(top, followlinks=True):
        folder = Path(name)
        if is_run_folder(folder):
            yield folder
        if "run.json" in files or len(folder.relative_to(top).parts) == DEPTH:
            below.clear()
        below[:] = sorted(each for each in below if not each.startswith("."))


def list_runs(folders: Iterable[Path]) -> list[Listed]:
    """The newest first."""
    found = [look(folder) for folder in folders]
    return sorted(found, key=lambda listed: (-_started(listed), listed.run))


def look(folder: Path) -> Listed:
    """What its files say; damage is a state as any other."""
    try:
        return _listed(read_run(folder))
    except UserError as error:
        return Listed(str(folder), "damaged", problem=str(error).removeprefix(f"{folder}{os.sep}"))


def _listed(run: RunFiles) -> Listed:
    state, loss, held_out = state_of(run), final_loss(run), held_out_losses(run)
    return Listed(
        run=str(run.folder),
        state=state,
        resumable=state not in ("done", "running") and bool(checkpoints(run.folder)),
        step=step_of(run),
        steps=steps_of(run),
        base=at(run.config, "model.base"),
        adapter=method_of(run),
        loss=loss and loss.loss,
        held_out=best_held_out(run),
        last_held_out=held_out[-1] if held_out else None,
        seconds=seconds_of(run),
        started=run.record.get("started"),
    )


def _started(listed: Listed) -> float:
    """Seconds since 1970; of a run that does not say, when its file was written."""
    try:
        return datetime.fromisoformat(listed.started or "").timestamp()
    except ValueError:
        files = (Path(listed.run) / name for name in ("run.json", "config.yaml"))
        return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def describe(found: Sequence[Listed]) -> Iterator[str]:
    """The lines of the table, and how to go on with what is not done."""
    yield from aligned([HEAD, *map(_cells, found)], SIDES)
    if resumable := [shlex.quote(plain(listed.run)) for listed in found if listed.resumable]:
        others = f", and so with {', '.join(resumable[1:])}" if resumable[1:] else ""
        yield f"\nloraloom resume {resumable[0]} goes on from its newest checkpoint{others}"


def _cells(listed: Listed) -> Sequence[str]:
    if listed.problem:
        return listed.run, listed.state, listed.problem
    return (
        listed.run,
        listed.state,
        "/".join(f"{count:,}" for count in (listed.step or 0, listed.steps) if count is not None),
        shortened(str(listed.base or ""), WIDEST),
        ", ".join(listed.adapter),
        "" if listed.loss is None else number(listed.loss),
        listed.held_out.words() if listed.held_out else "",
        "" if listed.seconds is None else duration(listed.seconds),
        (listed.started or "").replace("T", " ")[:16],
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom runs",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", type=path_text, nargs="*", metavar="FOLDER", help="run folders, or folders that hold some (runs)"
    )
    parser.add_argument("--compare", action="store_true", help="show what is different between these runs, two or more")
    parser.add_argument("--out", type=path_text, metavar="FILE", help="the page of the comparison (compare.html)")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
