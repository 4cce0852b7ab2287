"""Files that appear whole or not at all, whatever ends the process or the machine in the middle.

`replacing` and `replace_file` are for places of ours alone: caches, folders that are being built. Whatever a user may
have put something into is written through `ownership`.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WINDOWS = os.name == "nt"
_OS_ERROR = re.compile(r"\(os error (?P<number>\d+)\)")  # as Rust words it
TEMPORARY = re.compile(r"\.tmp-(?P<host>.*)-(?P<pid>\d+)$")
"""How the names of unfinished files and folders end."""


def temporary_name(name: str) -> str:
    """What a file of this process is called until it is finished."""
    return f"{name}.tmp-{socket.gethostname()}-{os.getpid()}"


@contextmanager
def temporary_of(file: Path) -> Iterator[Path]:
    """An empty new file beside `file`, gone when the block ends unless it has got another name."""
    new = file.with_name(temporary_name(file.name))
    if new.is_file() and not new.is_symlink():  # of a killed process that had the number of this one
        new.unlink()
    with naming(file):
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # never through a link
    try:
        with naming(file):
            yield new
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, what a disk says of an unfinished file, or of none, is said of this one; also through safetensors."""
    try:
        yield
    except OSError as error:
        is_named = error.filename is not None and not TEMPORARY.search(str(error.filename))
        if error.strerror and not is_named:  # without a number its words are all it has
            error.filename = str(path)
        raise
    except Exception as error:
        found = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
        if found is None:
            raise
        raise OSError(int(found["number"]), os.strerror(int(found["number"])), str(path)) from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name for a new file, which takes the place of `file` when the block ends without an error.

    It is on disk, with its name, when this returns. Permissions are by umask.
    """
    with temporary_of(file) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
    sync(file.parent)


def replace_file(file: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all; text as UTF-8."""
    with replacing(file) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def as_os_error() -> Iterator[None]:
    """Within, a disk that refuses a file raises OSError, also where safetensors has other words for it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(found["number"]), os.strerror(int(found["number"]))) from error


def reason(error: OSError) -> str:
    """What a disk said, and of which file."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def permit(file: Path) -> None:
    """Permissions by umask, for files of safetensors, which leaves 0600."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """A file or folder is on disk; that of a folder holds the names of its files."""
    if WINDOWS and path.is_dir():  # which opens no folders, and writes their names at once
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs here."""
    if WINDOWS:  # where that would be Ctrl-C
        return _is_alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _is_alive_on_windows(pid: int) -> bool:
    try:
        import psutil  # accelerate needs it
    except ImportError:
        return True
    return psutil.pid_exists(pid)
