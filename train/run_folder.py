"""The folder of a run: made, its config and record written, and read back with history and pictures. No torch."""

import importlib.metadata
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..configs.errors import UserError
from ..configs.files import replace_file
from ..configs.loader import dump_yaml
from ..configs.schema import RunConfig
from .journal import tolerated

if TYPE_CHECKING:
    from .run import Run

LIBRARIES = ("loraloom", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")

MAX_VALIDATIONS = 12
"""Of more validations, this many are shown: the first, the last and some between."""


def prepare_folder(folder: Path, name: str, *, overwrite: bool) -> None:
    """Makes the run folder; removes what an old run left in it if that was asked for (not its class images)."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for below in ("checkpoints", "logs", "samples", name):
            shutil.rmtree(folder / below, ignore_errors=True)
        for file in (folder / "run.json", folder / "report.html", *folder.glob(f"{name}*.safetensors")):
            file.unlink(missing_ok=True)


def write_config(config: RunConfig, folder: Path) -> None:
    """config.yaml, resolved: what `loraloom resume` goes on with."""
    replace_file(folder / "config.yaml", dump_yaml(config))


def write_run_file(run: "Run", **facts: Any) -> None:
    """run.json: where the run stands. Written on the main process; a warning where the disk refuses."""
    if not run.is_main:
        return
    run.facts.update(facts)
    content = {
        "state": None,
        "exit_code": None,
        "step": run.step,
        "steps": run.config.loop.steps,
        "train_seconds": round(run.seconds, 2),
        "seconds_of": {what: round(seconds, 2) for what, seconds in run.seconds_of.items()},
        "threads": run.config.loop.threads,
        "processes": run.accelerator.num_processes,
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        **run.facts,
    }
    with tolerated("run.json"):
        replace_file(run.folder / "run.json", json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Picture:
    """One validation image."""

    number: int  # from 1, its own on the page
    file: Path
    prompt: str
    seed: int | None
    step: int


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds; what it lacks is empty."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    record: dict[str, Any]  # run.json
    history: list[dict[str, Any]]  # one entry for each step, rising
    held_out: list[dict[str, Any]]  # one entry for each validation with held-out images
    pictures: list[Picture]  # rising steps
    num_validations: int  # that the folder holds, also those whose pictures are left out


def read_run(folder: Path) -> RunFiles:
    """Everything that the page is made of; UserError for a missing folder or a damaged file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    config_text = _text(folder / "config.yaml") or ""
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise UserError(f"{folder / 'config.yaml'}: this is not YAML ({' '.join(str(error).split())})") from error
    pictures, num_validations = read_pictures(folder / "samples")
    return RunFiles(
        folder=folder,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        record=_json(folder / "run.json", default={}),
        history=read_history(folder / "logs" / "history.jsonl"),
        held_out=read_history(folder / "logs" / "held_out.jsonl"),
        pictures=pictures,
        num_validations=num_validations,
    )


def read_history(file: Path) -> list[dict[str, Any]]:
    """The entries of history.jsonl by rising step; of entries for the same step the last one counts.

    A killed run may leave half a line at the end, which is ignored; any other line that is not a JSON object with a
    `step` raises UserError.
    """
    if not file.is_file():
        return []
    entries: dict[int, dict[str, Any]] = {}
    *lines, unfinished = file.read_bytes().split(b"\n")
    for index, line in enumerate([*lines, unfinished]):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries[int(entry["step"])] = entry
        except (ValueError, TypeError, KeyError) as error:
            if index == len(lines):
                continue
            raise UserError(f"{file}: line {index + 1} is not a JSON object with a step") from error
    return [entries[step] for step in sorted(entries)]


def read_pictures(samples: Path) -> tuple[list[Picture], int]:
    """The validation images to show, and how many validations there are.

    A validation counts when its `samples.json` exists, for that is written after the images.
    """
    lists = {
        int(found[1]): file
        for file in samples.glob("step-*/samples.json")
        if (found := re.fullmatch(r"step-(\d+)", file.parent.name))
    }
    pictures: list[Picture] = []
    for step in spread(sorted(lists), MAX_VALIDATIONS):
        for entry in _json(lists[step], default=[]):
            file = lists[step].parent / Path(entry["file"]).name  # only the name: nothing outside the folder is shown
            if file.is_file():
                number = len(pictures) + 1
                pictures.append(Picture(number, file, entry.get("prompt", ""), entry.get("seed"), step))
    return pictures, len(lists)


def spread(steps: list[int], limit: int) -> list[int]:
    """At most `limit` (2 or more) of the steps, evenly spread, with the first and the last."""
    if len(steps) <= limit:
        return steps
    return [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]


def _text(file: Path) -> str | None:
    return file.read_text("utf-8") if file.is_file() else None


def _json(file: Path, default: Any) -> Any:
    """Content of a JSON file, or the default if there is none; UserError unless it has the default's type."""
    text = _text(file)
    if text is None:
        return default
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: this is not JSON ({error})") from error
    if not isinstance(content, type(default)):
        raise UserError(f"{file}: expected a JSON {'object' if default == {} else 'array'}")
    return content
