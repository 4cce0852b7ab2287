"""python -m loraloom.train CONFIG [key=value …]: config, preflight, build, fit; torch comes after the preflight."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.arguments import Parser, add_config
from ..configs.command import run_command
from ..configs.data_sections import FolderSource
from ..configs.errors import STOPPED, OutOfMemory, TrainingError, UserError
from ..configs.faults import as_error, is_out_of_memory
from ..configs.files import reason
from ..configs.imports import importing
from ..configs.loader import load_config
from ..configs.plain import plain
from ..configs.processes import Others, joined, launched
from ..configs.schema import RunConfig
from .footprint import check_start, check_way
from .run_folder import checkpoint_step, checkpoints, locked, read_run, write_failure
from .settings import check_settings
from .start import start_processes

if TYPE_CHECKING:
    from ..data.dataset import Images
    from .run import Run


RESUMES = "Go on with a run from its newest sound checkpoint, to the same bytes as if it had never stopped."


def main(arguments: Sequence[str]) -> int:
    """Trains, and answers with the exit code."""
    with joined(start_processes) as others:
        return _train(_parser("--resume" in arguments).parse_intermixed_args(list(arguments)), others)


def _train(options: argparse.Namespace, others: Others) -> int:
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run, --overwrite starts it again: give one of them")
    if options.resume:
        config = _saved_config(Path(options.config), options.overrides)
    else:
        config = load_config(options.config, options.overrides)
    check_start(config, overwrite=options.overwrite, resume=options.resume, changes=options.overrides)
    folder = Path(config.output.dir)
    goes_on = options.resume and not _begins_again(folder, config)
    images = _look(config, resumed=goes_on)
    with locked(folder, main=launched()[0] == 0):
        checkpoint = _find_checkpoint(folder, config) if goes_on else None
        return _fit(config, images, checkpoint, options.overwrite, others)


def _look(config: RunConfig, resumed: bool) -> "list[Images | None]":
    from .preflight import preflight

    adapter = config.adapter
    if resumed:  # the checkpoint has what was read of it
        adapter = adapter.model_copy(update={"start_from": None})
    try:
        return preflight(config.model_copy(update={"adapter": adapter}))
    except UserError as error:
        sources = enumerate(config.data.sources)
        gone = {place: s.path for place, s in sources if isinstance(s, FolderSource) and not Path(s.path).exists()}
        if not resumed or not gone:
            raise
        start = "paths of its config start at the folder that you are in: resume it from where it was started; "
        moved = f"where the images were moved, data.sources.{min(gone)}.path=… says where they are"
        raise UserError(
            [*error.problems, moved if all(map(os.path.isabs, gone.values())) else start + moved]
        ) from error


def _fit(
    config: RunConfig,
    images: "Sequence[Images | None]",
    checkpoint: Path | None,
    overwrite: bool,
    others: Others,
) -> int:
    with importing():
        from .build import build_trainer
        from .push import push_finished

    run = None
    try:
        trainer = build_trainer(config, images, checkpoint=checkpoint, overwrite=overwrite)
        run = trainer.run
        others.before_end = partial(_record_state, run, others)
        trainer.fit()
    except (Exception, SystemExit) as end:
        error = as_error(end) if isinstance(end, SystemExit) else end
        if error is None:
            raise
        failure = others.answer(_explain(error, run) or error)
        if run is not None:
            _record(run, failure, others)
        if failure is end:
            raise
        raise failure from end
    run.accelerator.end_training()
    if run.is_main and not run.stop and (command := next_command(run)):
        print(f"next:\n  {command}")
    if config.output.push_to is not None and run.is_main and not run.stop:
        push_finished(run, config.output.push_to)
    return STOPPED if run.stop else 0


def next_command(run: "Run") -> str | None:
    """What a user types now: pictures with what was written; None where nothing was."""
    config, files = run.config, run.facts.get("files") or []
    if not files:
        return None
    pipeline = "pipeline" in (run.facts.get("verify") or {})
    words = ["loraloom", "sample", "--base", str(run.folder / config.output.name) if pipeline else config.model.base]
    words += ["--revision", config.model.revision] if config.model.revision and not pipeline else []
    adapters = [name for name in files if name.endswith(".safetensors")]
    words += ["--adapter", str(run.folder / adapters[0])] if adapters else []
    words += ["--clip-skip", str(config.model.clip_skip)] if config.model.clip_skip else []
    prompts = [section.prompt for section in config.validation.sections]
    return shlex.join([*words, "--prompt", prompts[0] if prompts else "your prompt"])


def _record(run: "Run", failure: Exception, others: Others) -> None:
    """What the folder says of a run that failed."""
    from .journal import tolerated
    from .pages.report import write_report

    if _record_state(run, others, failure):
        with tolerated("report.html"):
            write_report(run.folder)


def _record_state(run: "Run", others: Others, failure: Exception) -> bool:
    """Whether this process is the one that writes it down: the main one, or one in the place of a dead one."""
    writes = run.is_main or others.stands_in
    return writes and write_failure(run, failure)


def _explain(error: Exception, run: "Run | None") -> UserError | None:
    """What the user is told; None for an error that is ours."""
    if isinstance(error, UserError):
        return error
    where = f"step {run.step + 1}: " if run and not run.is_last_step else ""
    if isinstance(error, OSError):
        return TrainingError(f"{where}{reason(error)}")
    if not is_out_of_memory(error):
        return None
    words = (str(error) or "in Python").splitlines()[0]
    return OutOfMemory(f"{where}out of memory ({words}); try {_take_less(run)}")


def _take_less(run: "Run | None") -> str:
    """What would make a step need less memory; a run may go on with all but another resolution."""
    if run is None:
        return "a smaller data.resolution"
    loop, saved = run.config.loop, (run.folder / "checkpoints" / "latest").is_file()
    ways = [] if loop.gradient_checkpointing else ["loop.gradient_checkpointing=true"]
    ways += [] if loop.micro_batch == 1 else ["loop.micro_batch=1"]
    resume = f" (`loraloom resume {run.folder} {' '.join(ways)}`)" if ways and saved else ""
    smaller = f"a data.resolution below {max(run.config.data.resolutions)}"
    return f"{' and '.join(ways)}{resume}, or {smaller}" if ways else smaller


def _say_what_is_replaced(folder: Path, checkpoint: Path, config: RunConfig) -> None:
    """A finished run that goes on writes the same files again."""
    try:
        record = read_run(folder).record
    except UserError:
        return
    files = [name for name in record.get("files") or [] if (folder / str(name)).exists()]
    if record.get("state") == "done" and files and checkpoint_step(checkpoint) < config.loop.steps:
        print(
            f"{', '.join(files)} of step {record.get('step')} will be replaced at the end: copy what you want to keep "
            f"({checkpoint} has its weights, as long as it is among the newest {config.checkpoint.keep})"
        )


def _find_checkpoint(folder: Path, config: RunConfig) -> Path:
    from .state import newest_sound_checkpoint

    checkpoint, passed = newest_sound_checkpoint(folder)
    if launched()[0] == 0:
        for problem in passed:
            print(f"warning: passed over {plain(problem)}", file=sys.stderr)
        print(f"resuming from {checkpoint}")
        _say_what_is_replaced(folder, checkpoint, config)
    return checkpoint


def _begins_again(folder: Path, config: RunConfig) -> bool:
    """Whether a run ended before its first checkpoint: it has lost nothing but time, and ends with the same bytes.

    UserError where checkpoints are gone that it once had: to train all of it again would take the place of its result.
    """
    if checkpoints(folder):
        return False
    record = read_run(folder).record
    if record.get("state") == "done" or record.get("files"):
        raise UserError(
            f"{plain(folder)}: is trained, and its checkpoints are gone: nothing can go on from them; `loraloom train "
            f"{plain(shlex.quote(str(folder / 'config.yaml')))} --overwrite` trains it again"
        )
    check_way(config)
    if launched()[0] == 0:
        print(f"{plain(folder)}: no checkpoint was finished: the run begins again at its first step")
    return True


def _saved_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The config of a run folder, which may have been moved since; what decides the weights has to be as it was."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run folder (it holds no config.yaml); give the folder of a run")
    saved, config = load_config(folder / "config.yaml"), load_config(folder / "config.yaml", overrides)
    check_settings(folder, saved, config)
    return config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})})


def _parser(resuming: bool = False) -> argparse.ArgumentParser:
    parser = Parser(
        prog="loraloom resume" if resuming else "loraloom train",
        description=RESUMES if resuming else "Train an adapter as a config file says.",
        epilog="exit codes: 0 done, 2 bad input, 3 training went wrong, 4 out of memory, 5 stopped by a signal with a "
        "checkpoint saved, 6 trained and saved but a later step failed (see docs/training.md, When the disk refuses)",
    )
    if resuming:
        add_config(parser, "run folder, such as runs/my-dog", example="loop.steps=2000, of those that may change")
    else:
        add_config(parser, "YAML file (with --resume: the run folder)")
    resume, overwrite = (
        (argparse.SUPPRESS, argparse.SUPPRESS)
        if resuming
        else ("go on from the newest sound checkpoint of a run folder", "start again in a folder that holds a run")
    )
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--overwrite", "--force", action="store_true", help=overwrite)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
