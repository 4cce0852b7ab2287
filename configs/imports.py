"""Large libraries, brought in without what slows their import down."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within, nobody looks for garbage; nor later among what was brought in.

    Libraries define hundreds of thousands of objects that all stay: to look through them again and again is a quarter
    of the time that torch, transformers, diffusers and PEFT take (`gc.freeze`, docs.python.org/3/library/gc.html).
    """
    before, collects = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collects:
            gc.enable()
