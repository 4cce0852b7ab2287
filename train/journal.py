"""What is written about a run, beside its weights: a disk that refuses it costs a warning and never the training."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..configs.errors import UserError
from ..configs.files import reason


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Within, what cannot be written is a warning."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"warning: {what} cannot be written ({reason(error)})")
    except UserError as error:
        tqdm.write(f"warning: {what} cannot be written ({error})")


class Journal:
    """A file with one JSON object in each line; lines that the disk refuses wait and are written with the next."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.waiting, self.refused = file, b"", False
        if file.exists():
            os.truncate(file, _whole_lines(file))

    def add(self, entry: dict[str, Any]) -> None:
        """Appends a line; a warning for the first of those that have to wait."""
        self.waiting += json.dumps(entry).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self.refused:
                tqdm.write(f"warning: {self.file} cannot be written ({reason(error)}); its lines wait in memory")
            self.refused = True
        else:
            self.waiting, self.refused = b"", False

    def _write(self) -> None:
        with self.file.open("ab", buffering=0) as stream:
            end = stream.tell()
            if stream.write(self.waiting) < len(self.waiting):  # a disk takes what it has room for, without an error
                stream.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _whole_lines(file: Path) -> int:
    """Bytes up to the last newline: a run that was killed may have left half a line."""
    return file.read_bytes().rfind(b"\n") + 1
