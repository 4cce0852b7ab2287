"""The shape of values that JSON or YAML gave: which types stand where, as far as others rely on it.

A shape is a type, a tuple of shapes of which one fits, a list with the shape of its items, or a mapping of keys to
shapes, where `*` stands for all other keys and `name!` for one that has to be there; or `file_name`. Null
fits all but items of lists (where no shape is None) and keys with `!`.
"""

import json
import math
from typing import Any, TypeAlias

from .headers import is_plain_name

Shape: TypeAlias = Any
NUMBER = (int, float)


def file_name(value: str) -> bool:
    """Whether it is the name of a file or folder in the folder that the record lies in; as a shape, such a text."""
    return is_plain_name(value.removesuffix("/"))


def misfit(value: Any, shape: Shape, place: str = "") -> str | None:
    """The first place where a value of JSON or YAML is not of its shape, in words; None where there is none."""
    if value is None:
        return None
    if isinstance(shape, tuple):
        found = [misfit(value, each, place) for each in shape]
        return None if None in found else found[-1]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _words(value, place)
        if None in value and not (isinstance(shape[0], tuple) and None in shape[0]):
            return f"{place}.{value.index(None)} is missing"
        return next(filter(None, (misfit(item, shape[0], f"{place}.{k}") for k, item in enumerate(value))), None)
    if isinstance(shape, dict):
        return _misfit_of_mapping(value, shape, place)
    if shape is None:
        return _words(value, place)
    if shape is file_name:
        return None if isinstance(value, str) and file_name(value) else _words(value, place)
    if shape in NUMBER and isinstance(value, int | float) and not isinstance(value, bool):
        fits = (shape is float or isinstance(value, int)) and math.isfinite(value)
        return None if fits else _words(value, place)
    return None if type(value) is shape else _words(value, place)


def _misfit_of_mapping(value: Any, shape: dict[str, Shape], place: str) -> str | None:
    if not isinstance(value, dict):
        return _words(value, place)
    for key, inner in shape.items():
        name = key.removesuffix("!")
        here = f"{place}.{name}".lstrip(".")
        if key.endswith("!") and name != "*" and value.get(name) is None:
            return f"{here} is missing"
        if name != "*" and (found := misfit(value.get(name), inner, here)):
            return found
    for key in value.keys() - {name.removesuffix("!") for name in shape}:
        if not isinstance(key, str):
            return f"{place or 'it'} has the key {str(key)[:40]!r}"
        here = f"{place}.{key[:40]}".lstrip(".")
        if "*!" in shape and value[key] is None:
            return f"{here} is missing"
        if (inner := shape.get("*", shape.get("*!"))) is not None and (found := misfit(value[key], inner, here)):
            return found
    return None


def _words(value: Any, place: str) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{place or 'it'} cannot be {shown if len(shown) <= 60 else shown[:60] + '…'}"
