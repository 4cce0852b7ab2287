"""A TOML file and the line of each of its keys, which `tomllib` does not tell."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from ...configs.bounded import CONFIG, parse_toml, read_text
from ...configs.document import KeyPath

HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


class Toml(NamedTuple):
    """Values, and the places of their keys."""

    values: dict[str, Any]
    path: Path
    lines: dict[KeyPath, int]

    def place(self, *key: str | int) -> str:
        """`my.toml:12`, or the file alone for a key that stands nowhere by itself."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)


def read_toml(path: Path) -> Toml:
    """UserError with the line where it is no TOML."""
    text = read_text(path, CONFIG)
    values = parse_toml(text, str(path), lambda error: _place(path, error))
    return Toml(values, path, _lines(text, values))


def _place(path: Path, error: Exception) -> str:
    line = re.search(r"\(at line (\d+)", str(error))
    return f"{path}:{line[1]}" if line else str(path)


def _lines(text: str, values: dict[str, Any]) -> dict[KeyPath, int]:
    """Lines that look like `[section]` or `key =` and name something that is there, the first one of each."""
    found: dict[KeyPath, int] = {}
    section: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            inside = _resolve(_steps(header[2]), values, counts)
            if inside is not None and header[1] == "[[":
                counts[inside] = counts.get(inside, -1) + 1
                inside = (*inside, counts[inside])
            section = section if inside is None else inside
        elif key := KEY.match(line):
            path = (*section, *_steps(key[1]))
            if _exists(path, values):
                found.setdefault(path, number)
    return found


def _steps(dotted: str) -> list[str]:
    return [step.strip("\"'") for step in re.split(r"\s*\.\s*", dotted)]


def _resolve(steps: list[str], values: Any, counts: dict[KeyPath, int]) -> KeyPath | None:
    """`datasets.subsets` as the path of the newest data set's subsets; None for what is no table of the file."""
    path: KeyPath = ()
    for step in steps:
        if path in counts:
            path = (*path, counts[path])
        path = (*path, step)
        if not _exists(path, values):
            return None
    return path


def _exists(path: KeyPath, values: Any) -> bool:
    try:
        for step in path:
            values = values[step]
    except (KeyError, IndexError, TypeError):
        return False
    return True
