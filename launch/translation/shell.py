"""Shell scripts as commands: words and their lines, variables filled in from the same file. Nothing is run.

Lines go on after `\\` (cmd's `^`, PowerShell's backtick), and before a line that begins with `--`, as commands in web
pages are often written.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...configs.errors import UserError
from .peer import Setting

PIECE = re.compile(
    r"""(?P<space>(?:[ \t]|[\\^`][ \t]*\r?\n|\r?\n(?=\s*--))+)
      | (?P<end>\r?\n|;|&+|\|+)
      | (?P<comment>(?<!\S)\#[^\n]*)
      | '(?P<single>[^']*)'
      | "(?P<double>(?:\\.|[^"\\])*)"
      | (?P<variable>\$\w+|\$\{\w+(?::?-[^}]*)?\})
      | \\(?P<escaped>.)
      | (?P<plain>[^\s\\^`'"$;&|]+|.)""",
    re.VERBOSE | re.DOTALL,
)
IN_QUOTES = re.compile(r"""\\(?P<escaped>["\\$`])|(?P<joined>\\\r?\n)|(?P<variable>\$\w+|\$\{\w+(?::?-[^}]*)?\})""")
VARIABLE = re.compile(r"\$\{?(?P<name>\w+)(?::?-(?P<otherwise>[^}]*))?\}?")
ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


class Word(NamedTuple):
    """A word as the shell would pass it on."""

    text: str
    line: int
    unset: str = ""  # a variable in it that nothing sets


class Script(NamedTuple):
    """A command that starts a script."""

    name: str  # the script's file name
    launcher: list[Setting]  # flags before it, each as `launcher.name`
    settings: list[Setting]  # its own flags
    place: str


@dataclass(slots=True)
class _Reading:
    """One walk over the text; variables are those that were set above."""

    variables: dict[str, str] = field(default_factory=dict)
    commands: list[list[Word]] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    word: str | None = None
    begin: int = 1  # line of the word that is open
    unset: str = ""

    def add(self, text: str, line: int) -> None:
        if self.word is None:
            self.word, self.begin = "", line
        self.word += text

    def add_unquoted(self, text: str, line: int) -> None:
        """A variable's value, whose spaces part words, but in an assignment."""
        if self.word and ASSIGNMENT.match(self.word) and self.sets_variables():
            self.add(text, line)
            return
        for number, part in enumerate(re.split(r"\s+", text)):
            if number:
                self.end_word()
            if part:
                self.add(part, line)

    def sets_variables(self) -> bool:
        """Whether the command has been nothing but assignments so far."""
        return all(word.text in ("export", "set") or ASSIGNMENT.fullmatch(word.text) for word in self.words)

    def end_word(self) -> None:
        if self.word is not None:
            self.words.append(Word(self.word, self.begin, self.unset))
        self.word, self.unset = None, ""

    def end_command(self) -> None:
        self.end_word()
        if self.sets_variables():
            found = [ASSIGNMENT.fullmatch(word.text) for word in self.words]
            self.variables |= {each["name"]: each["value"] for each in found if each}
        else:
            self.commands.append(self.words)
        self.words = []

    def filled(self, variable: str) -> str:
        """Its value; what nothing sets stays as it is, and is remembered."""
        found = VARIABLE.fullmatch(variable)
        assert found
        name, otherwise = found["name"], found["otherwise"]
        value = self.variables.get(name, os.environ.get(name, otherwise))
        if value is None:
            self.unset = name
        return variable if value is None else value

    def quoted(self, text: str) -> str:
        return IN_QUOTES.sub(
            lambda found: self.filled(found["variable"]) if found["variable"] else found["escaped"] or "", text
        )


def read_commands(text: str) -> list[list[Word]]:
    """The words of each command, assignments left out."""
    reading, line = _Reading(), 1
    for piece in PIECE.finditer(text):
        kind, content = piece.lastgroup, piece[piece.lastgroup or 0]
        if kind == "space":
            reading.end_word()
        elif kind == "end":
            reading.end_command()
        elif kind == "variable":
            reading.add_unquoted(reading.filled(content), line)
        elif kind == "double":
            reading.add(reading.quoted(content), line)
        elif kind != "comment":
            reading.add(content, line)
        line += piece[0].count("\n")
    reading.end_command()
    return reading.commands


def find_script(path: Path, known: Sequence[str]) -> Script | None:
    """The command of a file that starts one of the `known` scripts, such as `train_network.py`; None for none.

    UserError for several of them, for a variable in it that nothing sets, and for a file that is no text.
    """
    found = [(index, words) for words in read_commands(_read(path)) for index in _places(words, known)]
    if not found:
        return None
    if len(found) > 1:
        lines = " and ".join(str(words[index].line) for index, words in found)
        raise UserError(f"{path}: trains {len(found)} times, in the lines {lines}; keep one of them")
    index, words = found[0]
    if unset := next((word for word in words if word.unset), None):
        raise UserError(f"{path}:{unset.line}: ${unset.unset} is set nowhere in it; add a line {unset.unset}=…")
    settings = list(_flags(_before_redirection(words[index + 1 :]), path))
    launcher = list(_flags(words[:index], path, "launcher."))
    return Script(_name(words[index]), launcher, settings, f"{path}:{words[index].line}")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from error


def _name(word: Word) -> str:
    return PurePosixPath(word.text.replace("\\", "/")).name


def _places(words: Sequence[Word], known: Sequence[str]) -> list[int]:
    return [index for index, word in enumerate(words) if _name(word) in known][:1]


def _before_redirection(words: Sequence[Word]) -> Sequence[Word]:
    end = next((index for index, word in enumerate(words) if re.match(r"\d*[<>]", word.text)), len(words))
    return words[:end]


def _flags(words: Sequence[Word], path: Path, prefix: str = "") -> Iterator[Setting]:
    """`--name value`, `--name=value`, `--name one two`, and `--name` alone, whose value is true.

    Words before the first flag are the launcher itself. What follows `--name=value` belongs to no flag: it is given
    back as one by itself, which nobody knows.
    """
    groups: list[list[Word]] = []
    for word in words:
        if word.text.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
    for first, *rest in groups:
        name, equals, value = first.text.removeprefix("--").partition("=")
        name, place = prefix + name.replace("-", "_"), f"{path}:{first.line}"
        if equals:
            yield Setting(name, value, place)
            yield from (Setting(word.text, True, f"{path}:{word.line}") for word in rest)
        else:
            values = [word.text for word in rest]
            yield Setting(name, (values if len(values) > 1 else values[0]) if values else True, place)
