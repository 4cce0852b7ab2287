"""Several runs side by side: what is different in what they were asked, and how they ended."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.document import KeyPath, dotted
from ..configs.errors import UserError
from ..configs.loader import inline_yaml
from ..configs.plain import plain
from .facts import best_held_out, held_out_losses, seconds_of, state_of
from .pages.told import loss_of, progress_of
from .pages.words import aligned, duration, shortened
from .run_folder import RunFiles, is_run_folder, read_fingerprint, read_run

Table = dict[str, dict[str, Any]]
"""Row to the values of those runs that have one, by name."""
WIDEST = 48  # characters of a value in a terminal


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs or more."""

    runs: dict[str, RunFiles]  # by a short name
    differences: Table
    results: Table


def compare(folders: Sequence[Path]) -> Comparison:
    """The runs of these folders, in this order; UserError for fewer than two and for what is no run."""
    if problems := list(_problems(folders)):
        raise UserError(problems)
    runs = dict(zip(short_names(folders), map(read_run, folders), strict=True))
    return Comparison(runs, differences(runs), results(runs))


def _problems(folders: Sequence[Path]) -> Iterator[str]:
    for place, folder in enumerate(folders):
        if not is_run_folder(folder):
            reason = "holds neither config.yaml nor run.json" if folder.is_dir() else "there is no such folder"
            yield f"{folder}: is no run folder ({reason})"
        elif folder.resolve() in [other.resolve() for other in folders[:place]]:
            yield f"{folder}: is given twice"
    if len(folders) < 2:
        yield "--compare needs two runs or more: loraloom runs --compare runs/a runs/b"


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or the paths as they are if two of them end alike."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def differences(runs: Mapping[str, RunFiles]) -> Table:
    """Whatever is not the same in all runs: dotted keys of the config, then processes, versions and images.

    A key that a config lacks differs from any value; a version that is not known differs from none.
    """
    configs = {name: run.config for name, run in runs.items() if run.config}
    surroundings = _rows({name: _surroundings(run) for name, run in runs.items()})
    known = {key: row for key, row in surroundings.items() if _differ(row)}
    return dict(_unequal((), configs, len(configs))) | known


def _unequal(path: KeyPath, values: Mapping[str, Any], among: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows below a key which `values` of `among` configs have; what one of them lacks is one row as a whole."""
    below = [dict(enumerate(v)) if isinstance(v, list) else v for v in values.values()]
    if len(below) == among and all(isinstance(each, dict) for each in below):
        for key, row in _rows(dict(zip(values, below, strict=True))).items():
            yield from _unequal((*path, key), row, among)
    elif len(below) < among or _differ(values):
        yield dotted(path), dict(values)


def _surroundings(run: RunFiles) -> dict[str, Any]:
    """What decides the weights besides the config."""
    known = {} if run.record.get("processes") is None else {"processes": run.record["processes"]}
    known |= {f"versions.{library}": version for library, version in (run.record.get("versions") or {}).items()}
    for number, source in enumerate(read_fingerprint(run.folder)):
        known[f"images.{number}.{source['name']}"] = f"{source['images']} with captions {source['sha256'][:12]}"
    return known


def _rows(columns: Mapping[str, Mapping[Any, Any]]) -> dict[Any, dict[str, Any]]:
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    return {key: {name: column[key] for name, column in columns.items() if key in column} for key in keys}


def _differ(row: Mapping[str, Any]) -> bool:
    first, *others = row.values()
    return any(other != first for other in others)


def results(runs: Mapping[str, RunFiles]) -> Table:
    """How far each came, and its losses, in words."""
    return _rows({name: dict(_result(run)) for name, run in runs.items()})


def _result(run: RunFiles) -> Iterator[tuple[str, str]]:
    yield "State", state_of(run)
    if not run.config:
        yield "Config", "there is none"
    if progress := progress_of(run):
        yield "Steps", progress
    if loss := loss_of(run):
        yield "Loss", loss
    if best := best_held_out(run):
        yield "Held-out loss, best", best.words()
        yield "Held-out loss, last", held_out_losses(run)[-1].words()
    if (seconds := seconds_of(run)) is not None:
        yield "Time", duration(seconds)


def spelled(table: Table) -> Table:
    """Values as a config file has them."""
    return {key: {name: _spelled(value) for name, value in row.items()} for key, row in table.items()}


def _spelled(value: Any) -> str:
    """A section keeps its order, and what is null in it is left out."""
    if not isinstance(value, dict):
        return inline_yaml(value)
    return f"{{{', '.join(f'{key}: {_spelled(each)}' for key, each in value.items() if each is not None)}}}"


def describe(comparison: Comparison) -> Iterator[str]:
    """Lines for a terminal: a column for each run."""
    names = list(comparison.runs)
    tables = {"differences": spelled(comparison.differences), "results": comparison.results}
    if not comparison.differences:
        yield f"no differences found between {plain(', '.join(names))}"
        yield ""
    for title, table in tables.items():
        if table:
            yield from aligned([[title, *names], *_lines(table, names)], "<" * (len(names) + 1))
            yield ""


def _lines(table: Table, names: Iterable[str]) -> Iterator[list[str]]:
    for key, row in table.items():
        yield [key, *(shortened(row[name], WIDEST) if name in row else "-" for name in names)]
