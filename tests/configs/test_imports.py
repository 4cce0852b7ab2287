"""What `importing` does with the garbage collector."""

import gc
import subprocess
import sys

import pytest

from loraloom.configs.imports import importing


def test_nobody_looks_for_garbage_until_the_end():
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        import loraloom.nothing  # noqa: F401
    assert gc.isenabled()


def test_what_was_brought_in_is_left_out_from_then_on():
    program = """if True:
        import gc
        from loraloom.configs.imports import importing
        with importing():
            pass
        assert not gc.get_freeze_count()  # there was nothing
        with importing():
            import pydantic
        assert gc.get_freeze_count() > 1000
    """
    subprocess.run([sys.executable, "-c", program], check=True)
