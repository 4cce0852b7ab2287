"""What Windows lacks, taken away: the command goes on without it. Windows itself was not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraloom.configs import files, machine

pytestmark = pytest.mark.slow

STAND_IN = """
import builtins, os, sys
real = builtins.__import__
def without(name, globals=None, *more, **named):  # libraries ask for the system's name, and would miss them on this one
    if name in ("fcntl", "resource") and str((globals or {{}}).get("__name__")).startswith("loraloom"):
        raise ImportError(name)
    return real(name, globals, *more, **named)
builtins.__import__ = without
del os.sched_getaffinity
from loraloom.configs.command import run_command
from loraloom.launch.cli import run
for arguments in {arguments}:
    try:
        code = run_command(run, arguments)
    except SystemExit as ended:
        code = ended.code
    print("code", code, flush=True)
"""


def test_verbs_without_what_windows_lacks(write_config, tmp_path: Path) -> None:
    config = str(write_config(loop={"steps": 2}, checkpoint={"every": 1}))
    run = str(tmp_path / "run")
    arguments = [
        ["--help"],
        ["train", "--help"],
        ["train", config],
        ["runs", str(tmp_path), "--json"],
        ["resume", run, "loop.steps=3"],
        ["plan", config],
        ["init", "--data", str(tmp_path / "none")],
        ["slurm", config],
    ]
    program = STAND_IN.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == [0, 0, 0, 0, 0, 0, 2, 0], done.stderr[-3000:]
    assert '"state": "done"' in done.stdout
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["state"], record["step"]) == ("done", 3)


def test_the_lock_and_the_memory_by_other_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    lock = tmp_path / "lock"
    with pytest.raises(FileNotFoundError):
        machine.is_held(lock)
    real = machine.peak_memory()
    for fcntl in (True, False):
        if not fcntl:
            monkeypatch.setitem(sys.modules, "fcntl", None)
            monkeypatch.setitem(sys.modules, "resource", None)
        with FileLock(lock):
            assert machine.is_held(lock)
        assert not machine.is_held(lock)
    assert real / 4 < machine.peak_memory() <= real * 1.1


def test_files_are_synced_and_processes_asked_for_without_what_windows_lacks(tmp_path: Path, monkeypatch) -> None:
    """No folder is opened, and no signal sent: there `os.kill(pid, 0)` is Ctrl-C."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (os.getpid(), int(gone.stdout)):
        assert files._is_alive_on_windows(pid) == files.is_alive(pid) == (pid == os.getpid())
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "_is_alive_on_windows", lambda pid: pid == 7)
    monkeypatch.setattr(files.os, "kill", None)
    assert files.is_alive(7) and not files.is_alive(8)
    opened = files.os.open
    monkeypatch.setattr(files.os, "open", lambda path, flags: opened(path, flags) if Path(path).is_file() else None)
    (tmp_path / "a").write_text("x")
    files.sync(tmp_path)
    files.sync(tmp_path / "a")
