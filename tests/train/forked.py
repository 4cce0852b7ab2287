"""Runs a program as `python -m MODULE ARGUMENTS` or `python FILE ARGUMENTS` would, in a process that was forked.

`given` has `program`, `arguments`, `environment`, `log` (a file for what it says), `own_group`.
"""

import os
import runpy
import sys
from types import SimpleNamespace

given = SimpleNamespace(**globals()["given"])
if given.own_group:
    os.setsid()
os.environ.clear()
os.environ.update(given.environment)
log = os.open(given.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
os.dup2(log, 1)
os.dup2(log, 2)
sys.argv = [given.program, *given.arguments]
try:
    if given.program.endswith(".py"):
        runpy.run_path(given.program, run_name="__main__")
    else:
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
finally:
    try:
        sys.stdout.flush()
    except OSError:
        os._exit(120)  # as Python does where its last words are lost
