"""How far a command is: a bar on a terminal, a line now and then in a log; and lines that are said between them."""

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from .plain import plain

EVERY = 30.0
"""Seconds between two lines of a bar in a log."""
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_REDRAWN = re.compile(r"[\r\n]|\x1b\[A")


class Bar(tqdm):
    """A bar; where nobody sees it move each state is a line of its own, and what goes away again is not shown."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str | None = None, total: int | None = None, **options: Any
    ):
        """As of tqdm."""
        stream = options.pop("file", None) or sys.stderr
        if not (hasattr(stream, "isatty") and stream.isatty()):
            kept = options.get("leave", True)
            options |= {"mininterval": EVERY, "maxinterval": EVERY, "miniters": 1, "delay": 0 if kept else EVERY}
            options["bar_format"] = _LINE
            stream = _Log(stream)
        super().__init__(iterable, desc and plain(desc), total, file=stream, **options)


class _Log:
    """What a bar draws, as lines of a log."""

    def __init__(self, stream: TextIO):
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        for drawn in _REDRAWN.split(text):
            if (line := drawn.rstrip()) and line != self._last:
                self._last = line
                self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def say(line: str) -> None:
    """A line on standard output, above the bars that are drawn; names in it steer nothing."""
    tqdm.write(plain(line))
