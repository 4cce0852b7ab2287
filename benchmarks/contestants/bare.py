"""The bare loop, in this environment: `bare_loop.py`."""

import sys
from pathlib import Path

from ...models.pocket import FOLDER
from ..turns import Contestant
from ..work import Prepared

PROGRAM = Path(__file__).with_name("bare_loop.py")


def contestant(prepared: Prepared, name: str, steps: int) -> Contestant:
    """Its losses and adapter go into a folder that is called as it is."""
    work, out = prepared.work, prepared.run(name)
    base = str(FOLDER) if prepared.base == "pocket" else prepared.base
    settings = [base, prepared.inputs, work.rank, work.dtype, work.threads, steps, out]
    command = [sys.executable, str(PROGRAM), *map(str, settings)]
    return Contestant(name, command, out.with_suffix(".log"), prepared.environment())
