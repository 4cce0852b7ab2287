"""What a command says of an error that nobody expected: a fault of ours, of code of the user's, or of the machine's.

One line each; only code of the user's is shown, from its file on. `LORALOOM_TRACEBACK=1` shows everything.
"""

import errno
import hashlib
import os
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from .errors import BAD_INPUT, OUT_OF_MEMORY, OWN_CODE, TRAINING_FAILED, UNEXPECTED, UserError
from .files import reason
from .machine import cache_folder
from .plain import plain, plain_lines

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""How torch, its CPU allocator and CUDA's libraries say it, in a RuntimeError."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
_LESS = {
    ("sample", "loraloom.inference"): "; try a smaller --width and --height, or --micro-batch 1",
    ("grid", "loraloom.inference.grid"): "; try a smaller --width and --height",
    ("extract", "resize", "merge"): "; close what else takes memory, or give a smaller --rank",
}
_OURS = Path(__file__).parents[1]
_foreign: set[str] = set()


def foreign(module: str) -> None:
    """Says that a module that was asked for by its name, and all of its package, is code of the user's choice."""
    package = module.partition(".")[0]
    if package not in ("torch", "diffusers", "transformers", "loraloom", ""):
        _foreign.add(package)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not as much memory as was asked for, of the machine's or of a device's."""
    wanted = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError) or wanted


def code_of(error: Exception) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, UserError):
        return error.exit_code
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if _own_code(error.__traceback__) is not None:
        return OWN_CODE
    if _is_of_the_machine(error):
        return TRAINING_FAILED if error.errno in _DISK else BAD_INPUT
    return BAD_INPUT if _is_of_an_import(error.__traceback__) else UNEXPECTED


def as_error(end: SystemExit) -> Exception | None:
    """What code of the user's did that asked Python to end: no command is done, or well, because it says so."""
    if _own_code(end.__traceback__) is None:
        return None
    return RuntimeError(f"SystemExit: {end.code}").with_traceback(end.__traceback__)


def _is_of_the_machine(error: Exception) -> TypeGuard[OSError]:
    """Whether a disk or a file refused; one that is full need not say of which file."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK)


def tell(error: Exception, program: str, arguments: Sequence[str]) -> int:
    """Says on stderr what happened, and returns the exit code of the command."""
    place = _place(program, arguments)
    if is_out_of_memory(error):
        words = (str(error) or "in Python").splitlines()[0]
        less = next((less for verbs, less in _LESS.items() if set(verbs) & set(place.split())), "")
        _say(f"{place}: out of memory ({words}){less}")
        return OUT_OF_MEMORY
    if (begin := _own_code(error.__traceback__)) is not None:
        file = begin.tb_frame.f_code.co_filename
        _say(f"{place}: code of yours, {file}, ended with {type(error).__name__}; what follows begins there")
        print(plain_lines("".join(_from(begin, error)).rstrip("\n")), file=sys.stderr)
        return OWN_CODE
    if _is_of_the_machine(error):
        _say(f"{place}: {reason(error)}")
        return TRAINING_FAILED if error.errno in _DISK else BAD_INPUT
    what = (str(error).strip().splitlines() or [""])[0][:200]
    said = f"{type(error).__name__}{f': {what}' if what else ''}"
    if _is_of_an_import(error.__traceback__):
        stripped = "; -OO takes docstrings away that libraries need: start Python without it" * (sys.flags.optimize > 1)
        _say(f"{place}: a library cannot be imported here ({said}){stripped}; `loraloom doctor` looks at all of them")
        return BAD_INPUT
    _say(f"{place}: {said}; this is a fault of loraloom; the traceback is in {_keep(error, place)}")
    return UNEXPECTED


def _say(words: str) -> None:
    print(f"error: {plain(words)}", file=sys.stderr)


def _place(program: str, arguments: Sequence[str]) -> str:
    """The verb, and the file or folder that it was for."""
    named = [word for word in arguments if not word.startswith("-")]
    verb = named[: 2 if named[:1] == ["adapter"] else 1] if program == "loraloom" else []
    rest = named[len(verb) :]
    there = [word for word in rest if len(word) < 4096 and "\0" not in word and os.path.exists(word)]
    return " ".join((program, *verb, *(there or rest)[:1]))


def _own_code(begin: TracebackType | None) -> TracebackType | None:
    """Where the traceback enters code that is neither ours nor Python's nor an installed package."""
    while begin is not None:
        frame = begin.tb_frame
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] in _foreign or (os.path.isfile(file) and not _is_installed(file)):
            return begin  # compiled modules name files that are not here
        begin = begin.tb_next
    return None


def _is_of_an_import(traceback: TracebackType | None) -> bool:
    """Whether an installed package failed while it was imported: its version, or a variable that it reads."""
    importing = False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        ours = Path(code.co_filename).is_relative_to(_OURS)
        importing = not ours and (importing or code.co_name in ("<module>", "_get_module"))  # or of lazy packages
        traceback = traceback.tb_next
    return importing


def _is_installed(file: str) -> bool:
    paths = sysconfig.get_paths()
    roots = {str(Path(__file__).resolve().parents[1]), *(paths[name] for name in ("stdlib", "purelib", "platlib"))}
    roots |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    found = {file, os.path.realpath(file)}
    compiled = "torchinductor" in file or "/torch_compile" in file  # what torch.compile writes and imports
    return compiled or any(Path(each).is_relative_to(root) for each in found for root in roots | {*map(_real, roots)})


def _real(path: str) -> str:
    return os.path.realpath(path)


def _from(begin: TracebackType, error: Exception) -> list[str]:
    lines = traceback.format_tb(begin)
    return ["Traceback (most recent call last):\n", *lines, *traceback.format_exception_only(error)]


def _keep(error: Exception, place: str) -> str:
    """The file with the whole traceback; the same fault has the same file."""
    text = "".join(traceback.format_exception(error))
    name = f"fault-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:12]}.txt"
    content = f"{place}\n\n{text}".encode("utf-8", "backslashreplace")
    for choose in (lambda: cache_folder(None) / "faults", lambda: Path(tempfile.gettempdir())):
        with suppress(OSError, RuntimeError, ValueError):  # no home, no room, no name
            folder = choose()
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError), (folder / name).open("xb") as file:
                file.write(content)
            return str(folder / name)
    return "no file, as neither the folder of caches nor that of temporary files can be written"
