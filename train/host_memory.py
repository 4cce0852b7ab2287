"""Memory of a CPU run: what a step frees is kept for the next one."""

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Asks the C library not to give large blocks back to the system whenever they are freed; False where it cannot.

    Otherwise every step of a large model gets its memory anew, page by page: 200,000 page faults a step and a tenth of
    the time of Stable Diffusion at 128 px. Only glibc (mallopt(3)) has it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    asked = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: 64 * 2**20}
    return all(libc.mallopt(option, value) for option, value in asked.items())
