"""The config file of a translation, and what there is to say about it."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...configs.document import Document, KeyPath
from ...configs.loader import inline_yaml
from ...configs.problems import known_keys
from ...configs.words import counted
from .peer import Chosen, Line, Translation
from .variables import SECRET_SETTING

LONG = 60  # characters of a list from which on each entry has a line of its own
HEAD = """\
# loraloom train {out}
# From {file} ({tool}): loraloom init --from {file}
# Every key and its meaning: loraloom schema. What this file would do: loraloom plan {out}
"""

Tree = dict[str, Any]
"""Sections in sections; values are `Chosen`, lists of sections are lists of trees."""


def config_text(translation: Translation, file: Path, out: Path) -> str:
    """The YAML file: each value with the setting that it comes from, and above them what is not the same."""
    head = HEAD.format(out=_safe(shlex.quote(str(out))), file=_safe(shlex.quote(str(file))), tool=translation.tool)
    said = [f"# {line}".rstrip() for line in remarks(translation)]
    body = [line if line.startswith(" ") or not line else f"\n{line}" for line in _lines(_tree(translation), ())]
    return head + "\n".join([*said, *body]) + "\n"


def document_of(translation: Translation) -> Document:
    """The values as a config, with the places of the settings that they come from."""
    origins: dict[KeyPath, str] = {}
    values = _plain(_tree(translation), (), origins)
    return Document(values, origins)


def remarks(translation: Translation) -> Iterator[str]:
    """What differs, also from the tool's own defaults, and what is not here, a line for each setting."""
    differs = [*translation.differs, *(line for line in translation.assumed if line.words)]
    for title, lines in (("Not quite the same:", differs), ("Not here:", translation.lost)):
        if lines:
            yield ""
            yield title
            yield from (f"  {said(line)}" for line in lines)


def summary(translation: Translation, verbose: bool) -> Iterator[str]:
    """The three lists; the settings that are carried over only as a number unless all are asked for."""
    counts = [len(lines) for lines in (translation.carried, translation.differs, translation.lost)]
    hint = "" if verbose else " (--verbose lists all)"
    yield f"{counted(counts[0], 'setting')} carried over, {counts[1]} not quite the same, {counts[2]} not here{hint}"
    if verbose:
        for title, lines in (
            ("Carried over:", translation.carried),
            (f"Not given, as {translation.tool} has it:", [line for line in translation.assumed if not line.words]),
        ):
            if lines:
                yield f"\n{title}"
                yield from (f"  {said(line)}" for line in lines)
    yield from remarks(translation)


def said(line: Line) -> str:
    """`my.toml:12: network_dim = 16 -> adapter.rank: how it is not the same`."""
    setting = line.setting
    value = "(a secret)" if SECRET_SETTING.search(setting.name) else shown(setting.value)
    keys = f" -> {', '.join(line.keys)}" if line.keys else ""
    return _safe(f"{setting.place}: {setting.name} = {value}{keys}{f': {line.words}' if line.words else ''}")


def shown(value: Any) -> str:
    """A value on one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONG else f"{text[:LONG]}…"


def _safe(text: str) -> str:
    """Without characters that would end a line, or a comment."""
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def _tree(translation: Translation) -> Tree:
    tree = _nested(translation.values)
    tree.setdefault("data", {})["sources"] = [_nested(source) for source in translation.sources]
    return tree


def _nested(values: dict[str, Chosen]) -> Tree:
    tree: Tree = {}
    for key, chosen in values.items():
        *sections, name = key.split(".")
        section = tree
        for step in sections:
            section = section.setdefault(step, {})
        section[name] = chosen
    return tree


def _plain(value: Any, path: KeyPath, origins: dict[KeyPath, str]) -> Any:
    if isinstance(value, Chosen):
        origins[path] = value.setting.place
        return value.value
    if isinstance(value, list):
        return [_plain(each, (*path, index), origins) for index, each in enumerate(value)]
    return {key: _plain(each, (*path, key), origins) for key, each in value.items()}


def _lines(tree: Tree, path: tuple[str, ...]) -> Iterator[str]:
    for key in sorted(tree, key=lambda key: _place((*path, key))):
        value, spelled = tree[key], inline_yaml(key)
        if isinstance(value, Chosen):
            yield from _value_lines(spelled, value)
        elif isinstance(value, list):
            yield f"{spelled}:"
            for each in value:
                first, *rest = _lines(each, (*path, key, "*"))
                yield from (f"  - {first}", *(f"    {line}" for line in rest))
        else:
            yield f"{spelled}:"
            yield from (f"  {line}" for line in _lines(value, (*path, key)))


def _value_lines(key: str, chosen: Chosen) -> Iterator[str]:
    because = _safe(chosen.setting.name)
    text = inline_yaml(chosen.value)
    if isinstance(chosen.value, list) and len(text) > LONG:
        yield f"{key}:  # {because}"
        yield from (f"  - {inline_yaml(each)}" for each in chosen.value)
    else:
        yield f"{key}: {text}  # {because}"


def _place(path: tuple[str, ...]) -> tuple[bool, int]:
    """Where the schema has a key, or the section of free names that it stands in; a source begins with what it is."""
    places = {
        key: ("*" not in key or not field.is_required(), place)
        for place, (key, field) in enumerate(known_keys().items())
    }
    found = (places.get(path[:length]) for length in range(len(path), 0, -1))
    return next((place for place in found if place is not None), (True, len(places)))
