"""What the machine gives this process."""

import os


def cores() -> int:
    """How many it may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
