"""What a command says of an error that nobody expected."""

import errno
import importlib
import sys

import pytest

from loraloom.configs.command import run_command
from loraloom.configs.errors import OWN_CODE, UserError


def told(capsys, error: BaseException, arguments=("x.yaml",)) -> tuple[int, list[str]]:
    def main(_) -> int:
        raise error

    code = run_command(main, arguments)
    return code, capsys.readouterr().err.splitlines()


def test_a_fault_of_ours_is_one_line_and_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path))
    for _ in range(2):
        code, lines = told(capsys, KeyError("b\nx"))
        (kept,) = (tmp_path / "faults").iterdir()  # the same fault has the same file
        assert (code, len(lines)) == (70, 1)
        assert lines[0].startswith("error: ") and "x.yaml: KeyError: 'b\\nx'; this is a fault of loraloom" in lines[0]
        assert lines[0].endswith(str(kept)) and "raise error" in kept.read_text()


def test_it_is_told_where_nothing_can_be_kept(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    assert told(capsys, KeyError("b"))[1][0].endswith("can be written")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), 2, "x.yaml: Permission denied: a.png"),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 3, "No space left on device: a.png"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "x.yaml: No space left on device"),
        (MemoryError(), 4, "x.yaml: out of memory (in Python)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes\nmore"), 4, "1 bytes)"),
        (UserError(["a", "b"]), 2, "error: a"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, error, code, words):
    found, lines = told(capsys, error)
    assert found == code and words in lines[0] and "Traceback" not in "".join(lines)


def test_code_of_the_users_is_shown_from_its_file_on(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def step():\n    return inner()\ndef inner():\n    import json\n    json.loads('[')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    (tmp_path / "leaving.py").write_text("import sys\ndef step():\n    sys.exit(0)\n")
    assert run_command(lambda _: importlib.import_module("leaving").step(), ["x.yaml"]) == OWN_CODE
    assert "leaving.py, ended with RuntimeError; what" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # of ours, as after --help
        run_command(lambda _: sys.exit(0), [])
    assert run_command(lambda _: mine.step(), ["x.yaml"]) == OWN_CODE
    lines = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "mine.py") in lines[0] and "code of yours" in lines[0]
    assert "mine.py" in lines[2] and "run_command" not in "".join(lines) and "JSONDecodeError" in lines[-1]
    assert lines[-1].startswith("json.")


def test_all_is_shown_to_whoever_asks(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path))
    monkeypatch.setenv("LORALOOM_TRACEBACK", "1")
    for error in (KeyError("b"), UserError("a")):
        assert any(line.startswith("Traceback") for line in told(capsys, error)[1])


def test_a_package_that_fails_while_it_is_imported_is_one_line(capsys, tmp_path, monkeypatch):
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "broken.py").write_text("def look():\n    raise ValueError('odd settings')\nlook()\n")
    (package / "whole.py").write_text("def look():\n    raise ValueError('odd settings')\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path))
    works = (lambda: importlib.import_module("broken"), lambda: importlib.import_module("whole").look())
    codes = [run_command(lambda _, work=work: work(), ["x.yaml"]) for work in works]
    said = capsys.readouterr().err.splitlines()
    assert codes == [2, 70]
    assert "a library cannot be imported here (ValueError: odd settings)" in said[0] and "doctor" in said[0]
