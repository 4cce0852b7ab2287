"""What a run writes in its folder, by name: what is in its way there, what --overwrite takes away, what lies wrong.

No torch. A run is known by the `config.yaml` and the `run.json` that it wrote, never by a folder called `checkpoints`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.arguments import file_and_weight
from ..configs.bounded import parse_yaml, read_json, read_text
from ..configs.choices import find
from ..configs.errors import UserError
from ..configs.files import temporary_name
from ..configs.ownership import (
    lies_in,
    read_manifest,
    remove_checkpoint,
    remove_if_empty,
    remove_named,
    remove_recorded,
    why_foreign_folder,
)
from ..configs.plain import plain
from ..configs.record import NAME as RECORD
from ..configs.record import Record, blocked, digest, is_marked, is_regular, record_of

if TYPE_CHECKING:
    from ..configs.schema import RunConfig

RUN = "run"
"""What wrote a file, in the record; of the results behind it their name."""
LOGS = ("logs/history.jsonl", "logs/held_out.jsonl", "quarantine.jsonl")
LOCK = ".lock"
"""Held by the process that trains in the folder, for all of its run."""
CARD = "README.md"
"""The model card, under the name that the hub shows."""
CARD_MARK = "<!-- Written by loraloom. Take this line out, and no run writes over your changes. -->"
FOLDERS = ("checkpoints", "logs", "samples")
POINTER = "checkpoints/latest"
FILES = ("config.yaml", "run.json", "report.html", *LOGS, POINTER)
CHECKPOINT = re.compile(r"step-\d+")
UNFINISHED = re.compile(r"step-\d+\.tmp")
IN_CHECKPOINT = re.compile(
    r"((adapter|ema)_\w+\.safetensors|(optimizer|scheduler|sampler|optimizer_by_name|model)(_\d+)?\.(bin|safetensors)"
    r"|random_states_\d+\.pkl|scaler\.pt|run_state\.json|manifest\.json)(\.tmp-.+-\d+)?|\.tmp\w{6}"
)
"""What we, accelerate and safetensors call the files of a checkpoint."""
PICTURE = re.compile(r"\d{2,}-[a-z0-9-]+-\d+\.png|samples\.json|grid\.png")
"""What a validation writes."""
_EVENTS = re.compile(r"events\.out\.tfevents\.\d+\..+")
_SECTIONS = {
    *("model", "data", "adapter", "noise", "loss", "optimizer", "loop", "guard", "checkpoint", "validation"),
    *("trackers", "output"),
}


def by_result(name: str) -> str:
    """What the record says of the adapter files and pipelines called `name`: those of other names stay."""
    return f"{RUN} {name}"


def results_of(config: "RunConfig") -> list[str]:
    """Names of the files and folders (with a slash) of the result, those included that a default may choose."""
    method, output = find("adapters.methods", config.adapter.method), config.output
    formats = output.formats or [*method.FORMATS, *(["loraloom"] if config.adapter.tokens else [])]
    found = [f"{output.name}/"] if method.CHANGES_BASE else []
    for name in dict.fromkeys(formats):
        ending = {"diffusers": ".safetensors", "peft": ".peft/"}.get(name, f".{name}.safetensors")
        found.append(f"{output.name}{ending}")
    return found


# Inputs that lie where the run writes


def misplaced_inputs(config: "RunConfig") -> list[str]:
    """Problems of images, bases and adapters that are, hold or lie in what the run writes or clears."""
    folder = Path(config.output.dir)
    written = [*results_of(config), *(f"{each}/" for each in FOLDERS), *FILES, CARD, LOCK, RECORD]
    problems = []
    for setting, path in _inputs(config):
        if not os.path.lexists(path):
            continue
        for name in written:
            target = folder / name.rstrip("/")
            if lies_in(path, target):
                where = "output.name" if name.startswith(config.output.name) else "output.dir"
                problems.append(
                    f"{setting} {plain(path)} lies in {plain(target)}, which the run writes and --overwrite clears: "
                    f"give another {where}"
                )
                break
        else:
            if path.is_dir() and not setting.endswith((".path", ".shards")) and lies_in(folder, path):
                problems.append(f"output.dir {plain(folder)} lies in {setting} {plain(path)}: give another output.dir")
    if config.data.cache.dir is not None:
        cache = Path(config.data.cache.dir)
        for name in (*FOLDERS, *results_of(config)):
            if lies_in(cache, folder / name.rstrip("/")):
                problems.append(f"data.cache.dir {plain(cache)} lies in {plain(folder / name)}, which the run writes")
    return problems


def _inputs(config: "RunConfig") -> Iterator[tuple[str, Path]]:
    from ..configs.data_sections import DatasetSource, FolderSource, ShardSource

    yield "model.base", Path(config.model.base)
    for text in config.model.adapters:
        yield "model.adapters", Path(file_and_weight(text)[0])
    if config.adapter.start_from is not None:
        yield "adapter.start_from", Path(config.adapter.start_from)
    for setting, sources in (("data.sources", config.data.sources), ("validation.sources", config.validation.sources)):
        for number, source in enumerate(sources):
            if isinstance(source, FolderSource):
                yield f"{setting}.{number}.path", Path(source.path)
            elif isinstance(source, DatasetSource):
                yield f"{setting}.{number}.dataset", Path(source.dataset)
            elif isinstance(source, ShardSource):
                yield f"{setting}.{number}.shards", _without_pattern(source.shards)


def _without_pattern(shards: str) -> Path:
    """The folder above the first part of a path that is a pattern."""
    path = Path(shards)
    for parent in (path, *path.parents):
        if not re.search(r"[*?\[]", str(parent)):
            return parent
    return path


def problems_of_names(config: "RunConfig") -> list[str]:
    """Results whose names, while they are written, are longer than the file system takes."""
    nearest = Path(config.output.dir)
    while not nearest.is_dir() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        limit = os.pathconf(nearest, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        limit = 255
    for name in results_of(config):
        length = len(os.fsencode(temporary_name(name.rstrip("/"))))
        if length > limit:
            return [f"output.name: has {length - limit} bytes more than a file name may have in {plain(nearest)}"]
    return []


def events_of(folder: Path) -> list[Path]:
    """The files that TensorBoard's writer of this process has made in a run folder."""
    return [path for path in _found(folder / "logs" / "loraloom", _EVENTS.pattern) if f".{os.getpid()}." in path.name]


# What is in the way


def holds_run(folder: Path) -> bool:
    """Whether `run.json` or `config.yaml` there were written by a run."""
    record = _record(folder)
    return any(_is_of_run(record, name) and record.owns(folder / name) for name in ("run.json", "config.yaml"))


def _is_of_run(record: Record, path: str) -> bool:
    return path in record.entries and record.entries[path].by == RUN


def in_the_way(config: "RunConfig", resume: bool = False) -> list[str]:
    """Paths of what the run would replace or add to and that no run wrote, or that was changed since.

    A model card is not among them: one of its owner's is left as it is.
    """
    folder = Path(config.output.dir)
    if not folder.is_dir():
        return []
    record, found = _record(folder), []
    for name in FILES if not resume else [name for name in FILES if name != "config.yaml"]:
        if record.why_foreign(folder / name, RUN):
            found.append(name)
    for name in results_of(config):
        path = folder / name.rstrip("/")
        if why_foreign_folder(path) if name.endswith("/") else record.why_foreign(path, by_result(config.output.name)):
            found.append(name)
    for name in (*FOLDERS, "logs/loraloom"):
        if blocked(folder, folder / name / "x"):
            found.append(f"{name}/")
    found += _foreign_pictures(folder, record)
    if not resume:
        found += [f"checkpoints/{path.name}" for path in _foreign_checkpoints(folder)]
    for name in (LOCK, RECORD):
        if os.path.lexists(folder / name) and not is_regular(folder / name):
            found.append(name)
    if is_regular(folder / LOCK) and (folder / LOCK).stat().st_size:
        found.append(LOCK)
    return list(dict.fromkeys(found))


def check_start(
    config: "RunConfig", *, overwrite: bool = False, resume: bool = False, changes: Sequence[str] = ()
) -> None:
    """UserError where a run is in the folder already and no word was given to it, or something else is in the way.

    `changes` are what the command line changes of a run that is resumed: its config.yaml is to keep them.
    """
    folder = Path(config.output.dir)
    if not (overwrite or resume) and holds_run(folder):
        raise UserError(
            f"{plain(folder)} holds a run already: `loraloom resume {plain(folder)}` goes on with it, "
            "--overwrite starts again, output.dir=… trains elsewhere"
        )
    if resume and changes and _record(folder).why_foreign(folder / "config.yaml", RUN):
        raise UserError(
            f"{plain(folder / 'config.yaml')}: was edited since the run wrote it, so it cannot keep {changes[0]!r}: "
            "write that in it, too, instead of on the command line"
        )
    check_way(config, resume)


def check_way(config: "RunConfig", resume: bool = False) -> None:
    """UserError, in one line, where something that no run wrote is in the way of this one."""
    if found := in_the_way(config, resume):
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise UserError(
            f"output.dir {plain(config.output.dir)}: in its way: {', '.join(map(plain, found[:8]))}{more}; no "
            "run wrote that, or it was changed since, and such things are never replaced: give another output.dir or "
            "output.name, or move them away"
        )


def _foreign_pictures(folder: Path, record: Record) -> list[str]:
    samples = folder / "samples"
    if samples.is_symlink() or not samples.is_dir():
        return []
    found = []
    for step in sorted(path for path in samples.iterdir() if CHECKPOINT.fullmatch(path.name)):
        if step.is_symlink() or not step.is_dir():
            found.append(f"samples/{step.name}")
            continue
        names = sorted(path.name for path in step.iterdir() if PICTURE.fullmatch(path.name))
        found += [f"samples/{step.name}/{name}" for name in names if record.why_foreign(step / name, RUN)]
    return found


def _foreign_checkpoints(folder: Path) -> list[Path]:
    """Folders with the names of checkpoints that are none of ours, or hold more than that."""
    below = folder / "checkpoints"
    if below.is_symlink() or not below.is_dir():
        return []
    found = []
    for path in sorted(below.iterdir()):
        if CHECKPOINT.fullmatch(path.name):
            listed = read_manifest(path)
            if listed is None:
                found.append(path)
        elif UNFINISHED.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            found.append(path)
    return found


# What goes


def remove_run(folder: Path, name: str) -> list[str]:
    """Removes what an old run wrote and what is as it wrote it, but for class images; lines to be said about it.

    Of its results only those called `name` go.
    """
    adopt(folder)
    removed = remove_recorded(folder, lambda path, by: by in (RUN, by_result(name)) and not path.startswith("prior-"))
    gone, left = list(removed.gone), list(removed.left)
    for path in _step_folders(folder):
        there = sum(1 for each in path.iterdir())
        rest = remove_checkpoint(path) if CHECKPOINT.fullmatch(path.name) else remove_named(path, IN_CHECKPOINT)
        remove_if_empty(path)
        gone += [f"checkpoints/{path.name}/"] * (len(rest) < there)
        left += [f"checkpoints/{path.name}/{each}" for each in rest]
    for below in FOLDERS:
        if not blocked(folder, folder / below / "x"):
            remove_if_empty(folder / below)
    return [*_said_gone(folder, gone), *_said_left(folder, left)]


def remove_unfinished(folder: Path) -> list[Path]:
    """Removes what killed processes left of checkpoints; folders that hold something else, too."""
    below, left = folder / "checkpoints", []
    if below.is_symlink() or not below.is_dir():
        return []
    for path in sorted(path for path in below.iterdir() if UNFINISHED.fullmatch(path.name)):
        remove_named(path, IN_CHECKPOINT)
        remove_if_empty(path)
        if os.path.lexists(path):
            left.append(path)
    return left


def _step_folders(folder: Path) -> list[Path]:
    below = folder / "checkpoints"
    if below.is_symlink() or not below.is_dir():
        return []
    names = (path for path in below.iterdir() if CHECKPOINT.fullmatch(path.name) or UNFINISHED.fullmatch(path.name))
    return sorted(path for path in names if path.is_dir() and not path.is_symlink())


def _said_gone(folder: Path, gone: list[str]) -> Iterator[str]:
    if not gone:
        return
    counts: dict[str, int] = {}
    for path in gone:
        first, slash, _ = path.partition("/")
        counts[first + slash] = counts.get(first + slash, 0) + 1
    shown = [
        f"{plain(name)} ({count})" if name.endswith("/") else plain(name) for name, count in sorted(counts.items())
    ]
    yield f"--overwrite: removed what the old run wrote in {plain(folder)}: {', '.join(shown)}"


def _said_left(folder: Path, changed: list[str]) -> Iterator[str]:
    """All that is still there but class images, and what only we use."""
    kept = re.compile(rf"prior-[0-9a-f]{{12}}|{re.escape(LOCK)}|{re.escape(RECORD)}")
    own = {path.partition("/")[0] for path in changed}
    others = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if not kept.fullmatch(path.name)]
    found = [plain(name) for name in (*changed, *(name for name in others if name.rstrip("/") not in own))]
    if found:
        shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        yield f"--overwrite: left what that run did not write, or what was changed since: {shown}"


# Runs of 0.1.0, which had no record


def adopt(folder: Path) -> None:
    """Enters what a run without a record wrote, by exact names, as it is now."""
    record = record_of(folder)
    for by, lines in _unrecorded(folder, record).items():
        record.add(lines, by)


def _record(folder: Path) -> Record:
    """The record of a run folder; with what a run without one wrote, which is not entered yet."""
    record = record_of(folder)
    for by, lines in _unrecorded(folder, record).items():
        record = record.supposing(lines, by)
    return record


def _unrecorded(folder: Path, record: Record) -> dict[str, dict[str, str | None]]:
    """Who wrote -> path -> SHA-256, or None for a log. Nothing where no run is; of one with a record, its pointer."""
    if _is_of_run(record, "config.yaml") or _is_of_run(record, "run.json"):
        return _edited_pointer(folder, record)
    values, facts = _resolved(folder / "config.yaml"), _run_file(folder / "run.json")
    if values is None and facts is None:
        return {}
    name = (values or {}).get("output", {}).get("name")
    files: list[str] = [POINTER]
    files += ["config.yaml"] if values is not None else []
    files += ["run.json"] if facts is not None else []
    files += ["report.html"] if _is_page(folder / "report.html") else []
    files += [CARD] if _is_card(folder / CARD) else []
    files += [f"replay/{path.name}" for path in _found(folder / "replay", r"step-\d+\.png")]
    files += _validated(folder)
    logs = [*LOGS, *(f"logs/loraloom/{path.name}" for path in _found(folder / "logs" / "loraloom", _EVENTS.pattern))]
    results = [each for each in (facts or {}).get("files") or [] if isinstance(each, str) and "/" not in each]
    results = [each for each in results if each.startswith(f"{name}.") and is_marked(folder / each)]
    return {
        RUN: {path: digest(folder / path) for path in files if _is_there(folder, path)}
        | {path: None for path in logs if _is_there(folder, path)},
        by_result(str(name)): {path: digest(folder / path) for path in results if _is_there(folder, path)},
    }


def _edited_pointer(folder: Path, record: Record) -> dict[str, dict[str, str | None]]:
    """`checkpoints/latest`, if it says nothing but a step, whichever: an edited one is worth no more than ours."""
    file = folder / POINTER
    if POINTER not in record.entries or not _is_there(folder, POINTER) or record.owns(file):
        return {}
    is_one = file.stat().st_size <= 64 and re.fullmatch(rb"(step-\d+)?\s*", file.read_bytes())
    return {RUN: {POINTER: digest(file)}} if is_one else {}


def _is_there(folder: Path, path: str) -> bool:
    return not blocked(folder, folder / path) and is_regular(folder / path)


def _found(folder: Path, names: str) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(names, path.name))


def _resolved(file: Path) -> dict[str, Any] | None:
    """The values of a config.yaml that a run wrote: all sections, filled in, exactly as our writer spells YAML."""
    if not is_regular(file):
        return None
    try:
        text = read_text(file)
        values = parse_yaml(text, str(file))
    except UserError:
        return None
    if not isinstance(values, dict) or not values.keys() >= _SECTIONS or not isinstance(values["loop"], dict):
        return None
    pinned = all(isinstance(values["loop"].get(key), int) for key in ("threads", "micro_batch"))
    commented = any(line.lstrip().startswith("#") for line in text.splitlines())
    return values if pinned and not commented and isinstance(values["output"], dict) else None


def _run_file(file: Path) -> dict[str, Any] | None:
    """What a run.json of ours says."""
    try:
        values = read_json(file) if is_regular(file) else {}
    except UserError:
        return None
    versions = values.get("versions")
    ours = isinstance(versions, dict) and "loraloom" in versions and {"state", "step", "steps"} <= values.keys()
    return values if ours else None


def _validated(folder: Path) -> Iterator[str]:
    """Pictures that finished validations list, their lists and grids."""
    for step in _found(folder / "samples", CHECKPOINT.pattern):
        if step.is_symlink() or not is_regular(step / "samples.json"):
            continue
        try:
            listed = read_json(step / "samples.json", list)
        except UserError:
            continue
        names = [entry["file"] for entry in listed if isinstance(entry, Mapping) and isinstance(entry.get("file"), str)]
        yield from (f"samples/{step.name}/{name}" for name in names if PICTURE.fullmatch(name))
        yield from (f"samples/{step.name}/{name}" for name in ("samples.json", "grid.png"))


def _is_page(file: Path) -> bool:
    return is_regular(file) and _begins(file).startswith(b"<!doctype html>") and b"loraloom" in _begins(file, 1 << 22)


def _is_card(file: Path) -> bool:
    return is_regular(file) and CARD_MARK.encode() in _begins(file, 1 << 22)


def _begins(file: Path, size: int = 64) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(size)
    except OSError:
        return b""
