"""Paths as users write them: `~` and `$NAME` stand for what a shell would put there, and what no path can be is told.

All paths of configs, requests and the command line go through `expanded`, so that no folder called `~` is ever made.
"""

import os
import re

from .errors import UserError
from .plain import plain

LONGEST_NAME = 255  # bytes of one part, on every usual file system
LONGEST_PATH = 4_095  # bytes, of Linux
_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a newline, say, which would be two lines wherever the path is told
_SECRET = re.compile(
    r"token|secret|passw|passphrase|credential|cookie|api_?key|(^|_)(access)?key(_|$)|(^|_)(auth|pat|pwd)(_|$)", re.I
)


def expanded(text: str) -> str:
    """The path with `~`, `~user`, `$NAME` and `${NAME}` replaced.

    UserError for a variable or a user that is not there, unless a file is called so; for a variable that sounds like a
    secret, which would end up in files; and as of `checked`.
    """
    return checked(_with_home(_VARIABLE.sub(lambda found: _value(found, text), text), text))


def checked(text: str) -> str:
    """The path as it is. UserError for control characters, names that are too long, and what is not UTF-8."""
    if not text:
        raise UserError("is empty; a path is needed")
    if found := _CONTROL.search(text):
        odd = plain(found[0])
        advice = (
            "rename it" if odd not in ("\\n", "\\t", "\\r") else "backslashes of a path stand in single quotes in YAML"
        )
        raise UserError(f"{shortened(text)}: a path with the control character {odd}; {advice}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{shortened(text)}: this name is not UTF-8, so no config can say it: rename it") from None
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UserError(f"{shortened(text)}: no name in this locale ({error.encoding}); set PYTHONUTF8=1") from None
    if (longest := max(map(len, encoded.split(b"/")))) > LONGEST_NAME:
        raise UserError(f"{shortened(text)}: a name of {longest} bytes; file systems allow {LONGEST_NAME}")
    if len(encoded) > LONGEST_PATH:
        raise UserError(f"{shortened(text)}: a path of {len(encoded)} bytes; the system allows {LONGEST_PATH}")
    return text


def sounds_secret(variable: str) -> bool:
    """Whether a variable of the environment is called as those are that hold passwords and keys: HF_TOKEN."""
    return _SECRET.search(variable) is not None


def shortened(text: str, most: int = 80) -> str:
    """A path in a message: on one line, its middle left out where it is long."""
    text = plain(text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def _value(found: re.Match[str], text: str) -> str:
    name = found["name"] or found["braced"]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise UserError(f"{shortened(text)}: {found[0]} is no variable; $NAME and ${{NAME}} are replaced")
    if sounds_secret(name):
        raise UserError(f"{shortened(text)}: ${name} sounds like a secret, and paths are written into files")
    if name in os.environ:
        return os.environ[name]
    if os.path.lexists(_lookable(text)):
        return found[0]
    raise UserError(f"{shortened(text)}: ${name} is not set in the environment")


def _with_home(text: str, asked: str) -> str:
    if not text.startswith("~"):
        return text
    home = os.path.expanduser(_lookable(text))
    if home != text or os.path.lexists(home):
        return home
    user = text.split("/")[0].removeprefix("~")
    whose = f"no user {user!r}" if user else "no home folder"
    raise UserError(f"{shortened(asked)}: there is {whose} here; ./{shortened(text)} is a name that begins with ~")


def _lookable(text: str) -> str:
    """What the system can be asked about: the check comes later, and tells it better."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def looked_in(path: object) -> str:
    """` in FOLDER`, of a path that starts at the folder which the command was started in; else nothing."""
    return "" if os.path.isabs(str(path)) else f" in {os.getcwd()}"
