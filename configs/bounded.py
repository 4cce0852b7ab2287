"""Structure from outside, read within bounds: regular files only; size, depth, aliases and numbers are limited.

What is read is a value or a UserError of one line that names the file, in time and memory that the limits say. Headers
of safetensors files and texts of PNGs are read by `headers`. Imports no torch.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Generator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from .errors import UserError

if TYPE_CHECKING:
    import tomllib

    from pydantic import BaseModel

KIB, MIB = 2**10, 2**20
CONFIG = 2 * MIB
"""Bytes of a file that people write: configs, requests, scripts, prompts."""
RECORD = 64 * MIB
"""Bytes of a JSON file: run.json, samples.json, model_index.json, vocabularies, indexes of weights."""
HISTORY = 256 * MIB
"""Bytes of a file with a line for each step."""
LINE = 1 * MIB
"""Bytes of one line of such a file, or of a list of images."""
PICTURE = 1024 * MIB
"""Bytes of an encoded image."""
DEPTH = 64
"""Sections within sections; no honest file has more than a dozen."""
CONTAINERS = 2_000_000
"""Lists and objects of one text: each takes 60 bytes or more."""
EXPANDED = 300_000
"""Values of a YAML file, after its aliases stand for what they mean."""
LARGEST = 2**63 - 1
"""Of whole numbers."""

LIBYAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Its loader, ten times as fast as that in Python."""

Model = TypeVar("Model", bound="BaseModel")

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"{}", b"[]")
_LARGE = re.compile(rb"[0-9]{19}|[eE]\+?[0-9]{3}")
"""What may be a number beyond LARGEST, or beyond what a float holds."""
_LONG = 100_000  # characters of YAML


class Missing(UserError):
    """There is no such file."""


def regular(path: str | Path, limit: int | None = None) -> os.stat_result:
    """What the system says of a regular file, or of one that a link leads to; nothing is opened, so nothing waits.

    Missing where there is none; UserError for a folder, FIFO, socket or device, and for more than `limit` bytes.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, NUL
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    _check_kind(path, status, limit)
    return status


def _check_kind(path: str | Path, status: os.stat_result, limit: int | None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is no regular file but a pipe, a socket or a device, which is never opened")
    if limit is not None and status.st_size > limit:
        raise UserError(f"{path}: has {status.st_size:,} bytes, more than the {limit:,} that such a file may have")


def open_regular(path: str | Path, limit: int | None = None) -> BufferedReader:
    """A regular file for reading, as `regular` says; it never waits for somebody who writes."""
    regular(path, limit)
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
        stream = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError as error:
        raise Missing(f"{path}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        _check_kind(path, os.fstat(stream.fileno()), limit)  # another one may have taken its place
    except UserError:
        stream.close()
        raise
    return stream


def read_bytes(path: str | Path, limit: int = RECORD) -> bytes:
    """All bytes of a regular file. Missing, or UserError, as of `regular`."""
    with open_regular(path, limit) as stream:
        try:
            content = stream.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > limit:  # it grew
        raise UserError(f"{path}: has more than the {limit:,} bytes that such a file may have")
    return content


def read_text(path: str | Path, limit: int = RECORD) -> str:
    """UTF-8 text of a regular file, without its byte order mark. Missing, or UserError, as of `regular`."""
    raw = read_bytes(path, limit)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"0x{raw[error.start]:02x}"
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {byte}); save the file as UTF-8") from error


def why_no_text(text: str) -> str | None:
    """Why words cannot be trained on, sampled or written: they hold NUL, or half of a character. None: they can."""
    if "\0" in text:
        return "holds a NUL character; take it out"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a character; write it as UTF-8"
    return None


def read_json(path: str | Path, kind: type = dict, limit: int = RECORD) -> Any:
    """What a JSON file holds, an object unless another `kind` is given. Missing, or UserError."""
    values = parse_json(read_text(path, limit), str(path))
    if not isinstance(values, kind):
        raise UserError(f"{path}: should hold {_KINDS.get(kind, kind.__name__)}, found {kind_of(values)}")
    return values


_KINDS = {dict: "a JSON object", list: "a JSON list", str: "text", int: "a whole number", float: "a number"}


def kind_of(values: Any) -> str:
    """What people call the type of a JSON value."""
    return "nothing" if values is None else _KINDS.get(type(values), "true or false")


def parse_json(text: str | bytes, name: str, *, checked_later: bool = False) -> Any:
    """The value of a JSON text. UserError `name: what is wrong` for what is none, or goes beyond the bounds.

    Whoever looks at every value anyway says `checked_later` and saves half of the time: the depth is then Python's.
    """
    try:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if not checked_later or raw.count(b"[") + raw.count(b"{") > CONTAINERS:
            _check_nesting(raw)
        hooks: dict[str, Any] = {"parse_int": _int, "parse_float": _float} if _LARGE.search(raw) else {}
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: is not JSON ({error.msg} at line {error.lineno} column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise UserError(f"{name}: is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _check_nesting(raw: bytes) -> None:
    """ValueError for JSON that is deeper, or has more parts, than `DEPTH` and `CONTAINERS` allow."""
    opened = raw.count(b"[") + raw.count(b"{")
    if opened <= DEPTH:
        return
    brackets = _STRING.sub(b"", raw).translate(_ALIKE, _OTHERS)
    if brackets.count(b"[") > CONTAINERS:
        raise ValueError(f"holds more than {CONTAINERS:,} lists and objects")
    for _ in range(DEPTH):  # each turn takes the innermost away
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    if b"[" in brackets:  # what is left otherwise closes what was never opened, and is no JSON
        raise ValueError(f"is nested more than {DEPTH} deep")


def _int(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ValueError(f"the number {text[:24]}{'…' if len(text) > 24 else ''} is too large")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text[:24]}{'…' if len(text) > 24 else ''} is too large")
    return value


def parse_record(values: Any, model: type[Model], name: str) -> Model:
    """A record of ours from the values of a file. UserError `name: key: what is wrong` for fields of other types."""
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise UserError(f"{name}: {f'{place}: ' if place else ''}{first['msg']}; the file is damaged") from error


def read_record(path: str | Path, model: type[Model], limit: int = RECORD) -> Model:
    """A record of ours from a JSON file. Missing, or UserError."""
    return parse_record(read_json(path, object, limit), model, str(path))


def lines_of(path: str | Path, limit: int = LINE) -> Generator[tuple[int, bytes], None, None]:
    """Number, counted from 1, and bytes of each line, with its end. UserError for a line of more than `limit` bytes."""
    with open_regular(path) as stream:
        number = 1
        while line := stream.readline(limit + 1):
            if len(line) > limit:
                raise UserError(f"{path} line {number}: has more than the {limit:,} bytes that a line may have")
            yield number, line
            number += 1


def compose_yaml(text: str, loader: Any, fast: Any) -> yaml.Node | None:
    """The nodes of a YAML text. YAMLError, or ValueError for what goes beyond the bounds.

    Two classes that read the same: a loader in Python, whose complaints are clearer, and one on libyaml for long texts.
    """
    with suppress(yaml.YAMLError):  # which the other one words
        _check_events(text)
    reading = (loader if len(text) < _LONG else fast)(text)
    try:
        root = reading.get_single_node()
    except RecursionError as error:
        raise ValueError(f"nested more than {DEPTH} deep") from error
    finally:
        reading.dispose()
    if root is not None:
        _expanded(root, {}, set())
    return root


def _expanded(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int], *, circles: bool = True) -> int:
    """How many values a node is with all aliases in it; an alias to what contains it counts as one."""
    if id(node) in open_nodes:
        if not circles:
            raise ValueError("an alias to a value that contains the alias")
        return 1
    if id(node) not in sizes:
        open_nodes.add(id(node))
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        total = 1 + sum(_expanded(each, sizes, open_nodes, circles=circles) for each in inner)
        if total > EXPANDED:
            raise ValueError(f"more than {EXPANDED:,} values, with what its aliases stand for")
        open_nodes.discard(id(node))
        sizes[id(node)] = total
    return sizes[id(node)]


def parse_yaml(text: str, name: str, loader: Any = None) -> Any:
    """The plain values of a YAML text, as a safe loader has them, PyYAML's own if none is given.

    UserError `name: what is wrong`.
    """
    try:
        _check_events(text)
        reading = (loader or LIBYAML)(text)
        try:
            root = reading.get_single_node()
            if root is None:
                return None
            _expanded(root, {}, set(), circles=False)
            return reading.construct_document(root)
        finally:
            reading.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{name}: this is not YAML ({' '.join(str(error).split())[:200]})") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # a date of the 99th month, among others
        raise UserError(f"{name}: this is not YAML that can be read ({str(error)[:200]})") from error


def _check_events(text: str) -> None:
    """ValueError for more than composers, which recurse (libyaml's in C, where nothing catches it), would survive."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=LIBYAML)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        if count > EXPANDED:
            raise ValueError(f"more than {EXPANDED:,} values")


def parse_toml(text: str, name: str, place: "Callable[[tomllib.TOMLDecodeError], str] | None" = None) -> dict[str, Any]:
    """The values of a TOML text. UserError `name: what is wrong`; `place` spells where a syntax error is."""
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{place(error) if place else name}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{name}: is nested too deeply") from error
    except ValueError as error:  # a whole number of 5,000 digits
        raise UserError(f"{name}: not valid TOML: {error}") from error
    if is_deep(values):
        raise UserError(f"{name}: is nested more than {DEPTH} deep")
    return values


def is_deep(values: Any) -> bool:
    """Whether lists and mappings lie more than `DEPTH` within one another."""
    level = [values]
    for _ in range(DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True
