"""The variables of a script: what it sets, and why the value of one cannot be known. Nothing of the environment is read
that was not asked for by name.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ...configs.errors import UserError

SECRET = re.compile(
    r"token|secret|passw|passphrase|credential|key(?!word|frame|board)|auth|(?<=.)(?<!OLD)pwd", re.IGNORECASE
)
"""Names of what never goes into a config."""
SECRET_SETTING = re.compile(r"api_key|password|secret|(huggingface|hub|hf|auth)_token")
"""Settings of trainers whose values are shown nowhere."""
MARK = re.compile("\0(\\d+)\0")
Value = str | list[str]
How = Literal["set", "add", "extend"]
Block = tuple[int, ...]
"""The branches, loops and functions around a line, from the outermost one."""


class Word(NamedTuple):
    """A word as the shell would pass it on."""

    text: str
    line: int
    doubts: tuple[str, ...] = ()  # why it cannot be known
    guesses: tuple[str, ...] = ()  # what it could be then


class Doubt(NamedTuple):
    """A place where something stands that cannot be known."""

    shown: str  # as it is spelled there
    words: str
    guesses: tuple[str, ...] = ()


class Assigned(NamedTuple):
    """One assignment."""

    value: Value | None  # None: what only running it would tell
    line: int
    block: Block


@dataclass(slots=True)
class Variables:
    """Those of one script, by their names; where `fold`, large and small letters are the same."""

    taken: dict[str, str] = field(default_factory=dict)  # of the environment, as asked for
    spelled: str = "{}="  # how the script sets one
    fold: bool = False
    _assigned: dict[str, list[Assigned]] = field(default_factory=dict)
    _doubts: list[Doubt] = field(default_factory=list)

    def set(self, name: str, value: Value | None, line: int, block: Block = (), how: How = "set") -> None:
        """Remembers an assignment: of a value, of one to `add` to what is there, or of one that has what is there in
        itself (`extend`). What only runs under a condition is known under that condition.
        """
        before = self._assigned.setdefault(self._key(name), [])
        if how != "set" and before and before[-1].block == block[: len(before[-1].block)]:
            old = before.pop()
            if how == "add":
                value = None if value is None or old.value is None else _joined(old.value, value)
        before.append(Assigned(value, line, block))

    def has(self, name: str) -> bool:
        """Whether anything sets it."""
        return self._key(name) in self._assigned or self._key(name) in self.taken

    def value(self, name: str, shown: str, block: Block = (), otherwise: str | None = None) -> Value:
        """Its value, or a mark in its place; `otherwise` is what the script takes where it is not set."""
        if (taken := self.taken.get(self._key(name))) is not None:
            return taken
        found = self._assigned.get(self._key(name), [])
        if not found:
            return self.unknown(shown, self._unset(name)) if otherwise is None else otherwise
        values = {repr(each.value): each.value for each in found}
        ways = f"or give --env {name}"
        guesses = tuple(each.value for each in found if isinstance(each.value, str))
        if len(values) > 1:
            lines = _listed(dict.fromkeys(each.line for each in found))
            return self.unknown(shown, f"is set in the lines {lines}; keep one of them, {ways}", guesses)
        last = found[-1]
        if last.value is None:
            return self.unknown(shown, f"is set in line {last.line} by what is not run; write its value there, {ways}")
        if all(block[: len(each.block)] != each.block for each in found):
            words = f"is set in line {last.line} in a branch, a loop or a function; set it outside of that, {ways}"
            return self.unknown(shown, words, guesses)
        return last.value

    def unknown(self, shown: str, words: str, guesses: Sequence[str] = ()) -> str:
        """A mark that stands for what cannot be known, wherever it is copied to."""
        doubt = Doubt(shown, f"{shown} {words}", tuple(guesses))
        if doubt not in self._doubts:
            self._doubts.append(doubt)
        return f"\0{self._doubts.index(doubt)}\0"

    def word(self, text: str, line: int) -> Word:
        """With what stood in the script where a mark is."""
        doubts = [self._doubts[int(number)] for number in MARK.findall(text)]
        guesses = [guess for doubt in doubts for guess in doubt.guesses]
        shown = MARK.sub(lambda found: self._doubts[int(found[1])].shown, text)
        return Word(shown, line, tuple(dict.fromkeys(doubt.words for doubt in doubts)), tuple(guesses))

    def _unset(self, name: str) -> str:
        line = self.spelled.format(name) + "…"
        if name not in os.environ:
            return f"is set nowhere in it; add a line {line}"
        if SECRET.search(name):
            return "is a secret by its name, and none is written into a config; take it out of the file"
        return f"is set by your environment alone, which is not read; add a line {line}, or give --env {name}"

    def _key(self, name: str) -> str:
        return name.lower() if self.fold else name


def taken_from_environment(names: Sequence[str]) -> dict[str, str]:
    """The variables that were asked for by `--env`. UserError for a secret, and for one that is not set."""
    problems = [
        f"--env {name}: is a secret by its name; none is written into a config" for name in names if SECRET.search(name)
    ]
    problems += [f"--env {name}: is not set" for name in names if name not in os.environ and not SECRET.search(name)]
    if problems:
        raise UserError(problems)
    return {name: os.environ[name] for name in names}


def _joined(old: Value, new: Value) -> Value:
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    return [*([old] if isinstance(old, str) else old), *([new] if isinstance(new, str) else new)]


def _listed(lines: Sequence[int] | dict[int, None]) -> str:
    *first, last = map(str, lines)
    return f"{', '.join(first)} and {last}" if first else last
