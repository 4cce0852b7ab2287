"""Lines of keys in TOML files."""

from pathlib import Path

import pytest

from loraloom.configs.errors import UserError
from loraloom.launch.translation.toml_lines import read_toml


def test_every_key_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(
        'top = 1\n[one]\na = """\nb = 2\n"""\n"c d" = [\n 1,\n]\n\n[[sets]]\nx = 1\n[[sets.inner]]\ny = 1\n'
        "[[sets.inner]]\ny = 2  # y = 3\n[[sets]]\n  [[sets.inner]]\n  y = 4\n"
    )
    toml = read_toml(file)
    lines = {path: line for path, line in toml.lines.items() if "b" not in path}
    assert lines == {
        ("top",): 1,
        ("one", "a"): 3,
        ("one", "c d"): 6,
        ("sets", 0, "x"): 11,
        ("sets", 0, "inner", 0, "y"): 13,
        ("sets", 0, "inner", 1, "y"): 15,
        ("sets", 1, "inner", 0, "y"): 18,
    }
    assert toml.place("top") == f"{file}:1"
    assert toml.place("sets") == str(file)


def test_what_is_no_toml_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("a = 1\nb = no\n")
    with pytest.raises(UserError, match=r"x\.toml:2: not valid TOML: Invalid value"):
        read_toml(file)
    with pytest.raises(UserError, match=r"none\.toml: there is no such file"):
        read_toml(tmp_path / "none.toml")
