"""What the machine gives this process."""

import os
import re
from pathlib import Path

from .paths import expanded


def cores() -> int:
    """How many it may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """CPU threads of a process where the config names none: those of `$OMP_NUM_THREADS`, else its share of the cores.

    accelerate and torchrun set the variable for what they start, which is nobody's wish.
    """
    share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    asked = re.match(r"\s*(\d{1,3})(?!\d)", os.environ.get("OMP_NUM_THREADS", ""))
    return share if launched or asked is None else int(asked[1]) or share


def cache_folder(configured: str | None) -> Path:
    """Folder of all caches: the configured one, `$LORALOOM_CACHE`, or `loraloom` in the user's cache folder."""
    if chosen := configured or os.environ.get("LORALOOM_CACHE"):
        return Path(expanded(chosen))
    return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "loraloom"
