"""Standard streams that end no command: whoever reads them may be gone, full, or without a letter for what is said."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from .plain import STEERING

_STEERING = re.compile(f"(?![\n\r\t])[{STEERING}]")
_STEERING_ON_A_TERMINAL = re.compile(rf"(?!\x1b\[(?:A|[0-9;]*m))(?![\n\r\t])[{STEERING}]")
"""Bars go up a line, and libraries have colours; a name that could do so is made harmless where it is said."""
_READER_GONE = (errno.EPIPE, errno.EINVAL, errno.EBADF)


class _Lasting:
    """A stream that takes every word, also those that it cannot keep; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        on_a_terminal = hasattr(stream, "isatty") and stream.isatty()
        self._steering = _STEERING_ON_A_TERMINAL if on_a_terminal else _STEERING
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self.lost: OSError | None = None  # why some words were

    def write(self, text: str) -> int:
        harmless = self._steering.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        with self._tolerated():
            self._stream.write(harmless.encode(self._encoding, "backslashreplace").decode(self._encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._tolerated():
            self._stream.flush()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            with suppress(ValueError):  # closed meanwhile
                yield
        except OSError as error:
            self.lost = self.lost or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within, and after it where they refuse still, nothing that is said raises an error.

    What a stream has no letter for, and what steers a terminal, is written as an escape (`\\u72ac`, `\\x1b`).
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, err = (_Lasting(stream or _nowhere()) for stream in before)  # None where Python was started without it
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        out.flush()
        if out.lost is not None and out.lost.errno not in _READER_GONE:
            print(f"warning: the output is not whole ({out.lost.strerror})", file=sys.stderr)
        sys.stdout, sys.stderr = before
        for stream in before:
            if stream is not None:
                _give_up_if_refused(stream)


def names_in_utf8() -> None:
    """Starts this process again in Python's UTF-8 mode where its locale has no letters for what files may be called.

    It stays the same process for everybody else. What it says is in the encoding that it had.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    said = f"{getattr(sys.stdout, 'encoding', None) or 'utf-8'}:backslashreplace"
    changed = {"PYTHONUTF8": "1", "PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or said}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | changed)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _open_closed_descriptors() -> None:
    """Else the next file that is opened would be standard output, and take what libraries and children say."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which this is


def _give_up_if_refused(stream: TextIO) -> None:
    """What a stream could not write would fail once more at the end of Python, and change the exit code to 120."""
    try:
        stream.flush()
    except ValueError:  # closed
        pass
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
