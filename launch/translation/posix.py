"""Scripts of sh and bash as commands: words and their lines, with variables and arrays filled in.

Lines go on after `\\`, and, as commands in web pages are often written, after cmd's `^` and PowerShell's backtick, and
before a line that begins with `--`.
"""

import re
from dataclasses import dataclass, field
from itertools import count

from .variables import MARK, Variables, Word

PIECE = re.compile(
    r"""(?P<space>(?:[ \t]|[\\^`][ \t]*\r?\n|\r?\n(?=\s*--))+)
      | (?P<end>\r?\n|;+|&+|\|+)
      | (?P<comment>(?<!\S)\#[^\n]*)
      | '(?P<single>[^']*)'
      | "(?P<double>(?:\\.|[^"\\])*)"
      | (?P<variable>\$[\w@*]\w*|\$\{(?:[^{}\n]|\{[^{}\n]*\})*\})
      | (?P<command>\$\((?:[^()]|\([^()]*\))*\)|`[^`\n]+`)
      | \\(?P<escaped>.)
      | (?P<array>(?<!\S)[A-Za-z_]\w*\+?=\()
      | (?P<close>\))
      | (?P<plain>[^\s\\^`'"$;&|)]+|.)""",
    re.VERBOSE | re.DOTALL,
)
IN_QUOTES = re.compile(
    r"""\\(?P<escaped>["\\$`])|(?P<joined>\\\r?\n)|(?P<variable>\$[\w@*]\w*|\$\{(?:[^{}\n]|\{[^{}\n]*\})*\})
      |(?P<command>\$\((?:[^()]|\([^()]*\))*\)|`[^`]+`)""",
    re.VERBOSE,
)
VARIABLE = re.compile(r"\$\{?(?P<name>\w+)(?P<all>\[[@*]\])?(?::?(?P<sign>[-=])(?P<otherwise>.*?))?\}?", re.DOTALL)
ARGUMENTS = ("$@", "$*", "${@}", "${*}")
ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<more>\+?)=(?P<value>.*)", re.DOTALL)
HEREDOC = re.compile(r"<<-?[ \t]*(['\"]?)(\w+)\1[^\n]*\n.*?^[ \t]*\2[ \t]*$", re.DOTALL | re.MULTILINE)
SETTING = {"export", "set", "declare", "local", "readonly", "typeset"}
OPENING = {"if", "while", "until", "for", "select", "case", "{"}
BETWEEN = {"then", "else", "elif", "do"}
CLOSING = {"fi", "done", "esac", "}"}


@dataclass(slots=True)
class _Reading:
    """One walk over the text."""

    variables: Variables
    commands: list[list[Word]] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    word: str | None = None
    begin: int = 1  # line of the word that is open
    array: str | None = None  # `NAME=(`, which is open
    array_begins: tuple[int, int] = (0, 0)  # its line, and how many words stand before it
    own_value: bool = False  # whether the word that is open sets a variable to its own value and more
    marked: list[str] = field(default_factory=list)  # the words with their marks
    extended: set[int] = field(default_factory=set)  # places of words with `own_value`
    blocks: list[int] = field(default_factory=list)
    numbers: "count[int]" = field(default_factory=count)
    depends: bool = False  # whether `&&` or `||` stands before the command

    def add(self, text: str, line: int) -> None:
        if self.word is None:
            self.word, self.begin = "", line
        self.word += text

    def add_unquoted(self, value: str | list[str], line: int) -> None:
        """A variable's value, whose spaces part words, but in an assignment."""
        if isinstance(value, str) and self.word and ASSIGNMENT.match(self.word) and self.sets_variables():
            self.add(value, line)
            return
        parts = re.split(r"\s+", value) if isinstance(value, str) else value
        self.add_words(parts, line)

    def add_words(self, parts: list[str], line: int) -> None:
        for number, part in enumerate(parts):
            if number:
                self.end_word()
            if part:
                self.add(part, line)

    def sets_variables(self) -> bool:
        """Whether the command has been nothing but assignments so far."""
        _, words = self.own_words()
        return all(text in SETTING or ASSIGNMENT.fullmatch(text) or text.startswith("-") for text in words) and not (
            words and words[0].startswith("-")
        )

    def own_words(self) -> tuple[list[str], list[str]]:
        """Words of the language before the command, and the command's own ones."""
        place = 0
        while place < len(self.marked) and self.is_structure(place):
            place += 1
        return self.marked[:place], self.marked[place:]

    def is_structure(self, place: int) -> bool:
        text = self.marked[place]
        if text in OPENING | BETWEEN | CLOSING | {"function", "(", "!", "time"} or text.endswith("()"):
            return True
        if self.array is None and text.endswith(")") and "(" not in text:  # a pattern of `case`
            return True
        return place > 0 and self.marked[0] == "case" and "in" not in self.marked[1:place]

    def end_word(self) -> None:
        if self.word is not None:
            self.marked.append(self.word)
            self.words.append(self.variables.word(self.word, self.begin))
            if self.own_value:
                self.extended.add(len(self.marked) - 1)
        self.word, self.own_value = None, False

    def block(self) -> tuple[int, ...]:
        return (*self.blocks, next(self.numbers)) if self.depends else tuple(self.blocks)

    def end_command(self, by: str = "\n") -> None:
        self.end_word()
        before, own = self.own_words()
        self.enter(before, own)
        if before[-1:] == ["for"] and own:
            self.variables.set(own[0], None, self.words[len(before)].line, self.block())
        elif own[:1] in (["read"], ["unset"]):
            for place, name in enumerate(own[1:], len(before) + 1):
                self.variables.set(name, None, self.words[place].line, self.block())
        elif self.sets_variables():
            self.assign(own, len(before))
        elif own:
            self.commands.append(self.words[len(before) :])
        self.words, self.marked, self.extended = [], [], set()
        self.depends = by in ("&&", "||")

    def enter(self, before: list[str], own: list[str]) -> None:
        """Follows branches, loops and functions; those between `then` and `else` are another block than those after."""
        for text in before:
            if text in OPENING:
                self.blocks.append(next(self.numbers))
            elif (text in BETWEEN or (text.endswith(")") and not text.endswith("()"))) and self.blocks:
                self.blocks[-1] = next(self.numbers)
            elif text in CLOSING and self.blocks:
                self.blocks.pop()

    def assign(self, own: list[str], start: int) -> None:
        for place, text in enumerate(own, start):
            if found := ASSIGNMENT.fullmatch(text):
                line, block = self.words[place].line, self.block()
                how = "add" if found["more"] else "extend" if place in self.extended else "set"
                self.variables.set(found["name"], found["value"], line, block, how)

    def open_array(self, text: str, line: int) -> None:
        self.array, self.array_begins = text, (line, len(self.marked))

    def close_array(self) -> None:
        self.end_word()
        assert self.array is not None
        name, how = self.array.rstrip("(=").rstrip("+"), "add" if "+" in self.array else "set"
        line, start = self.array_begins
        self.variables.set(name, self.marked[start:], line, self.block(), how)
        self.array = None
        del self.words[start:], self.marked[start:]

    def filled(self, variable: str) -> str | list[str]:
        """Its value; of what cannot be known, a mark."""
        if variable in ARGUMENTS:
            return []  # it is read as it runs without any
        found = VARIABLE.fullmatch(variable)
        if found is None:
            return self.variables.unknown(variable, "is not worked out here; write its value")
        name, otherwise = found["name"], found["otherwise"]
        if name.isdigit() and otherwise is None:
            return self.variables.unknown(variable, "is an argument of the script; write its value")
        if self.word and self.word.startswith((f"{name}=", f"{name}+=")):
            self.own_value = True
        default = None if otherwise is None else " ".join(self.quoted(otherwise.strip("\"'")))
        if found["sign"] == "=" and default is not None and not self.variables.has(name):
            self.variables.set(name, default, self.begin, self.block())
        value = self.variables.value(name, variable, tuple(self.blocks), default)
        return value if isinstance(value, str) or found["all"] else (value or [""])[0]

    def asked(self, command: str) -> str:
        return self.variables.unknown(command, "is a command, and none is run; write what it gives")

    def quoted(self, text: str) -> list[str]:
        """The words of a text in double quotes: one, or those of an array."""
        if text in ARGUMENTS or ((alone := VARIABLE.fullmatch(text)) and alone["all"] == "[@]"):
            value = self.filled(text)
            return [value] if isinstance(value, str) else value

        def fill(found: re.Match[str]) -> str:
            if found["variable"]:
                value = self.filled(found["variable"])
                return value if isinstance(value, str) else " ".join(value)
            return self.asked(found["command"]) if found["command"] else found["escaped"] or ""

        return [IN_QUOTES.sub(fill, text)]


def read_posix(text: str, variables: Variables) -> list[list[Word]]:
    """The words of each command, assignments and the words of the language left out."""
    reading, line = _Reading(variables), 1
    text = HEREDOC.sub(lambda found: "\n" * found[0].count("\n"), MARK.sub("", text))
    for piece in PIECE.finditer(text):
        kind, content = piece.lastgroup, piece[piece.lastgroup or 0]
        if kind == "space" or (kind == "end" and reading.array is not None):
            reading.end_word()
        elif kind == "end":
            reading.end_command(content)
        elif kind == "variable":
            reading.add_unquoted(reading.filled(content), line)
        elif kind == "command" and re.match(r"`\s*#", content):
            pass  # a comment between the flags
        elif kind == "command":
            reading.add(reading.asked(content), line)
        elif kind == "double":
            for number, part in enumerate(reading.quoted(content)):
                if number:
                    reading.end_word()
                reading.add(part, line)
        elif kind == "array" and reading.array is None and reading.sets_variables():
            reading.open_array(content, line)
        elif kind == "close" and reading.array is not None:
            reading.close_array()
        elif kind != "comment":
            reading.add(content, line)
        line += piece[0].count("\n")
    reading.end_command()
    return reading.commands
