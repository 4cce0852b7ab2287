"""Commands of shell scripts: words, lines and variables, as a shell would have them."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.configs.errors import UserError
from loraloom.launch.translation.shell import find_script, read_commands
from loraloom.launch.translation.variables import taken_from_environment


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


def read(text: str, name: str, folder: Path, **taken: str) -> dict[str, object]:
    """The flags of a script that starts train.py, each with its value."""
    file = folder / name
    file.write_bytes(text.encode())
    script = find_script(file, ["train.py"], taken)
    assert script is not None
    return {each.name: each.value for each in script.settings}


ON = True


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.sh", 'A=(--a 1\n # why\n "--b=c d" )\nA+=(--e)\ntrain.py "${A[@]}"', {"a": "1", "b": "c d", "e": ON}),
        ("a.sh", 'A=(--a 1)\nexport B=x\ntrain.py ${A[*]} "$@" --b=$B', {"a": "1", "b": "x"}),
        ("a.sh", 'x="--a"\nx="$x --b"\nx+=" --c"\ntrain.py $x', {"a": ON, "b": ON, "c": ON}),
        ("a.sh", "if x; then\n  y=1\n  train.py --a=$y\nfi", {"a": "1"}),  # known where it is used
        ("a.sh", 'echo train.py\ncat > f <<EOF\ntrain.py --no\nEOF\nt=a/train.py\npython "$t" --a', {"a": ON}),
        ("a.sh", "Y=4\ntrain.py --a=${X:-${Z:-3}} --b=${X:-$Y}", {"a": "3", "b": "4"}),
        ("a.sh", "train.py \\\n --a ^\n --b `\n --c", {"a": ON, "b": ON, "c": ON}),  # as web pages mix them
        ("a.sh", ': "${X:=3}"\ntrain.py --a=$X \\\n --b 4 `# why` \\\n --c=${Y=5}$Y', {"a": "3", "b": "4", "c": "55"}),
        ("a.bat", 'set A=1 && set "B=2&3"& train.py --a=%A% --b="%B%" && pause', {"a": "1", "b": "2&3"}),
        (
            "a.bat",
            'set D=E:\\T\\dog\r\ntrain.py ^\r\n --a=%d%\\img --b="C:\\new dir" --c=50%%',
            {"a": "E:\\T\\dog\\img", "b": "C:\\new dir", "c": "50%"},
        ),
        ("a.cmd", '@set "N=my dog"\r\nrem set N=x\r\ncall train.py --n="%N%" --s=a!b!', {"n": "my dog", "s": "a!b!"}),
        ("a.bat", "set N=--a\r\nset N=%N% --b\r\ntrain.py %N%", {"a": ON, "b": ON}),
        (
            "a.ps1",
            "$D = 'E:\\T' # why\n[int]$n = 8\ntrain.py `\n --a=\"$d\\img\" --b=$n --c 'x''y' --e \"`$n $($n)\"",
            {"a": "E:\\T\\img", "b": "8", "c": "x'y", "e": "$n 8"},
        ),
        (
            "a.ps1",
            '$n = 1\n$A = @("--a",\n "--b=$n")\n$A += "--c"\n[void]$A.Add("--d")\ntrain.py @A',
            {"a": ON, "b": "1", "c": ON, "d": ON},
        ),
        ("a.ps1", "param(\n  [string]$n = 'x',\n  $m\n)\n$t = \"a/train.py\"\npython $t --a=$n", {"a": "x"}),
    ],
)
def test_each_shell_by_its_own_rules(tmp_path: Path, name: str, text: str, expected: dict[str, object]) -> None:
    assert read(text, name, tmp_path) == expected


SAID = {
    "nowhere": "is set nowhere in it; add a line {line}",
    "environment": "is set by your environment alone, which is not read; add a line {line}, or give --env",
    "secret": "is a secret by its name, and none is written into a config",
    "places": "is set in the lines 1 and {second}; keep one of them, or give --env",
    "branch": "in a branch, a loop or a function; set it outside of that, or give --env",
    "run": "by what is not run; write its value there, or give --env",
}
SHELLS = {
    "a.sh": ("if q; then\n{0}\nfi\n", "{0}={1}", "${0}", "read -r X", "{0}=…"),
    "a.bat": ("if q (\r\n{0}\r\n)\r\n", "set {0}={1}", "%{0}%", "set /p X=who", "set {0}=…"),
    "a.ps1": ("if ($q) {{\n{0}\n}}\n", "${0} = '{1}'", "${0}", "$X = Get-Date", "${0} = …"),
}


def test_what_is_taken_back_is_not_filled_in(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\$X is set in the lines 1 and 2; keep one"):
        read("X=1\nunset X\ntrain.py --a=$X", "a.sh", tmp_path)
    with pytest.raises(UserError, match=r"%X% is set in line 1 in a branch"):
        read("nothing || set X=1\ntrain.py --a=%X%", "a.bat", tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("kind", SAID)
def test_what_a_script_does_not_tell_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, kind: str
) -> None:
    """No value is guessed, none is taken from the environment unasked, and a secret never."""
    branch, sets, uses, run, line = SHELLS[shell]
    name = "MY_API_KEY" if kind == "secret" else "X"
    first, second = sets.format(name, "one"), sets.format(name, "two")
    begin = {"places": f"{first}\n{branch.format(second)}", "branch": branch.format(first), "run": run}.get(kind, "")
    monkeypatch.delenv(name, raising=False)
    if kind in ("environment", "secret"):
        monkeypatch.setenv(name, "from outside")
    use = f"{begin}\ntrain.py --out=out-{uses.format(name)}"
    with pytest.raises(UserError) as told:
        read(use, shell, tmp_path)
    (problem,) = told.value.problems
    assert SAID[kind].format(line=line.format(name), second=3) in problem
    assert uses.format(name) in problem
    assert "from outside" not in problem
    if kind != "secret":
        assert read(use, shell, tmp_path, **{name.lower() if shell != "a.sh" else name: "asked"})["out"] == "out-asked"
    else:
        with pytest.raises(UserError, match="is a secret by its name"):
            taken_from_environment([name])
        assert read(f"train.py --hub_token={uses.format(name)}", shell, tmp_path)["hub_token"] == uses.format(name)


LETTERS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5)


@given(
    st.dictionaries(LETTERS.map("v{}".format), LETTERS, min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([*SHELLS]),
)
def test_what_is_set_once_and_surely_is_filled_in_and_nothing_else(
    values: dict[str, str], under: list[bool], shell: str
) -> None:
    branch, sets, uses, *_ = SHELLS[shell]
    lines = []
    for (name, value), conditional in zip(values.items(), under, strict=False):
        line = sets.format(name, value)
        lines.append(branch.format(line).rstrip() if conditional else line)
    lines.append("train.py " + " ".join(f"--{name}={uses.format(name)}" for name in values))
    (command,) = [words for words in read_commands("\n".join(lines), Path(shell).suffix) if words[0].text == "train.py"]
    for (name, value), conditional, word in zip(values.items(), under, command[1:], strict=False):
        same = [other for other in values if other.lower() == name.lower()]
        if len(same) == 1:
            assert bool(word.doubts) == conditional
            assert word.text == f"--{name}={uses.format(name) if conditional else value}"


@given(st.text(max_size=60), st.sampled_from(["", ".bat", ".ps1"]))
def test_no_text_breaks_a_reader(text: str, ending: str) -> None:
    read_commands(text, ending)
