"""What the machine gives this process."""

import os
from pathlib import Path

from .paths import expanded


def cores() -> int:
    """How many it may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder(configured: str | None) -> Path:
    """Folder of all caches: the configured one, `$LORALOOM_CACHE`, or `loraloom` in the user's cache folder."""
    if chosen := configured or os.environ.get("LORALOOM_CACHE"):
        return Path(expanded(chosen))
    return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "loraloom"
