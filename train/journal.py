"""What is written about a run, beside its weights: a disk that refuses it costs a warning and never the training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from ..configs.files import reason
from ..configs.ownership import append, begin_log, cut_half_line
from ..configs.progress import say


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Within, what cannot be written is a warning."""
    try:
        yield
    except OSError as error:
        say(f"warning: {what} cannot be written ({reason(error)})")
    except UserError as error:
        say(f"warning: {what} cannot be written ({error})")


class Journal:
    """A file with one JSON object in each line; lines that the disk refuses wait and are written with the next.

    `owner` is the folder whose record has it; without one it lies in a place of ours alone. UserError for a file there
    that is not ours.
    """

    def __init__(self, file: Path, owner: Path | None = None, by: str = ""):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.waiting, self.refused = file, b"", False
        if owner is not None:
            begin_log(file, owner, by)
        cut_half_line(file)

    def add(self, entry: dict[str, Any]) -> None:
        """Appends a line; a warning for the first of those that have to wait."""
        self.waiting += json.dumps(entry).encode() + b"\n"
        try:
            append(self.file, self.waiting)
        except OSError as error:
            if not self.refused:
                say(f"warning: {self.file} cannot be written ({reason(error)}); its lines wait in memory")
            self.refused = True
        else:
            self.waiting, self.refused = b"", False

    def close(self) -> None:
        """A last try; a warning says how many lines are lost."""
        if not self.waiting:
            return
        try:
            append(self.file, self.waiting)
        except OSError as error:
            lost = self.waiting.count(b"\n")
            say(f"warning: {self.file}: {lost} line{'s' * (lost != 1)} could not be written ({reason(error)})")
        self.waiting = b""
