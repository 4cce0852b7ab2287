"""Pydantic's errors in our words: the key, what was asked, what is allowed, and which key may have been meant."""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from .choices import did_you_mean
from .document import KeyPath, dotted
from .schema import RunConfig
from .section import Section

_TYPE = re.compile(r"<|[A-Z]|(?:float|int|str|bool|constrained-\w+|function-.*|(?:dict|list|tuple)\[.*)$")
"""What pydantic calls the types of a union, where the schema has no such key."""


@functools.cache
def known_keys() -> dict[KeyPath, FieldInfo]:
    """Every key of the schema, as a path with `*` for any index of a list and any name of the user's."""
    return dict(keys_of(RunConfig, ()))


def keys_of(section: type[BaseModel], path: KeyPath) -> Iterator[tuple[KeyPath, FieldInfo]]:
    for name, field in section.model_fields.items():
        here = (*path, name)
        yield here, field
        inside = (*here, "*") if get_origin(field.annotation) in (list, dict) else here
        for inner in sections_of(field.annotation):
            yield from keys_of(inner, inside)


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a value of this type may be: none for plain values, several for a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_of(argument)]


def explain(details: ErrorDetails, known: Mapping[KeyPath, FieldInfo], prefix: KeyPath = ()) -> tuple[KeyPath, str]:
    """Path and words for one of pydantic's errors; `known` are the keys of the tree, whose root is at `prefix`."""
    path = _path(details["loc"], known, names_a_key=details["type"] in ("extra_forbidden", "missing"))
    match details["type"]:
        case "extra_forbidden":
            words = f"unknown key{_suggestion(_pattern(path, known), known)}"
        case "missing":
            words = f"is missing; it has no default ({_meaning(known.get(_pattern(path, known)))})"
        case kind:
            words = _complaint(kind, details)
    return (*prefix, *path), words


def _path(loc: tuple[int | str, ...], known: Mapping[KeyPath, FieldInfo], *, names_a_key: bool) -> KeyPath:
    """Where an error is. Of a value of several types pydantic names the type too, which is no key."""
    path: KeyPath = ()
    for place, step in enumerate(loc):
        if step == "[key]":  # the key of a mapping is what is wrong
            continue
        if isinstance(step, str):
            here = _pattern((*path, step), known)
            is_kind = path and isinstance(path[-1], int) and loc[place - 1] == path[-1] and _has_kinds(path[:-1], known)
            is_known = any(key[: len(here)] == here for key in known)
            is_named = names_a_key and place == len(loc) - 1
            if is_kind or not (is_known or is_named or not _TYPE.match(step)):
                continue
        path = (*path, step)
    return path


def _has_kinds(path: KeyPath, known: Mapping[KeyPath, FieldInfo]) -> bool:
    """Whether an entry of the list at `path` may be one of several sections."""
    field = known.get(_pattern(path, known))
    return field is not None and len(sections_of(field.annotation)) > 1


def _pattern(path: KeyPath, known: Mapping[KeyPath, FieldInfo]) -> KeyPath:
    pattern: KeyPath = ()
    for step in path:
        any_step = (*pattern, "*")
        pattern = any_step if any(key[: len(any_step)] == any_step for key in known) else (*pattern, step)
    return pattern


def _meaning(field: FieldInfo | None) -> str:
    return (field.description if field and field.description else "a value of yours").rstrip(".")


def _suggestion(path: KeyPath, known: Mapping[KeyPath, FieldInfo]) -> str:
    """What an unknown key may have meant: the same word elsewhere, a similar one beside it, a similar one elsewhere."""
    word = str(path[-1])
    if word == "<<":
        return ", which YAML's newer versions do not merge; write the keys out, or use `extends` for whole files"
    beside = sorted({str(other[-1]) for other in known if other[:-1] == path[:-1]})
    if path in known and known[path].is_required():
        kinds = [name for name in beside if known[(*path[:-1], name)].is_required()]
        return f" beside another kind of source: an entry has one of {', '.join(kinds)}"
    if path in known:
        return f" in an entry without `{_mark_of_kind(path, known)}`"
    if same := [other for other in known if other[-1] == word]:
        return _or([dotted(other) for other in same if "*" not in other] or [dotted(other) for other in same])
    if near := did_you_mean(word, beside):
        return near
    if near := did_you_mean(word, {str(other[-1]) for other in known}):
        return _or([dotted(other) for other in known if f'"{other[-1]}"' in near])
    return f"; allowed here: {', '.join(beside) or 'none'}"


def _mark_of_kind(path: KeyPath, known: Mapping[KeyPath, FieldInfo]) -> str:
    """The required key of that kind of list entry which has the last key of `path`."""
    kinds = sections_of(known[path[:-2]].annotation)
    fields = next(kind.model_fields for kind in kinds if path[-1] in kind.model_fields)
    return next(name for name, field in fields.items() if field.is_required())


def _or(words: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(json.dumps(word) for word in words)}?)"


def _complaint(kind: str, details: ErrorDetails) -> str:
    """What is allowed and what was found."""
    value, context = details["input"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        near = did_you_mean(str(value), _literals(context["expected"]))
        return f"should be {context['expected']}, found {shown(value)}{near}"
    allowed = {
        "model_type": "a section (`key: value` lines)",
        "model_attributes_type": "a section (`key: value` lines)",
        "dict_type": "a mapping (`key: value` lines)",
        "list_type": "a list (`[a, b]`)",
        "string_type": "text (put it in quotes)",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "too_short": "a list with something in it",
    }.get(kind)
    if allowed:
        return f"should be {allowed}, found {shown(value)}"
    words = details["msg"].removeprefix("Input ").removeprefix("String ").removeprefix("List ")
    return f"{words}, found {shown(value)}"


def _literals(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").replace("'", "").split(", ")


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
