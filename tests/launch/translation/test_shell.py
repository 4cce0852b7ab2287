"""Commands of shell scripts: words, lines and variables, as a shell would have them."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.configs.errors import UserError
from loraloom.launch.translation.shell import find_script, read_commands


def words(text: str) -> list[list[str]]:
    return [[word.text for word in command] for command in read_commands(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\nc", [["a", "b"], ["c"]]),
        ("a \\\n  b", [["a", "b"]]),
        ("a \\  \n  b", [["a", "b"]]),  # spaces behind the backslash, which a shell would stumble over
        ("a ^\r\n  b", [["a", "b"]]),  # cmd
        ("a\n  --b", [["a", "--b"]]),  # as web pages print it
        ("a # b\nc", [["a"], ["c"]]),
        ("a#b", [["a#b"]]),
        ("a && b; c | d", [["a"], ["b"], ["c"], ["d"]]),
        ("a 'b $X' \"c d\"'e'", [["a", "b $X", "c de"]]),
        (r"a b\ c \$X", [["a", "b c", "$X"]]),
        ('X=1\nexport Y="$X 2"\nZ=$Y\na $X${Y} "$Z" ${W:-3}', [["a", "11", "2", "1 2", "3"]]),
        ("X='--a --b'\nN=\nc $X $N", [["c", "--a", "--b"]]),
        ("X=1 a $X", [["X=1", "a", "$X"]]),  # set for that command alone
        ("", []),
    ],
)
def test_words(text: str, expected: list[list[str]]) -> None:
    assert words(text) == expected


@given(st.lists(st.text(st.characters(exclude_characters="\r\0", codec="utf-8"), min_size=1), min_size=1))
def test_whatever_is_quoted_comes_back(values: list[str]) -> None:
    assert words("a " + shlex.join(values)) == [["a", *values]]


def test_a_script_has_flags_with_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.sh"
    file.write_text(
        "cd $NOWHERE\nexport N=4\npython -m accelerate launch --num_processes $N --multi_gpu ./sd/train.py \\\n"
        " --one=1 --two 2 3 \\\n --on --no-dash --empty= stray > log.txt 2>&1\nls\n"
    )
    script = find_script(file, ["train.py"])
    assert script is not None
    assert script.name == "train.py"
    assert [(each.name, each.value) for each in script.launcher] == [
        ("launcher.num_processes", "4"),
        ("launcher.multi_gpu", True),
    ]
    found = [(each.name, each.value, each.place.rpartition(":")[2]) for each in script.settings]
    assert found == [
        ("one", "1", "4"),
        ("two", ["2", "3"], "4"),
        ("on", True, "5"),
        ("no_dash", True, "5"),
        ("empty", "", "5"),
        ("stray", True, "5"),
    ]
    assert find_script(file, ["other.py"]) is None


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.sh"
    file.write_text("train.py \\\n --base=$NO_SUCH_VARIABLE")
    with pytest.raises(UserError, match=r"x\.sh:2: \$NO_SUCH_VARIABLE is set nowhere in it; add a line"):
        find_script(file, ["train.py"])
    file.write_text("train.py --a\ntrain.py --b")
    with pytest.raises(UserError, match="trains 2 times, in the lines 1 and 2; keep one of them"):
        find_script(file, ["train.py"])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        find_script(file, ["train.py"])
