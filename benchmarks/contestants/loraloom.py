"""loraloom itself: `python -m loraloom.train`, the whole program with its files, its bar and its caches."""

import sys
from typing import Any

from ..turns import Contestant
from ..work import Prepared

VARIANTS: dict[str, dict[str, Any]] = {
    "loraloom": {},
    "loraloom, plain layers": {"fast": False},
    "loraloom, compiled blocks": {"compile": True},
    "loraloom, compiled": {"compile": "model"},
    "loraloom, checkpointing": {"gradient_checkpointing": True},
    "loraloom, checkpointing at the ends": {"gradient_checkpointing": ["down_blocks.0", "up_blocks.3"]},
}
"""Name -> settings of the loop."""
_EAGER = ("loraloom", "loraloom, plain layers")
USUAL = {"pocket": (*_EAGER, "loraloom, compiled"), "sd1": _EAGER, "sdxl": _EAGER}
"""What takes part where nothing is said: compiling the large models takes minutes, and on a CPU it does not pay."""


def contestant(prepared: Prepared, name: str, steps: int) -> Contestant:
    """A variant."""
    config = prepared.write_config(name, steps=steps, **VARIANTS[name])
    command = [sys.executable, "-m", "loraloom.train", str(config), "--overwrite"]
    return Contestant(name, command, config.with_suffix(".log"), prepared.environment())
