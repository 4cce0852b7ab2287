"""Scripts of PowerShell as commands: `$name = value`, arrays, splatting, the backtick at the end of a line."""

import re
from collections.abc import Iterator
from itertools import count

from .variables import MARK, Variables, Word

PIECE = re.compile(
    r"""(?P<space>(?:[ \t]|`[ \t]*\r?\n|\r?\n(?=[ \t]*--))+)
      | (?P<end>\r?\n|;|&&|\|+)
      | (?P<comment><\#.*?\#>|(?<![^\s;{}()])\#[^\n]*)
      | (?P<text>@"\r?\n.*?\r?\n"@|@'\r?\n.*?\r?\n'@)
      | '(?P<single>(?:''|[^'])*)'
      | "(?P<double>(?:`.|""|[^"`])*)"
      | (?P<open>[@$]?\(|@\{)
      | (?P<close>[()])
      | (?P<brace>[{}])
      | (?P<splat>@\w+)
      | (?P<variable>\$(?:[Ee]nv:)?\w+|\$\{[^}\n]*\})
      | `(?P<escaped>.)
      | (?P<plain>[^\s`'"$;|(){}@\#]+|.)""",
    re.VERBOSE | re.DOTALL,
)
IN_QUOTES = re.compile(
    r"""`(?P<escaped>.)|(?P<doubled>"")|(?P<command>\$\((?:[^()]|\([^()]*\))*\))
      |(?P<variable>\$(?:[Ee]nv:)?\w+|\$\{[^}\n]*\})""",
    re.VERBOSE | re.DOTALL,
)
TYPE = r"(?:\[[\w.\[\]]+\]\s*)*"
ASSIGNMENT = re.compile(
    rf"\s*{TYPE}\$(?P<name>(?:env:|script:|global:|local:)?\w+)\s*(?P<more>\+?)=\s*(?P<value>.*)",
    re.DOTALL | re.IGNORECASE,
)
ADDED = re.compile(
    rf"\s*{TYPE}\$(?P<name>\w+)\.(?:Add|AddRange)\((?P<value>.*)\)\s*(?:\|.*)?", re.DOTALL | re.IGNORECASE
)
PARAMETERS = re.compile(r"\s*param\s*\((?P<inside>.*)\)\s*", re.DOTALL | re.IGNORECASE)
EMPTY = re.compile(r"\[[\w.\[\]]+\]::new\(\)|New-Object\s+[\w.\[\]]+", re.IGNORECASE)
WORDS = {"t": "\t", "n": "\n", "r": "\r", "0": ""}


def read_powershell(text: str, variables: Variables) -> list[list[Word]]:
    """The words of each command. What stands in braces runs under a condition."""
    commands: list[list[Word]] = []
    for line, statement, block in _statements(MARK.sub("", text)):
        bare = re.sub(r"^(\s*(<#.*?#>|#[^\n]*)?\s*\n)*", "", statement, flags=re.DOTALL)
        line += statement[: len(statement) - len(bare)].count("\n")
        if found := ASSIGNMENT.fullmatch(bare):
            name = re.sub(r"^(env|script|global|local):", "", found["name"], flags=re.IGNORECASE)
            value = _value(found["value"].strip(), line, variables, block)
            own = re.search(rf"\${re.escape(name)}\b", found["value"], re.IGNORECASE)
            variables.set(name, value, line, block, "add" if found["more"] else "extend" if own else "set")
        elif found := ADDED.fullmatch(bare):
            variables.set(
                found["name"], _value(found["value"].strip(), line, variables, block, many=True), line, block, "add"
            )
        elif found := PARAMETERS.fullmatch(bare):
            for part in _parts(found["inside"]):
                if own := ASSIGNMENT.fullmatch(part):
                    variables.set(own["name"], _value(own["value"].strip(), line, variables, block), line, block)
        elif words := _words(bare, line, variables, block):
            commands.append(words)
    return commands


def _statements(text: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Line, text and block of each statement: parted by lines, `;` and braces outside of parentheses and strings."""
    numbers, blocks, inside = count(), [], []
    begin, start, line = 1, 0, 1
    for piece in PIECE.finditer(text):
        kind, content = piece.lastgroup, piece[0]
        ends = not inside and (kind == "brace" or (kind == "end" and content != "|"))
        if kind == "open" or (kind == "close" and content == "(") or (kind == "brace" and content == "{" and inside):
            inside.append(content)
        elif kind in ("close", "brace") and inside:
            inside.pop()
        if ends:
            if text[start : piece.start()].strip():
                yield begin, text[start : piece.start()], tuple(blocks)
            if content == "{":
                blocks.append(next(numbers))
            elif content == "}" and blocks:
                blocks.pop()
            start = piece.end()
        line += content.count("\n")
        begin = line if ends else begin
    if text[start:].strip():
        yield begin, text[start:], tuple(blocks)


def _value(
    text: str, line: int, variables: Variables, block: tuple[int, ...], many: bool = False
) -> str | list[str] | None:
    """A string, a number, an array, another variable; None for what only PowerShell would work out."""
    text = re.sub(r"\s+#[^\n'\"]*$", "", text)
    if EMPTY.fullmatch(text):
        return []
    array = re.fullmatch(r"@\((?P<inside>.*)\)", text, re.DOTALL)
    parts = [part for part in _parts(array["inside"] if array else text) if part]
    values = [_single(part, variables, block) for part in parts]
    if any(value is None for value in values):
        return None
    flat = [each for value in values if value is not None for each in ([value] if isinstance(value, str) else value)]
    return flat if array or many or len(parts) != 1 or isinstance(values[0], list) else flat[0]


def _parts(text: str) -> Iterator[str]:
    """What commas and lines part."""
    part, depth = "", 0
    for piece in PIECE.finditer(text):
        kind, content = piece.lastgroup, piece[0]
        depth += {"(": 1, ")": -1}.get(content[-1:], 0) if kind in ("open", "close") else 0
        if kind == "comment":
            continue
        if depth == 0 and (kind == "end" or (kind == "plain" and content == ",")):
            yield part.strip()
            part = ""
        elif depth == 0 and kind == "plain" and "," in content:
            *whole, last = content.split(",")
            for each in whole:
                yield (part + each).strip()
                part = ""
            part = last
        else:
            part += content
    yield part.strip()


def _single(text: str, variables: Variables, block: tuple[int, ...]) -> str | list[str] | None:
    text = re.sub(rf"^{TYPE}(?=.)", "", text)
    if quoted := re.fullmatch(r"'((?:''|[^'])*)'", text, re.DOTALL):
        return quoted[1].replace("''", "'")
    if quoted := re.fullmatch(r'"((?:`.|""|[^"`])*)"', text, re.DOTALL):
        return _filled(quoted[1], variables, block)
    if re.fullmatch(r"\$(true|false|null)", text, re.IGNORECASE):
        return {"$true": "True", "$false": "False"}.get(text.lower(), "")
    if re.fullmatch(r"\$(?:env:)?\w+", text, re.IGNORECASE):
        return _variable(text, variables, block)
    return text if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text, re.IGNORECASE) else None


def _variable(shown: str, variables: Variables, block: tuple[int, ...]) -> str | list[str]:
    name = re.sub(r"^(env|script|global|local):", "", shown.strip("${}"), flags=re.IGNORECASE)
    if not name.isidentifier():
        return variables.unknown(shown, "is not worked out here; write its value")
    return variables.value(name, shown, block)


def _filled(text: str, variables: Variables, block: tuple[int, ...]) -> str:
    """A text in double quotes."""

    def fill(found: re.Match[str]) -> str:
        if found["command"]:
            inner = found["command"][2:-1].strip()
            if re.fullmatch(r"\$\w+", inner):
                return _joined(_variable(inner, variables, block))
            return variables.unknown(found["command"], "is worked out by PowerShell alone; write what it gives")
        if found["variable"]:
            return _joined(_variable(found["variable"], variables, block))
        return '"' if found["doubled"] else WORDS.get(found["escaped"], found["escaped"])

    return IN_QUOTES.sub(fill, text)


def _joined(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _words(text: str, line: int, variables: Variables, block: tuple[int, ...]) -> list[Word]:
    words: list[Word] = []
    word, begin = None, line

    def end() -> None:
        nonlocal word
        if word is not None:
            words.append(variables.word(word, begin))
        word = None

    inside, expression = 0, ""  # parentheses that are open, and what stands in them
    for piece in PIECE.finditer(text):
        kind, content = piece.lastgroup, piece[piece.lastgroup or 0]
        inside += (kind == "open" or piece[0] == "(") - (inside > 0 and piece[0] in (")", "}"))
        if inside or expression:
            expression += piece[0]
            if not inside:
                word, begin = word or "", line if word is None else begin
                word += variables.unknown(expression, "is worked out by PowerShell alone; write what it gives")
                expression = ""
        elif kind in ("space", "end"):
            end()
        elif kind != "comment" and not (kind == "plain" and content == "&" and not words):
            name = f"${content[1:]}" if kind == "splat" else content
            value: str | list[str] = content
            if kind in ("splat", "variable"):
                value = _variable(name, variables, block)
            elif kind == "double":
                value = _filled(content, variables, block)
            elif kind == "single":
                value = content.replace("''", "'")
            for number, part in enumerate([value] if isinstance(value, str) else value):
                if number:
                    end()
                if word is None:
                    word, begin = "", line
                word += part
        line += piece[0].count("\n")
    end()
    return words
