"""A YAML file as plain values plus the place of every key. Knows YAML and files, not the schema.

YAML is read as version 1.2 reads it: only `true` and `false` are booleans (`no` is a word), `1e-4` is a number, and
a date is text.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .bounded import CONFIG, LARGEST, LIBYAML, compose_yaml, read_text, why_no_text
from .errors import UserError
from .plain import plain

KeyPath = tuple[str | int, ...]
"""Where a value is: section names, keys, and indexes of lists."""

SCALAR_PATTERNS: dict[str, tuple[str, str]] = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""YAML 1.2's core schema: type to (spelling, first characters). Octal and hexadecimal numbers are left out."""


class CoreLoader(yaml.SafeLoader):
    """Composes nodes whose plain scalars are resolved by `SCALAR_PATTERNS` instead of YAML 1.1's rules."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class FastCoreLoader(LIBYAML):
    """The same on libyaml, for long files."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


def add_core_scalars(resolver: type[yaml.resolver.Resolver]) -> None:
    """Teach a PyYAML loader or dumper the plain scalars of YAML 1.2."""
    for tag, (pattern, first) in SCALAR_PATTERNS.items():
        first_characters = [*first, ""] if tag == "null" else list(first)  # "": a value that is not there
        resolver.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})$"), first_characters)


add_core_scalars(CoreLoader)
add_core_scalars(FastCoreLoader)

CONSTRUCT: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:str": str,
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


@dataclass(slots=True)
class Document:
    """Values of a file, or of several that were laid over one another."""

    values: Any
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Key to the place that set it, such as `my.yaml:12` or `command line`."""
    problems: list[str] = field(default_factory=list)
    """One line for each thing that is wrong with the text although it can be read, such as a key given twice."""

    def where(self, path: KeyPath, otherwise: str) -> str:
        """The place of a key, or of the nearest section around it that was written down."""
        places = (self.origins.get(path[:length]) for length in range(len(path), 0, -1))
        return next((place for place in places if place), otherwise)


def overlay(base: Document, top: Document, path: KeyPath = ()) -> Document:
    """`top` laid over what `base` has at `path`: mappings merge deeply, lists and scalars replace."""
    values = _put(base.values, path, top.values)
    placed = {(*path, *inner): place for inner, place in top.origins.items()}
    replaced = {where for where in placed if not isinstance(_at(values, where), dict)}
    kept = {  # places inside a list that was replaced would be found for keys that are missing in the new one
        where: place
        for where, place in base.origins.items()
        if not any(where[:length] in replaced for length in range(len(where)))
    }
    around = {path[:length]: placed[path] for length in range(1, len(path))}  # sections that may be new
    return Document(values, around | kept | placed, base.problems + top.problems)


def resolve(values: Any, key: str) -> KeyPath:
    """The path of a dotted key such as `data.sources.0.path`, which may be new. UserError if nothing can be there."""
    path: KeyPath = ()
    for word in key.split("."):
        step: str | int = word
        if isinstance(values, list):
            if not (word.isdecimal() and int(word) < len(values)):
                raise UserError(f"{key}: {dotted(path)} has {len(values)} items: the first is {dotted(path)}.0")
            step = int(word)
            values = values[step]
        elif isinstance(values, dict) or values is None:
            values = (values or {}).get(word)
        else:
            raise UserError(f"{key}: {dotted(path)} is {values!r}, which has no keys of its own")
        path = (*path, step)
    return path


def merge(base: Any, top: Any) -> Any:
    """`top` over `base`: mappings key by key and deeply; a list or a scalar replaces what was there."""
    if not (isinstance(base, dict) and isinstance(top, dict)):
        return top
    return base | {key: merge(base.get(key), value) for key, value in top.items()}


def _put(base: Any, path: KeyPath, value: Any) -> Any:
    if not path:
        return merge(base, value)
    step, rest = path[0], path[1:]
    if isinstance(base, list):
        return [_put(item, rest, value) if index == step else item for index, item in enumerate(base)]
    return (base or {}) | {step: _put((base or {}).get(step), rest, value)}


def _at(values: Any, path: KeyPath) -> Any:
    for step in path:
        values = values[step]
    return values


def dotted(path: KeyPath) -> str:
    """`data.sources.0.path`"""
    return ".".join(str(step) for step in path)


def read_document(path: Path) -> Document:
    """A YAML file whose top level is a mapping. UserError if it cannot be read as one."""
    return _checked(parse_document(_read(path), lambda line: f"{path}:{line}", str(path)), path)


def parse_document(text: str, place: Callable[[int], str], name: str) -> Document:
    """Values and places of YAML text; `place` spells a line number, `name` the whole. UserError on a syntax error."""
    try:
        root = compose_yaml(text, CoreLoader, FastCoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = ", ".join(part for part in (error.context, error.problem) if part)
        if "escape" in words:
            words += "; a path with backslashes stands in single quotes: 'C:\\photos'"
        raise UserError(f"{place(mark.line + 1) if mark else name}: not valid YAML: {words}") from error
    except yaml.reader.ReaderError as error:
        where = place(text.count("\n", 0, error.position) + 1)
        raise UserError(f"{where}: not valid YAML: the character {chr(int(error.character))!r}") from error
    except ValueError as error:
        raise UserError(f"{name}: not valid YAML: {error}") from error
    return _Reading(place).document(root)


def _checked(document: Document, path: Path) -> Document:
    if isinstance(document.values, dict):
        return document
    if document.values is None:
        raise UserError([*document.problems, f"{path}: the file is empty; a config has sections such as `model:`"])
    found = "a list" if isinstance(document.values, list) else "one value"  # not which: it may be nobody's business
    raise UserError(f"{path}:1: a config is a mapping (`section:` and `key: value` lines), found {found}")


def _read(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a YAML file")
    return read_text(path, CONFIG)


class _Reading:
    """One walk over YAML's nodes, which collects places and problems."""

    def __init__(self, place: Callable[[int], str]):
        self.place = place
        self.origins: dict[KeyPath, str] = {}
        self.problems: list[str] = []
        self.open: list[yaml.Node] = []

    def document(self, root: yaml.Node | None) -> Document:
        values = None if root is None else self.value(root, ())
        return Document(values, self.origins, self.problems)

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if any(node is outer for outer in self.open):
            self.problem(node, path, "an alias to a value that contains the alias")
            return None
        self.open.append(node)
        if isinstance(node, yaml.MappingNode):
            result = {key: self.value(value, (*path, key)) for key, value in self.entries(node, path)}
        else:
            result = [self.item(value, (*path, index)) for index, value in enumerate(node.value)]
        self.open.pop()
        return result

    def item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.origins[path] = self.line(node)
        return self.value(node, path)

    def entries(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        """Key and value of each entry; of a key given twice the first."""
        first_lines: dict[str, int] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, path, "a list or a mapping as a key; a key is a word")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if reason := why_no_text(key):
                self.problem(key_node, path, f"a key that {reason}")
                continue
            here = (*path, key)
            if key in first_lines:
                self.problem(key_node, here, f"given twice, in line {first_lines[key]} and in line {line}")
                continue
            first_lines[key] = line
            self.origins[here] = self.line(key_node)
            yield key, value

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        construct = CONSTRUCT.get(node.tag)
        if construct is None:
            self.problem(node, path, f"the tag {node.tag!r}; a config has plain values only")
            return None
        try:
            value = construct(node.value)
        except ValueError:  # an explicit tag, such as `!!int many`, or 5,000 digits
            self.problem(node, path, f"{node.value[:40]!r} is not what its tag {node.tag!r} says")
            return None
        if isinstance(value, int) and abs(value) > LARGEST:
            self.problem(node, path, f"the number {node.value[:24]}{'…' * (len(node.value) > 24)} is too large")
            return None
        if isinstance(value, str) and (reason := why_no_text(value)):
            self.problem(node, path, f"the text {reason}")
            return plain(value)
        return value

    def line(self, node: yaml.Node) -> str:
        return self.place(node.start_mark.line + 1)

    def problem(self, node: yaml.Node, path: KeyPath, words: str) -> None:
        self.problems.append(": ".join(part for part in (self.line(node), dotted(path), words) if part))
