"""Batch files of Windows as commands: `set NAME=value`, `%NAME%`, `^` at the end of a line; backslashes are plain."""

import re
from collections.abc import Iterator
from itertools import count

from .variables import MARK, Variables, Word

VARIABLE = re.compile(r"%%|(?P<sign>[%!])(?P<name>\w+)(?P<change>:[^%!\n]*)?(?P=sign)|%~?[a-z]*[0-9*]")
SET = re.compile(
    r"@?set\s+(?P<how>/[ap]\s+)?(?P<quote>\"?)(?P<name>[\w .-]+?)\s*=(?P<value>.*)", re.IGNORECASE | re.DOTALL
)
PIECE = re.compile(
    r"""(?P<space>\s+)
      | (?P<end>&+|\|+)
      | "(?P<double>(?:\\"|[^"])*)"
      | \^(?P<escaped>.)
      | (?P<plain>[^\s^"&|]+|.)""",
    re.VERBOSE | re.DOTALL,
)


def read_batch(text: str, variables: Variables) -> list[list[Word]]:
    """The words of each command; what stands in parentheses, or behind `if` and `for`, runs under a condition."""
    commands: list[list[Word]] = []
    blocks: list[int] = []
    numbers = count()
    for line, content in _lines(MARK.sub("", text)):
        bare = content.strip().lstrip("@")
        while bare.startswith(")"):
            bare = bare[1:].strip()
            if blocks:
                blocks.pop()
        if re.match(r"(rem\b|::|:\w)", bare, re.IGNORECASE) or not bare:
            continue
        opens = bare.endswith("(")
        under = re.match(r"(if|for|else)\b", bare, re.IGNORECASE)
        block = (*blocks, next(numbers)) if under or opens else tuple(blocks)
        if opens:
            blocks.append(block[-1])
            bare = bare[:-1]
        # what is set behind `if … ` on the same line
        if under and (inner := re.search(r"(?<!\w)set\s+.*", bare, re.IGNORECASE | re.DOTALL)):
            bare = inner[0]
        before = ""
        for start, sign, part in _parted(bare):
            if sign == "||" or (sign == "&&" and not SET.fullmatch(before)):
                block = (*block, next(numbers))
            begin, before = line + bare[:start].count("\n"), part
            if found := SET.fullmatch(part):
                _set(found, begin, variables, block)
            else:
                commands += _commands(part, begin, variables, block)
    return commands


def _parted(line: str) -> Iterator[tuple[int, str, str]]:
    """What `&`, `&&` and `||` part outside of quotes: where each part begins, and what stands before it."""
    start, sign = 0, ""
    for piece in re.finditer(r"\"[^\"]*\"|\^.|(?P<sign>&+|\|\|)|.", line, re.DOTALL):
        if piece["sign"]:
            yield start, sign, line[start : piece.start()].strip()
            start, sign = piece.end(), piece["sign"]
    yield start, sign, line[start:].strip()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with those that they go on in, and the number of the first one."""
    whole, begin = "", 1
    lines = text.replace("\r", "").split("\n")
    for number, (line, after) in enumerate(zip(lines, [*lines[1:], ""], strict=True), 1):
        whole += line
        if line.rstrip().endswith("^") or after.lstrip().startswith("--"):
            whole += "\n"
            continue
        yield begin, whole
        whole, begin = "", number + 1


def _set(found: re.Match[str], line: int, variables: Variables, block: tuple[int, ...]) -> None:
    value = re.sub(r"\^[ \t]*\n", "", found["value"])
    if found["quote"]:
        value = value.rstrip().removesuffix('"')
    value = None if found["how"] else _filled(value, variables, block)
    own = f"%{found['name']}%".lower() in found["value"].lower()
    variables.set(found["name"], value, line, block, "extend" if own else "set")


def _filled(text: str, variables: Variables, block: tuple[int, ...]) -> str:
    def fill(found: re.Match[str]) -> str:
        if found[0] == "%%":
            return "%"
        if found["sign"] == "!" and not variables.has(found["name"]):
            return found[0]  # an exclamation
        if not found["name"]:
            return variables.unknown(found[0], "is an argument of the file; write its value")
        if found["change"]:
            return variables.unknown(found[0], "is not worked out here; write its value")
        value = variables.value(found["name"], found[0], block)
        return value if isinstance(value, str) else " ".join(value)

    return VARIABLE.sub(fill, text)


def _commands(text: str, line: int, variables: Variables, block: tuple[int, ...]) -> Iterator[list[Word]]:
    """Variables are filled in before words are parted, as cmd does it."""
    words: list[Word] = []
    word, begin = None, line
    for piece in PIECE.finditer(re.sub(r"\^[ \t]*\n", " \n", _filled(text, variables, block))):
        kind, content = piece.lastgroup, piece[piece.lastgroup or 0]
        if kind in ("space", "end"):
            if word is not None:
                words.append(variables.word(word, begin))
            word = None
            if kind == "end" and words:
                yield words
                words = []
        else:
            if word is None:
                word, begin = "", line
            word += content.replace('\\"', '"') if kind == "double" else content
        line += piece[0].count("\n")
    if word is not None:
        words.append(variables.word(word, begin))
    if words:
        yield words
