"""Scripts that start a trainer: which command of them does, with which flags. Nothing is run.

The ending of a file says whose rules hold: `.bat` and `.cmd` those of Windows' batch files, `.ps1` those of PowerShell,
every other one those of sh.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...configs.bounded import CONFIG, read_text
from ...configs.errors import UserError
from .batch_file import read_batch
from .posix import read_posix
from .powershell import read_powershell
from .values import Setting
from .variables import SECRET_SETTING, Variables, Word

Reader = Callable[[str, Variables], list[list[Word]]]
READERS: dict[str, tuple[Reader, str]] = {
    ".bat": (read_batch, "set {}="),
    ".cmd": (read_batch, "set {}="),
    ".ps1": (read_powershell, "${} = "),
}
"""By the ending of a file: its reader, and how a line sets a variable."""
NOT_STARTING = {
    *("echo", "printf", "print", "cat", "ls", "cp", "mv", "rm", "cd", "wget", "curl", "git", "chmod", "sed", "grep"),
    *("test", "[", "[[", "vim", "nano", "code", "type", "del", "copy", "write-host", "write-output", "rem"),
}
"""Commands that may name a script and do not start it."""


class Script(NamedTuple):
    """A command that starts a script."""

    name: str  # the script's file name
    launcher: list[Setting]  # flags before it, each as `launcher.name`
    settings: list[Setting]  # its own flags
    place: str


def read_commands(text: str, ending: str = "", taken: Mapping[str, str] | None = None) -> list[list[Word]]:
    """The words of each command in a script with that ending; `taken` are variables of the environment."""
    reader, spelled = READERS.get(ending.lower(), (read_posix, "{}="))
    variables = Variables(dict(taken or {}), spelled, fold=reader is not read_posix)
    return reader(text.replace("\r\n", "\n"), variables)


def find_script(path: Path, known: Sequence[str], taken: Mapping[str, str] | None = None) -> Script | None:
    """The command of a file that starts one of the `known` scripts, such as `train_network.py`; None for none.

    UserError for several of them, for a variable in it that nothing sets, and for a file that is no text.
    """
    commands = read_commands(_read(path), path.suffix, taken)
    found = [(index, words) for words in commands for index in _places(words, known)]
    if not found:
        return None
    if len(found) > 1:
        lines = " and ".join(str(words[index].line) for index, words in found)
        raise UserError(f"{path}: trains {len(found)} times, in the lines {lines}; keep one of them")
    index, words = found[0]
    own = _before_redirection(words[index + 1 :])
    doubts = list(_doubts([*words[: index + 1], *own]))
    if doubts and path.suffix.lower() == ".fish":
        words = "is a script of fish, whose variables are not read"
        raise UserError(
            f"{path}: {words}: copy its training command into a file such as train.sh, with the values in it"
        )
    if problems := list(dict.fromkeys(f"{path}:{word.line}: {doubt}" for word, doubt in doubts)):
        raise UserError(problems)
    settings = list(flags_of(own, lambda word: f"{path}:{word.line}"))
    launcher = list(flags_of(words[:index], lambda word: f"{path}:{word.line}", "launcher."))
    return Script(_name(words[index]), launcher, settings, f"{path}:{words[index].line}")


def _read(path: Path) -> str:
    return read_text(path, CONFIG)


def _doubts(words: Sequence[Word]) -> Iterator[tuple[Word, str]]:
    """What cannot be known of them; values of secret flags are not looked at, as they are written nowhere."""
    flag = ""
    for word in words:
        flag = word.text if word.text.startswith("--") else flag
        if not SECRET_SETTING.search(flag.partition("=")[0]):
            yield from ((word, doubt) for doubt in word.doubts)


def _name(word: Word) -> str:
    return PurePosixPath(word.text.replace("\\", "/")).name


def _places(words: Sequence[Word], known: Sequence[str]) -> list[int]:
    """Where a script is started; of one that is named by a variable that cannot be known, where it may be."""
    if _name(words[0]).lower() in NOT_STARTING:
        return []
    names = [{_name(word), *(_name(Word(guess, word.line)) for guess in word.guesses)} for word in words]
    places = [index for index, own in enumerate(names) if own & set(known)][:1]
    return [index for index in places if index == 0 or words[index - 1].text not in ("=", "+=")]


def scripts_of(words: Sequence[Word], pattern: re.Pattern[str]) -> list[str]:
    """The names of scripts in a command that a pattern matches."""
    if _name(words[0]).lower() in NOT_STARTING:
        return []
    return [_name(word) for word in words if not word.text.startswith("-") and pattern.fullmatch(_name(word))]


def _before_redirection(words: Sequence[Word]) -> Sequence[Word]:
    end = next((index for index, word in enumerate(words) if re.match(r"\d*[<>]", word.text)), len(words))
    return words[:end]


def flags_of(words: Sequence[Word], place_of: Callable[[Word], str], prefix: str = "") -> Iterator[Setting]:
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
        name, place = prefix + name.replace("-", "_"), place_of(first)
        if equals:
            yield Setting(name, value, place)
            yield from (Setting(word.text, True, place_of(word)) for word in rest)
        else:
            values = [word.text for word in rest]
            yield Setting(name, (values if len(values) > 1 else values[0]) if values else True, place)
