"""A file is whole or as it was, whatever goes wrong while it is written."""

import os
from pathlib import Path

import pytest

from loraloom.configs.files import replace_file, replacing


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path):
    replace_file(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    replace_file(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    replace_file(tmp_path / "a", "old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(OSError, match="No space") as found:
            replace_file(tmp_path / "a", "new")
    assert found.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_safetensors_says_of_a_disk_is_said_of_the_file(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(OSError, match="No space") as found, replacing(tmp_path / "a"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (found.value.errno, found.value.filename, names(tmp_path)) == (28, str(tmp_path / "a"), [])


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    replace_file(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]
