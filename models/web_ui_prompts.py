r"""Prompts as AUTOMATIC1111's web UI and its relatives write them: read as weighted prompts, or told apart.

    (word:1.4)  ((word))  [word]      weights: 1.4, 1.1 x 1.1, 1 / 1.1; \( and \[ are brackets
    a BREAK b                         windows of their own
    <lora:name:0.8>                   an adapter, by the name of its file
    a AND b, [a:b:0.5], [a|b]         what is not possible here

A prompt that has such marks and none of compel's is read by these rules; any other stays as it is. Imports nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MORE, LESS = 1.1, 1 / 1.1
"""What a pair of round brackets, or of square ones, does to the weight of what is in it."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
ADAPTER = re.compile(r"<(?P<kind>lora|lyco):(?P<name>[^:<>]+)(?P<weights>(?::[^:<>]*)*)>", re.IGNORECASE)
"""An adapter in a prompt."""
_OTHER_NETWORKS = re.compile(r"<(?:hypernet|embedding):[^<>]+>", re.IGNORECASE)
_WEIGHT = re.compile(rf"\([^()]*:\s*{_NUMBER}\s*\)")
_TWICE = re.compile(r"(?<!\\)\(\s*\((?:[^()\\]|\\.)*\)\s*\)")
_SQUARE = re.compile(r"(?<!\\)\[[^\[\]]*\]")
_CHANGES = re.compile(r"(?<!\\)\[[^\[\]]*[:|][^\[\]]*\]")
_BREAK, _AND = re.compile(r"\bBREAK\b"), re.compile(r"\bAND\b")
_COMPEL = re.compile(rf"\)(?:[+-]+|{_NUMBER})|\w[+-]{{2,}}|\w[+-](?=[\s,.)]|$)|\)\s*\.\s*(?:blend|and|swap)\s*\(")
_BARE = re.compile(rf"(?<!\\)\([^()]+\)(?![+-]|{_NUMBER}|\s*\.)")
_TOKEN = re.compile(rf"\\[()\[\]\\]|[(\[\])]|:\s*{_NUMBER}\s*\)|[^\\()\[\]:]+|:|\\")


def is_of_web_ui(prompt: str) -> bool:
    """Whether a prompt has weights or breaks as web UIs write them, and none as compel does."""
    marks = (_WEIGHT, _TWICE, _SQUARE, _BREAK)
    return any(mark.search(prompt) for mark in marks) and not _COMPEL.search(prompt)


def advice_on(prompt: str, weighted: bool = False) -> Iterator[str]:
    """One line for each mark in a prompt for sampling that would be taken as words, with what to write instead."""
    for found in ADAPTER.finditer(prompt):
        weight, name = (found["weights"].split(":")[1:] or ["1"])[0], found["name"]
        ways = f"give --adapter FILE:{weight or 1}, or --adapter-folder FOLDER with {name}.safetensors in it"
        yield f"{found[0]} in a prompt is taken as words; {ways}"
    if found := _OTHER_NETWORKS.search(prompt):
        yield f"{found[0]} in a prompt is taken as words: there are no such networks here; words have files (--adapter)"
    if found := _AND.search(prompt):
        yield 'AND in a prompt is taken as a word; with --weighted ("a star", "a cat").blend(1, 1) mixes prompts'
    if found := _CHANGES.search(prompt):
        yield f"{found[0]} in a prompt does not change it while it samples, which is not possible here; leave it out"
    if weighted:
        yield from _advice_on_weights(prompt)
        return
    for mark in (_WEIGHT, _TWICE, _SQUARE):
        found = mark.search(prompt)
        if found and not _CHANGES.fullmatch(found[0]):
            yield f"{found[0]} in a prompt is taken as words; with --weighted it is a weight"
            break
    if _BREAK.search(prompt):
        yield "BREAK in a prompt is taken as a word; with --weighted and --token-windows 2 it begins a new window"


def marks_in(prompt: str) -> list[str]:
    """What in a prompt looks like more than words."""
    found = (mark.search(prompt) for mark in (ADAPTER, _OTHER_NETWORKS, _AND, _WEIGHT, _TWICE, _SQUARE, _BREAK))
    return list(dict.fromkeys(each[0] for each in found if each))


def _advice_on_weights(prompt: str) -> Iterator[str]:
    """Of a weighted prompt that is read by compel's rules."""
    if is_of_web_ui(prompt):
        return
    if found := _WEIGHT.search(prompt):
        yield f"{found[0]} beside weights in compel's syntax is taken as words; write all of them in one of the two"
    elif (found := _BARE.search(prompt)) and '"' not in prompt:
        yield f"{found[0]} has no weight in compel's syntax; write {found[0][:-1]}:1.1)"


@dataclass(frozen=True, slots=True)
class Piece:
    """Words with one weight."""

    text: str
    weight: float


def translated(prompt: str) -> str:
    """A prompt of a web UI in compel's syntax, and any other as it is: `a (red:1.4) star` -> `a (red)1.4 star`."""
    if not is_of_web_ui(prompt):
        return prompt
    parts = [_joined(weighed(part)) for part in _BREAK.split(prompt)]
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return parts[0] if parts else ""
    quoted = ", ".join('"' + part.replace('"', '\\"') + '"' for part in parts)
    return f"({quoted}).and()"


def weighed(prompt: str) -> list[Piece]:
    """The words of a prompt of a web UI with their weights, by its own rules: brackets multiply, `(a:1.4)` is 1.4."""
    pieces: list[Piece] = []
    round_, square = [], []  # where open brackets begin
    for token in _TOKEN.findall(prompt):
        if token == "(":
            round_.append(len(pieces))
        elif token == "[":
            square.append(len(pieces))
        elif token.startswith(":") and token.endswith(")") and round_:
            _multiply(pieces, round_.pop(), float(token[1:-1]))
        elif token == ")" and round_:
            _multiply(pieces, round_.pop(), MORE)
        elif token == "]" and square:
            _multiply(pieces, square.pop(), LESS)
        else:
            pieces.append(Piece(token[1:] if re.fullmatch(r"\\[()\[\]\\]", token) else token, 1.0))
    for start in round_:  # never closed: to the end, as web UIs have it
        _multiply(pieces, start, MORE)
    for start in square:
        _multiply(pieces, start, LESS)
    return _merged(pieces)


def _multiply(pieces: list[Piece], start: int, factor: float) -> None:
    for place in range(start, len(pieces)):
        pieces[place] = Piece(pieces[place].text, pieces[place].weight * factor)


def _merged(pieces: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].weight == piece.weight:
            found[-1] = Piece(found[-1].text + piece.text, piece.weight)
        else:
            found.append(piece)
    return found


def _number(weight: float) -> str:
    return f"{weight:.4f}".rstrip("0").rstrip(".")


def _joined(pieces: list[Piece]) -> str:
    words = []
    for piece in pieces:
        if text := re.sub(r"([()\\\"])", r"\\\1", piece.text.strip()):
            words.append(text if piece.weight == 1 else f"({text}){_number(piece.weight)}")
    return " ".join(words)
