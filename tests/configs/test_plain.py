"""Nothing that a name holds steers a terminal or breaks a line, and no stream ends a command."""

import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
from loraloom.configs.plain import plain, plain_lines

ANY = st.text(st.characters())  # lone surrogates, too
NASTY = "\x1b]0;t\x07\x1b[2Jx\nerror: all is fine\r\x9b1m\u202eexe\u2028\ud800\0"


@given(ANY)
def test_plain_text_stands_on_one_line_and_can_be_written(text: str) -> None:
    shown = plain(text)
    assert {unicodedata.category(letter) for letter in shown}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert {unicodedata.bidirectional(letter) for letter in shown}.isdisjoint({"LRE", "RLE", "LRO", "RLO", "PDF"})
    assert {unicodedata.bidirectional(letter) for letter in shown}.isdisjoint({"LRI", "RLI", "FSI", "PDI"})
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert plain(shown) == shown


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"])))
def test_honest_text_stays(text: str) -> None:
    assert plain(text) == text


@given(st.lists(st.text("犬 äb\t"), max_size=4))
def test_lines_that_are_meant_stay(lines: list[str]) -> None:
    assert plain_lines("\n".join(lines)) == "\n".join(lines)
    assert "\x1b" not in plain_lines("\n".join([*lines, "\x1b[2J"]))


def test_every_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: object) -> int:
        raise UserError([f"photos/{NASTY}.png: is no image", "second"])

    assert run_command(refuse, []) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: photos/{plain(NASTY)}.png: is no image"
    assert second == "error: second"


SAYS = """
import sys
from loraloom.configs.command import run_command
from loraloom.configs.errors import UserError
def main(arguments):
    for k in range(3000):
        print("Läufe 犬", k, {nasty!r})
    print("so", file=sys.stderr)
    with open(arguments[0], "w") as file:  # takes no closed descriptor
        print("still here")
        sys.stdout.flush()
        file.write("done")
    return 5
sys.exit(run_command(main))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (">&-", ""),
        (">&- 2>&-", ""),
        ("2>&-", None),
        ("<&- >&- 2>&-", ""),
        ("> /dev/full", ""),
        ("| head -1; exit ${PIPESTATUS[0]}", "L\\xe4ufe \\u72ac 0 safe\n"),
        ("2> /dev/full > /dev/full", ""),
    ],
)
def test_no_stream_changes_what_a_command_does(ending: str, said: str | None, tmp_path: Path) -> None:
    script = tmp_path / "says.py"
    script.write_text(SAYS.format(nasty="safe"))
    command = f"{sys.executable} {script} {tmp_path / 'out'} {ending}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 5
    assert (tmp_path / "out").read_text() == "done"
    assert said is None or done.stdout == said
    lines = [line for line in done.stderr.splitlines() if line != "so"]
    expected = ["warning: the output is not whole (No space left on device)"]
    assert lines == (expected if ending == "> /dev/full" else [])


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_what_a_stream_has_no_letter_for_is_an_escape(encoding: str, tmp_path: Path) -> None:
    script = tmp_path / "says.py"
    script.write_text(SAYS.format(nasty=NASTY))
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, script, tmp_path / "out"], capture_output=True, env=environment)
    assert done.returncode == 5
    assert b"Traceback" not in done.stderr
    assert b"\x1b" not in done.stdout
    assert not encoding.startswith("utf") or "犬" in done.stdout.decode(encoding)


@pytest.mark.slow
def test_a_terminal_gets_colours_and_bars_and_no_more(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    code = (
        "import sys; from loraloom.configs.command import run_command\n"
        "run_command(lambda _: print('\\x1b[A\\x1b[31mred\\x1b[0m\\x1b[2J\\x1b]0;t\\x07\\x9b') or 0)"
    )
    subprocess.run([sys.executable, "-c", code], stdout=follower, check=True)
    os.close(follower)
    said = os.read(leader, 10_000).decode()
    os.close(leader)
    assert said == "\x1b[A\x1b[31mred\x1b[0m\\x1b[2J\\x1b]0;t\\x07\\x9b\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["Läufe 犬", "plain"])
def test_a_locale_without_letters_keeps_no_file_from_us(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / "c.yaml").write_text(f"extends: '{tmp_path}/{folder}/b'\nloop: {{steps: 0}}\n", "utf-8")
    (tmp_path / folder / "b.yaml").write_text("model: {base: pocket}\noutput: {dir: 犬}\n", "utf-8")
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "loraloom.train", str(tmp_path / "c.yaml"), f"output.dir={folder}"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **locale}, check=False)
    assert done.returncode == 2
    lines = done.stderr.decode("ascii").splitlines()
    assert any("loop.steps" in line for line in lines)
    assert not any("cannot be read" in line or "no such file" in line or "YAML value" in line for line in lines)
