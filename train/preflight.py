"""What can be known to be wrong before torch is imported and a model loaded: all of it, at once."""

import importlib.util
import os
import socket
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ..configs.arguments import file_and_weight
from ..configs.data_sections import FolderSource
from ..configs.errors import UserError
from ..configs.machine import cache_folder
from ..configs.paths import LONGEST_NAME, LONGEST_PATH, looked_in, shortened
from ..configs.schema import RunConfig
from ..data.dataset import Images
from ..data.source import Given
from ..models.base import check_base
from .doubts import doubts_of_config, doubts_of_words, trained_and_held_out
from .footprint import misplaced_inputs, problems_of_names
from .gather import Say, gather, held_out_data, warn
from .header import check_build_time
from .run_folder import STATE

ENDING = 32  # bytes of the longest that a format puts behind the name, and some


def preflight(
    config: RunConfig,
    *,
    progress: bool = True,
    trust_sizes: bool = False,
    say: Say = warn,
    given: Given | None = None,
) -> list[Images | None]:
    """The images of each source; UserError with every problem of base, data and output folder.

    `given` are images that a program hands over, by name.
    """
    problems = [
        *check_base(config.model.base),
        *check_adapter_files(config),
        *check_output(Path(config.output.dir), config),
        *misplaced_inputs(config),
        *problems_of_names(config),
        *check_lengths(config),
        *check_cache(config),
        *check_trackers(config.trackers),
        *check_spans(config),
        *check_build_time(),
    ]
    check_push(config, say)
    for doubt in doubts_of_config(config):
        say(doubt)
    images: list[Images | None] = []
    try:
        images = gather(config.data, progress=progress, trust_sizes=trust_sizes, say=say, given=given)
        wrong, doubts = doubts_of_words(config, images)
        problems += wrong
        for doubt in doubts:
            say(doubt)
    except UserError as error:
        problems += error.problems
    try:
        if config.validation.sources:
            held_out = held_out_data(config.data, config.validation)
            apart = gather(held_out, progress=progress, trust_sizes=trust_sizes, say=say, given=given)
            for doubt in trained_and_held_out(images, apart):
                say(doubt)
    except UserError as error:
        problems += [f"validation.sources: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
    return images


def check_output(folder: Path, config: RunConfig, setting: str = "output.dir") -> list[str]:
    """Problems of the run folder, or of another folder for pictures that a `setting` has named."""
    for source in (*config.data.sources, *config.validation.sources):
        if isinstance(source, FolderSource) and folder.resolve().is_relative_to(Path(source.path).resolve()):
            return [f"{setting} {folder} lies inside the images of {source.path}: its pictures would be trained on"]
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        return [f"{setting} {folder}: {nearest} is a file, so no folder can be made there"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{setting} {folder}: {nearest} cannot be written"]
    return []


def check_lengths(config: RunConfig) -> list[str]:
    """Names that leave no room for what is put behind them: endings, and a mark while a file is written."""
    mark = f".tmp-{socket.gethostname()}-{os.getpid()}"
    room = LONGEST_NAME - len(os.fsencode(mark)) - ENDING
    name, folder = config.output.name, os.path.abspath(config.output.dir)
    if (length := len(os.fsencode(name))) > room:
        return [f"output.name {shortened(name)}: is {length} bytes long; at most {room} leave room for endings"]
    if (length := len(os.fsencode(folder))) > LONGEST_PATH - 2 * LONGEST_NAME:
        return [f"output.dir {shortened(folder)}: is {length} bytes long, which leaves no room for checkpoints in it"]
    return []


def check_cache(config: RunConfig) -> list[str]:
    """Problems of the folder of caches that another name for it would end."""
    folder = cache_folder(config.data.cache.dir)
    try:
        os.stat(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        return [f"data.cache.dir {folder}: {error.strerror}; give a folder of yours, here or as LORALOOM_CACHE"]
    return []


def check_adapter_files(config: RunConfig) -> list[str]:
    """Adapter files that are not there, and folders, of which no record could tell what was read."""
    try:
        named = [("model.adapters", file_and_weight(text)[0]) for text in config.model.adapters]
    except UserError as error:
        return [f"model.adapters: {error}"]
    if config.adapter.start_from is not None:
        named.append(("adapter.start_from", config.adapter.start_from))
    return [f"{key}: {file}: {_why_no_file(file)}" for key, file in named if not Path(file).is_file()]


def _why_no_file(file: str) -> str:
    folder = Path(file)
    if not folder.is_dir():
        return f"there is no such file{looked_in(file)}"
    is_of_peft = [*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")]
    if is_of_peft or (folder / STATE).is_file():
        what = "a folder of PEFT" if is_of_peft else "a checkpoint of a run"
        convert = "loraloom adapter convert FOLDER --base BASE --to loraloom --out FILE"
        return f"is {what}, and a file is needed: `{convert}` makes one"
    files = sorted(folder.glob("*.safetensors"))
    beside = f", such as {files[0].name}" if files else ""
    return f"is a folder; name the .safetensors file of the adapter{beside}"


def check_push(config: RunConfig, say: Say) -> None:
    """A note where the push at the end will fail unless somebody logs in until then."""
    if config.output.push_to is not None:
        from .push import LOG_IN, token

        if token() is None:
            say(f"output.push_to {config.output.push_to}: there is no token for the hub yet: {LOG_IN}")


def check_spans(config: RunConfig) -> list[str]:
    """Steps in which no source takes part, and sources that take part in none."""
    steps = config.loop.steps
    spans = [(source.start_step, min(source.end_step or steps, steps)) for source in config.data.sources]
    problems = [
        f"data.sources.{number}: start_step {first} is not before the run's end at loop.steps {steps}"
        for number, (first, _) in enumerate(spans)
        if first >= steps
    ]
    edges = sorted({0, steps, *(edge for span in spans for edge in span if edge < steps)})
    for first, until in pairwise(edges):
        if not any(begin <= first < end for begin, end in spans):
            problems.append(f"data.sources: no source takes part in steps {first} to {until - 1} of {steps}")
    return problems


def check_trackers(trackers: Sequence[str]) -> list[str]:
    """Trackers that are not installed; accelerate would leave them out without a word."""
    absent = [name for name in trackers if importlib.util.find_spec(name) is None]
    packages = {"wandb": "'loraloom[wandb]'", "comet_ml": "comet-ml"}
    return [
        f"trackers: {name} is not installed; pip install {packages.get(name, name)}, or take it out" for name in absent
    ]
