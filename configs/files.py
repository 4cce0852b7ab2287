"""Files that appear whole or not at all, whatever ends the process or the machine in the middle."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_OS_ERROR = re.compile(r"\(os error (?P<number>\d+)\)")  # as Rust words it
_TEMPORARY = re.compile(r"\.tmp-(?P<host>.*)-(?P<pid>\d+)$")
_DAY = 86_400  # seconds


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name for a new file, which takes the place of `file` when the block ends without an error.

    It is on disk, with its name, when this returns. Permissions are by umask, as the block itself makes the file.
    """
    temporary = file.with_name(f"{file.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync(file.parent)


def replace_file(file: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all; text as UTF-8."""
    with replacing(file) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_folder(folder: Path, contents: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes a folder whole or not at all: path in it -> what writes that file. An old one goes when the new one is."""
    new = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        for path, write in contents.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            write(new / path)
            sync(new / path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sync(folder.parent)


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Unfinished files of processes that were killed; of other machines only those that nobody can still be writing."""
    for file in folder.glob("*.tmp-*"):
        if match := _TEMPORARY.search(file.name):
            with suppress(OSError):  # another process removes it too, or the folder is only for reading
                dead = match["host"] == socket.gethostname() and not _is_alive(int(match["pid"]))
                if dead or time.time() - file.stat().st_mtime > _DAY:
                    file.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True
