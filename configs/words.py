"""Counts with their nouns, and what a person has to type, in words."""

import shutil
import sys
from pathlib import Path


def counted(count: int, noun: str) -> str:
    """'1 step', '1,200 steps', '2 batches', '2 entries'; the last word of `noun` is the one that changes."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Of a regular noun."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"


def not_on_path() -> str:
    """Where the command `loraloom` is, if the shell would not find it; "" if it would."""
    if shutil.which("loraloom"):
        return ""
    own = Path(sys.executable).with_name("loraloom")
    if not own.is_file():
        return f"(`loraloom` is `{sys.executable} -m loraloom` here)"
    near = own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own
    return f"(`loraloom` is {near} here; `source {near.parent / 'activate'}` makes it short)"
