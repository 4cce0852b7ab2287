"""Values as other tools spell them: typed by TOML, or words of a command line. ValueErrors say what there should be."""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One setting as it stands in a file."""

    name: str  # as the tool calls it, without dashes
    value: Any
    place: str  # `my.toml:12`


def whole(value: Any) -> int:
    """512, 512.0 or "512"."""
    try:
        exact = number(value)
    except ValueError:
        exact = 0.5
    if not exact.is_integer():
        raise ValueError("a whole number")
    return int(exact)


def positive(value: Any) -> int:
    """A whole number from 1 on."""
    found = whole(value)
    if found < 1:
        raise ValueError("a whole number from 1 on")
    return found


def number(value: Any) -> float:
    """0.1 or "1e-4"."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number")
    try:
        exact = float(value)
    except ValueError:
        raise ValueError("a number") from None
    if not abs(exact) < float("inf"):
        raise ValueError("a finite number")
    return exact


def numbers(value: Any) -> list[float]:
    """One number, or several in a list or in one text: "0.9, 0.99"."""
    if isinstance(value, str):
        value = value.strip("()[] ").replace(",", " ").split()
    found = [number(each) for each in (value if isinstance(value, list) else [value])]
    if not found:
        raise ValueError("one number or several")
    return found


def text(value: Any) -> str:
    """Words, or a number as it is spelled."""
    if isinstance(value, bool | list | dict):
        raise ValueError("text")
    return str(value)


def texts(value: Any) -> list[str]:
    """One text, or a list of them."""
    return [text(each) for each in (value if isinstance(value, list) else [value])]


def flag(value: Any) -> bool:
    """true or false; a flag of a command line without a value is true."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise ValueError("true or false")
    return found


def file_word(name: str) -> str:
    """A name as a file may have it: other characters become '-'."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "adapter"


def plain(value: Any) -> Any:
    """Anything, as it is."""
    return value
