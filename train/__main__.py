"""python -m loraloom.train CONFIG [key=value …]: config, preflight, build, fit; torch comes after the preflight."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.errors import OUT_OF_MEMORY, STOPPED, UserError, run_command
from ..configs.loader import load_config
from ..configs.schema import RunConfig

if TYPE_CHECKING:
    from .run import Run


def main(arguments: Sequence[str]) -> int:
    """Trains, and answers with the exit code."""
    options = _parser().parse_intermixed_args(list(arguments))
    if options.resume:
        config = _saved_config(Path(options.config), options.overrides)
    else:
        config = load_config(options.config, options.overrides)
    from .preflight import check_fresh, preflight  # brings Pillow: a typo in the config is answered before

    preflight(config)
    if not options.resume and not options.overwrite:
        check_fresh(Path(config.output.dir))
    return train(config, resume=options.resume, overwrite=options.overwrite)


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> int:
    """The run of a checked config."""
    import torch

    from .build import build_trainer, prepare_folder

    folder, checkpoint = Path(config.output.dir), None
    if resume:
        checkpoint = _find_checkpoint(folder)
    elif _is_main_process():
        prepare_folder(folder, overwrite=overwrite)
    trainer = build_trainer(config, checkpoint)
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory at step {trainer.run.step + 1}: {str(error).splitlines()[0]}", file=sys.stderr)
        print("try a smaller loop.micro_batch or data.resolution; the last checkpoint is sound", file=sys.stderr)
        _record_failure(trainer.run, OUT_OF_MEMORY, str(error))
        return OUT_OF_MEMORY
    except UserError as error:
        _record_failure(trainer.run, error.exit_code, str(error))
        raise
    trainer.run.accelerator.end_training()
    return STOPPED if trainer.run.stop else 0


def _record_failure(run: "Run", exit_code: int, message: str) -> None:
    from .callbacks.export import write_run_file
    from .report import write_report

    write_run_file(run, state="failed", exit_code=exit_code, message=message)
    if run.is_main:
        write_report(run.folder)


def _find_checkpoint(folder: Path) -> Path:
    from .state import newest_sound_checkpoint

    checkpoint, passed = newest_sound_checkpoint(folder)
    for problem in passed:
        print(f"warning: passed over {problem}", file=sys.stderr)
    print(f"resuming from {checkpoint}")
    return checkpoint


def _saved_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The config of a run folder, which may have been moved since."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run folder (it holds no config.yaml); give the folder of a run")
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: has no checkpoint yet; start it again with `loraloom train … --overwrite`")
    config = load_config(folder / "config.yaml", overrides)
    return config.model_copy(update={"output": config.output.model_copy(update={"dir": str(folder)})})


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraloom train",
        description="Train an adapter as a config file says.",
        epilog="exit codes: 0 done, 2 bad input, 3 training went wrong, 4 out of memory, 5 stopped by a signal with a "
        "checkpoint saved, 6 trained and saved but a later step failed",
    )
    parser.add_argument("config", help="YAML file (with --resume: the run folder)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as adapter.rank=16")
    parser.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint of a run folder")
    parser.add_argument("--overwrite", action="store_true", help="start again in a folder that holds a run")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
