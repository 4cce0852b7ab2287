"""What the machine gives this process, where systems differ. What Windows lacks is asked for in another way.

Whatever else needs `fcntl`, `resource` or a signal that not every system has goes through here, too.
"""

import os
import re
import sys
from pathlib import Path

from .paths import expanded


def cores() -> int:
    """How many it may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """CPU threads of a process where the config names none: those of `$OMP_NUM_THREADS`, else its share of the cores.

    accelerate and torchrun set the variable for what they start, which is nobody's wish.
    """
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = max(1, cores() // max(1, int(beside) if beside.isdecimal() else 1))
    launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    asked = re.match(r"\s*(\d{1,3})(?!\d)", os.environ.get("OMP_NUM_THREADS", ""))
    return share if launched or asked is None else int(asked[1]) or share


def cache_folder(configured: str | None) -> Path:
    """Folder of all caches: the configured one, `$LORALOOM_CACHE`, or `loraloom` in the user's cache folder."""
    if chosen := configured or os.environ.get("LORALOOM_CACHE"):
        return Path(expanded(chosen))
    return Path(expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "loraloom"


def memory() -> int:
    """Bytes of memory of the machine; 0 where nobody can say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def peak_memory() -> int:
    """Bytes: the most that this process had in use until now; 0 where nobody can say."""
    try:
        import resource
    except ImportError:
        return _peak_of_windows()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_of_windows() -> int:
    try:
        import psutil  # accelerate needs it
    except ImportError:
        return 0
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file, as filelock takes it. OSError where that cannot be known."""
    try:
        import fcntl
    except ImportError:
        return _is_held_on_windows(lock)
    try:
        with open(lock, "rb", opener=_without_waiting) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask do not take each other for a holder
    except BlockingIOError:
        return True
    return False


def _without_waiting(path: str, flags: int) -> int:
    """A FIFO in its place is opened at once, and is no lock of anybody's."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _is_held_on_windows(lock: Path) -> bool:
    from filelock import FileLock, Timeout

    if not lock.exists():
        raise FileNotFoundError(lock)
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
