"""Counts with their nouns, and what a person has to type, in words."""

import re
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


def agreeing(count: int, what: str) -> str:
    """'1 ignored .heic file' of 'ignored .heic files': the first noun of `what`, which is many, as the number is."""
    if count != 1:
        return f"{count:,} {what}"
    return f"1 {_MANY.sub(lambda found: 'copy' if found[0] == 'copies' else found[0][:-1], what, count=1)}"


_MANY = re.compile(r"\b(?:files|images|captions|masks|members|samples|copies|rows|folders|lines|lists|shards)\b")


def not_on_path() -> str:
    """Where the command `loraloom` is, if the shell would not find it; "" if it would."""
    if shutil.which("loraloom"):
        return ""
    own = Path(sys.executable).with_name("loraloom")
    if not own.is_file():
        return f"(`loraloom` is `{sys.executable} -m loraloom` here)"
    near = own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own
    return f"(`loraloom` is {near} here; `source {near.parent / 'activate'}` makes it short)"
