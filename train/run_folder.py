"""The folder of a run: made, its config and record written, and read back with history and pictures. No torch.

What reads needs no schema either, so that many runs are listed at once.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.bounded import HISTORY, RECORD, Missing, parse_json, parse_yaml, read_bytes
from ..configs.document import FastCoreLoader
from ..configs.errors import UserError
from ..configs.faults import code_of
from ..configs.machine import is_held
from ..configs.ownership import why_foreign, write_file
from ..configs.progress import say
from ..configs.record import record_of
from ..configs.shapes import misfit
from .footprint import CARD, CARD_MARK, LOCK, RUN, adopt, remove_run
from .journal import tolerated
from .shapes import CONFIG, RUN_FILE, SAMPLES

if TYPE_CHECKING:
    from ..configs.schema import RunConfig
    from .run import Run

STATE = "run_state.json"
"""In each checkpoint: where the run stood, and the fingerprint of its images."""
LIBRARIES = ("loraloom", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")

PROBED = 1.0
"""Seconds: whoever asks whether a run lives takes its lock for a moment."""

LARGEST = 1e39
"""Of the values of a history, which are float32's; null is a number that was not finite."""


def prepare_folder(folder: Path, name: str, *, overwrite: bool) -> None:
    """Makes the run folder; removes what an old run wrote in it if that was asked for (not its class images)."""
    folder.mkdir(parents=True, exist_ok=True)
    adopt(folder)
    if overwrite:
        for line in remove_run(folder, name):
            say(line)


def is_our_card(folder: Path) -> bool:
    """Whether the model card is as a run wrote it: one that was changed, or has no mark, has become its owner's."""
    card = folder / CARD
    if card.is_symlink() or not card.is_file() or CARD_MARK not in read_bytes(card, RECORD).decode("utf-8", "replace"):
        return False
    record = record_of(folder)
    return record.path_of(card) not in record.entries or record.owns(card)


def write_config(config: "RunConfig", folder: Path, *, resumed: bool = False) -> None:
    """config.yaml, resolved: what `loraloom resume` goes on with. A resumed run leaves one that was edited by hand."""
    from ..configs.loader import dump_yaml

    if not (resumed and why_foreign(folder / "config.yaml", folder, RUN)):
        write_file(folder / "config.yaml", dump_yaml(config), folder, RUN)


def write_run_file(run: "Run", *, stand_in: bool = False, **facts: Any) -> None:
    """run.json: where the run stands. Written on the main process, or for it; a warning where the disk refuses."""
    if not (run.is_main or stand_in):
        return
    run.facts.update(facts)
    content = {
        "state": None,
        "exit_code": None,
        "step": run.step,
        "steps": run.config.loop.steps,
        "train_seconds": round(run.seconds, 4),
        "seconds_of": {what: round(seconds, 4) for what, seconds in run.seconds_of.items()},
        "threads": run.config.loop.threads,
        "processes": run.accelerator.num_processes,
        "versions": installed(),
        **run.facts,
    }
    with tolerated("run.json"):
        write_file(run.folder / "run.json", json.dumps(content, indent=1) + "\n", run.folder, RUN)


def write_failure(run: "Run", failure: Exception) -> bool:
    """run.json of a run that an error ended, with the exit code of a command; whether there is a folder for it."""
    if not run.folder.is_dir():
        return False
    words = str(failure) if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
    write_run_file(run, stand_in=True, state="failed", exit_code=code_of(failure), message=words)
    return True


@contextmanager
def locked(folder: Path, *, main: bool) -> Iterator[None]:
    """One run at a time in a folder, which is made: the main process holds the lock, also twice. UserError else."""
    from filelock import FileLock, Timeout

    if not main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(os.path.abspath(folder / LOCK), timeout=PROBED, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another process is training in this folder") from None
    except OSError as error:
        raise UserError(f"output.dir {folder}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()


def installed() -> dict[str, str]:
    """The versions of LIBRARIES here."""
    import importlib.metadata

    return {library: importlib.metadata.version(library) for library in LIBRARIES}


@dataclass(frozen=True, slots=True)
class Picture:
    """One validation image."""

    file: Path
    prompt: str
    seed: int | None
    step: int
    contrast: float | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds; what it lacks is empty."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    record: dict[str, Any]  # run.json
    history: list[dict[str, Any]]  # one entry for each step, rising
    held_out: list[dict[str, Any]]  # one entry for each validation with held-out images
    validations: dict[int, Path]  # step to its samples.json, rising


def read_run(folder: Path) -> RunFiles:
    """All that the pages about runs are made of; UserError for a missing folder or a damaged file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    config_text = _text(folder / "config.yaml") or ""
    return RunFiles(
        folder=folder,
        config_text=config_text,
        config=_config(folder / "config.yaml", config_text),
        record=_record(folder / "run.json"),
        history=read_history(folder / "logs" / "history.jsonl"),
        held_out=read_history(folder / "logs" / "held_out.jsonl"),
        validations=find_validations(folder / "samples"),
    )


def is_run_folder(folder: Path) -> bool:
    """Whether it holds what every run writes."""
    return any(os.path.isfile(folder / name) for name in ("config.yaml", "run.json"))


def is_locked(folder: Path) -> bool | None:
    """Whether a process trains in the folder; None if that cannot be known."""
    try:
        return is_held(folder / LOCK)
    except FileNotFoundError:
        return False
    except (OSError, UserError):  # not ours to read, or a file system without locks
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, rising steps; whether they are sound is another question."""
    found = (path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name))
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that its name has."""
    return int(checkpoint.name.removeprefix("step-"))


def read_fingerprint(folder: Path) -> list[dict[str, Any]]:
    """Of each source its name, the number of images, and the hash of them and their captions, as a checkpoint has it.

    Empty if no checkpoint can be read: all of a run have the same.
    """
    for checkpoint in reversed(checkpoints(folder)):
        with suppress(UserError, KeyError, TypeError, AttributeError):  # damaged, or of another version
            sources = _json(checkpoint / STATE, default={}).get("data", {}).get("sources", [])
            return [{"name": s["name"], "images": s["images"], "sha256": s["sha256"]} for s in sources]
    return []


def read_history(file: Path) -> list[dict[str, Any]]:
    """The entries of history.jsonl by rising step; of entries for the same step the last one counts.

    A killed run may leave half a line at the end, which is ignored; any other line that is not a JSON object of
    numbers with a `step` raises UserError.
    """
    entries: dict[int, dict[str, Any]] = {}
    try:
        *lines, unfinished = read_bytes(file, HISTORY).split(b"\n")
    except Missing:
        return []
    for index, line in enumerate([*lines, unfinished]):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, "it")
            if not all(map(_is_number, entry.values())):
                raise TypeError
            entries[int(entry["step"])] = entry
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            if index == len(lines):
                continue
            raise UserError(f"{file}: line {index + 1} is not a JSON object of numbers with a step") from error
    return [entries[step] for step in sorted(entries)]


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and not LARGEST <= abs(value) < math.inf)


def find_validations(samples: Path) -> dict[int, Path]:
    """Step to `samples.json` of every validation that was finished: that is written after the images."""
    lists = {
        int(found[1]): file
        for file in samples.glob("step-*/samples.json")
        if (found := re.fullmatch(r"step-([0-9]+)", file.parent.name))
    }
    return dict(sorted(lists.items()))


def read_pictures(validations: Mapping[int, Path], steps: Iterable[int]) -> list[Picture]:
    """The images of the validations at these steps."""
    pictures: list[Picture] = []
    for step in steps:
        entries = _json(validations[step], default=[])
        if found := misfit(entries, SAMPLES):
            raise UserError(f"{validations[step]}: {found}")
        for entry in entries:
            # only the name: nothing outside the folder is shown
            file = validations[step].parent / Path(entry["file"]).name
            if file.is_file():
                contrast = entry.get("contrast")
                known = float(contrast) if isinstance(contrast, int | float) else None
                pictures.append(Picture(file, str(entry.get("prompt", "")), entry.get("seed"), step, known))
    return pictures


def _config(file: Path, text: str) -> dict[str, Any]:
    """Values of config.yaml, which has plain ones only; an empty file has none."""
    config = parse_yaml(text, str(file), FastCoreLoader)
    if not isinstance(config, dict | None):
        raise UserError(f"{file}: expected a mapping (`section:` and `key: value` lines)")
    if found := misfit(config, CONFIG):
        raise UserError(f"{file}: {found}")
    return config or {}


def _record(file: Path) -> dict[str, Any]:
    record = _json(file, default={})
    if found := misfit(record, RUN_FILE):
        raise UserError(f"{file}: {found}")
    return record


def _text(file: Path) -> str | None:
    """Of a file that may not be there; UserError if it cannot be read."""
    try:
        return read_bytes(file).decode("utf-8")
    except Missing:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: this is not UTF-8 text (byte {error.start})") from error


def _json(file: Path, default: Any) -> Any:
    """Content of a JSON file, or the default if there is none; UserError unless it has the default's type."""
    text = _text(file)
    if text is None:
        return default
    content = parse_json(text, str(file))
    if not isinstance(content, type(default)):
        raise UserError(f"{file}: expected a JSON {'object' if default == {} else 'array'}")
    return content
