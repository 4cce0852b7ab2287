"""The one place that removes and replaces: only what we wrote, and only while it is as we wrote it.

`record` knows what that is. Whatever else lies in the way is named in a UserError and stays as it is; links are neither
followed nor written through. Files in places of ours alone (caches, folders that are being built) need no record:
`files.replace_file` writes those.
"""

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .bounded import read_json
from .errors import UserError
from .files import TEMPORARY, is_alive, naming, sync, temporary_name, temporary_of
from .plain import plain
from .record import Record, blocked, digest, is_inside, is_regular, place, record_of

_LITTER = re.compile(r"\.DS_Store|\._.*|(eh)?Thumbs\.db|desktop\.ini|\.directory|\.localized", re.IGNORECASE)
_LITTER_FOLDER = "@eaDir"
MANIFEST = "manifest.json"
_DAY = 86_400  # seconds
_MOST = 10_000  # names that are looked at to tell what is foreign
_LARGEST_MANIFEST = 16 << 20
_LARGEST_REQUEST = 64  # bytes: of spaces and newlines


# Files


def why_foreign(file: Path, owner: Path | None = None, by: str = "") -> str | None:
    """Why a file may not be replaced; None where nothing is there, or what we wrote. `owner`: the record's folder.

    With `by`, only what was written under that name may.
    """
    return record_of(owner or file.parent).why_foreign(file, by)


@contextmanager
def writing(file: Path, owner: Path | None = None, by: str = "", over: bool = False) -> Iterator[Path]:
    """A name for a new file, which gets the name `file` when the block ends without an error, whole and on disk.

    UserError, before and after the block, where something lies there that we did not write. `owner` is the folder of
    its record, its own one when not given; `by` says what wrote it, and what was written as something else is only
    replaced with `over`. Permissions are by umask.
    """
    record = record_of(owner or file.parent)
    allowed = "" if over else by
    _check(record, file, allowed)
    with temporary_of(file) as new:
        yield new
        sync(new)
        _publish(record, new, file, by, allowed)
    sync(file.parent)


def write_file(file: Path, content: bytes | str, owner: Path | None = None, by: str = "") -> None:
    """Writes a file whole or not at all, as `writing` does; text as UTF-8."""
    with writing(file, owner, by) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def begin_log(file: Path, owner: Path, by: str = "") -> None:
    """Makes a file of ours that grows by being appended to; UserError where a foreign one lies there."""
    record = record_of(owner)
    _check(record, file, by)
    entry = record.entries.get(record.path_of(file))
    if entry is None or not entry.grows or entry.by != by:
        record.add({record.path_of(file): None}, by)
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def cut_half_line(file: Path) -> None:
    """Takes away what stands behind the last newline of a log of ours: a killed process may have left half a line."""
    if is_regular(file):
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def append(file: Path, content: bytes) -> None:
    """Adds to a log of ours, all or nothing; its folder is made again if it has gone. OSError, also for a link."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(file, flags, 0o666), "ab", buffering=0) as stream:
        end = os.fstat(stream.fileno()).st_size
        if stream.write(content) < len(content):  # a disk takes what it has room for, without an error
            stream.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def claim_logs(files: Iterable[Path], owner: Path, by: str = "") -> None:
    """Files that a library of ours has just made and goes on to write."""
    record = record_of(owner)
    record.add({record.path_of(file): None for file in files if not blocked(owner, file) and is_regular(file)}, by)


def check_file(file: Path, owner: Path | None = None, by: str = "") -> None:
    """UserError where something lies at a path that we did not write, or that was changed since."""
    _check(record_of(owner or file.parent), file, by)


def _check(record: Record, file: Path, by: str) -> None:
    if why := record.why_foreign(file, by):
        raise UserError(f"{plain(file)}: {why}; it stays as it is: move it away, or write to another place")


def _publish(record: Record, new: Path, file: Path, by: str, allowed: str) -> None:
    content = digest(new)
    assert content is not None, new
    there = os.path.lexists(file)
    _check(record, file, allowed)
    record.add({record.path_of(file): content}, by)
    if there:
        os.replace(new, file)
        return
    try:
        place(new, file)
    except FileExistsError:
        _check(record, file, allowed)
        os.replace(new, file)


def check_out(
    out: Path,
    replace: bool,
    *inputs: str | Path,
    option: str = "--out",
    flag: str = "--force",
    whole: bool = False,
) -> None:
    """What a command is to write may be written: nothing is there, or what we wrote and `replace` was asked for.

    UserError else, and for a place that is one of the inputs, in one or around one. `whole`: it is a folder.
    """
    for each in inputs:
        there = Path(each)
        if os.path.exists(there) and (lies_in(out, there) or lies_in(there, out)):
            raise UserError(f"{option} {plain(out)}: is, holds or lies in {plain(each)}, which is read; give another")
    if not os.path.lexists(out):
        return
    if not replace:
        words = f"give another, or {flag}, which replaces only what loraloom wrote and nobody changed"
        raise UserError(f"{option} {plain(out)}: is there already; {words}")
    is_folder = out.is_dir() and not out.is_symlink()
    why = _words(foreign_in(out)) if whole and is_folder else why_foreign(out)
    if why:
        raise UserError(f"{option} {plain(out)}: is there already, and {why}: it is never replaced; give another")


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, as the file system sees it: through links, mounts and letter case."""
    try:
        path, folder = path.expanduser().resolve(), folder.expanduser().resolve()
        if path.is_relative_to(folder):
            return True
        there = os.stat(folder)
    except (OSError, ValueError, RuntimeError):  # a loop of links, NUL, no such place
        return False
    for each in (path, *path.parents):
        with suppress(OSError):
            if os.path.samestat(os.stat(each), there):
                return True
    return False


# Folders that are written and replaced whole


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends without an error, on disk.

    It gets a record of its own. UserError, before and after the block, where anything lies in the old one that we did
    not write; only what systems leave in folders goes with it.
    """
    check_folder(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_folders(folder)
    new = _begin_building(folder)
    try:
        with naming(folder):
            yield new
            _seal(new)
            _swap(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # made above, by nobody else
        raise
    sync(folder.absolute().parent)


def write_folder(folder: Path, contents: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes a folder whole or not at all, as `writing_folder` does: path in it -> what writes that file."""
    with writing_folder(folder) as new:
        for path, write in contents.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            write(new / path)


def enter_file(file: Path, owner: Path, by: str = "") -> None:
    """A file that is known to be ours from its content, in a record that does not have it yet."""
    record = record_of(owner)
    if record.path_of(file) not in record.entries and (found := digest(file)):
        record.add({record.path_of(file): found}, by)


def enter_folder(folder: Path, owner: Path, by: str = "") -> None:
    """What `writing_folder` wrote, in the record of a folder that it lies in, too."""
    own, record = record_of(folder), record_of(owner)
    found = {record.path_of(folder / path): sha256 for path, entry in own.entries.items() for sha256 in entry.hashes}
    record.add(found | {record.path_of(folder / own.file.name): digest(own.file)}, by)


def check_folder(folder: Path) -> None:
    """UserError where a folder cannot be replaced whole."""
    if why := why_foreign_folder(folder):
        raise UserError(f"{plain(folder)}: {why}; it stays as it is: move it away, or write to another place")


def why_foreign_folder(folder: Path) -> str | None:
    """Why a folder may not be replaced whole; None where nothing is there, or all in it is ours."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return "is a link" if folder.is_symlink() else "is no folder"
    return _words(foreign_in(folder))


def foreign_in(folder: Path) -> list[str]:
    """Paths in a folder of what we did not write, or what was changed since, by the folder's own record.

    Litter of the system is not among them. At most so many as are needed to tell.
    """
    record = record_of(folder)
    return [
        plain(os.path.relpath(path, folder))
        for path in _walk(folder.absolute())
        if path != record.file and not (is_regular(path) and record.owns(path))
    ]


def _words(foreign: list[str]) -> str | None:
    if not foreign:
        return None
    words = f"{', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}"
    return f"holds what loraloom did not write, or what was changed since ({words})"


def _walk(folder: Path) -> Iterator[Path]:
    """All files and links in a folder but litter; folders are gone into and not named. Stops at some number."""
    count, waiting = 0, [folder]
    while waiting:
        try:
            found = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in found:
            count += 1
            if count > _MOST:
                return
            if _is_litter(entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                yield Path(entry.path)


def _begin_building(folder: Path) -> Path:
    """A new folder beside it, whose record says that all in it is ours."""
    new = folder.absolute().with_name(temporary_name(folder.name))
    _remove_building(new)  # of a killed process that had the number of this one
    while True:
        try:
            with naming(folder):
                new.mkdir()
            break
        except FileExistsError:  # not ours
            new = new.with_name(f"{folder.name}.tmp-{os.urandom(4).hex()}")
    try:
        with naming(folder):
            record_of(new).begin_building()
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # made above, by nobody else
        raise
    return new


def _seal(new: Path) -> None:
    """Every file is on disk, and in the record."""
    record = record_of(new)
    files = sorted(path for path in new.rglob("*") if is_regular(path) and path != record.file)
    lines = {record.path_of(path): digest(path) for path in files}
    for path in files:
        sync(path)
    for path in new.rglob("*"):
        if path.is_dir():
            sync(path)
    record.file.unlink()
    record.add(lines)
    sync(new)


def _swap(new: Path, folder: Path) -> None:
    """The new one has the name; what the old one held is gone if it was ours."""
    check_folder(folder)
    if not os.path.lexists(folder):
        os.rename(new, folder)
        return
    old = _free(folder.absolute(), "old")
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    remove_recorded(old, litter=True)
    with suppress(OSError):
        if not foreign_in(old):
            record_of(old).file.unlink()
            _remove_litter(old)
        old.rmdir()
    if old.is_dir():
        print(f"{plain(old)}: {_words(foreign_in(old))}, which came into the folder meanwhile: it is kept")


def _remove_building(new: Path) -> None:
    """A folder that `_begin_building` made, if it is still there."""
    if new.is_dir() and not new.is_symlink() and record_of(new).building:
        shutil.rmtree(new, ignore_errors=True)


def _remove_abandoned_folders(folder: Path) -> None:
    """What killed processes were building in its place."""
    for path in folder.absolute().parent.glob(f"{_escaped(folder.name)}.tmp-*"):
        match = TEMPORARY.search(path.name)
        if match and match["host"] == socket.gethostname() and not is_alive(int(match["pid"])):
            _remove_building(path)


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


# Removing


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of files that were to go; paths in the folder."""

    gone: list[str]
    left: list[str]  # changed since, so not ours any more


def remove_recorded(root: Path, by: Callable[[str, str], bool] | None = None, litter: bool = False) -> Removed:
    """Removes what the record of a folder says and what is as we wrote it, then the folders that it leaves empty.

    `by(path, who wrote it)` chooses. With `litter`, what systems left in these folders goes with them.
    """
    record = record_of(root)
    chosen = [path for path, entry in record.entries.items() if by is None or by(path, entry.by)]
    gone, left = [], []
    for path in sorted(chosen):
        file = root / path
        if not os.path.lexists(file):
            gone.append(path)
        elif record.owns(file):
            file.unlink()
            gone.append(path)
        else:
            left.append(path)
    record.drop(gone)
    _remove_empty(root, gone, litter)
    return Removed(gone, left)


def remove_checkpoint(folder: Path) -> list[str]:
    """Removes what the manifest of a folder says and what is as it says, and the folder if nothing else is in it.

    What is left, by name. A folder without a manifest of ours stays whole.
    """
    listed = read_manifest(folder)
    if listed is None:
        return _names(folder)
    sealed = (folder / MANIFEST).stat().st_mtime_ns
    for path, (size, sha256) in listed.items():
        file = folder / path
        if blocked(folder, file) or not is_regular(file):
            continue
        status = file.stat()
        # unchanged since the manifest was written, or the same bytes: a large state is not read for nothing
        if status.st_size == size and (status.st_mtime_ns <= sealed or digest(file) == sha256):
            file.unlink()
    _remove_empty(folder, listed, litter=True)
    if not [name for name in _names(folder) if name != MANIFEST]:
        (folder / MANIFEST).unlink()
        _remove_litter(folder)
        with suppress(OSError):
            folder.rmdir()
    return _names(folder)


def read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Path to size and SHA-256 of each file of a checkpoint; None where no manifest of ours describes a real folder."""
    if folder.is_symlink() or not folder.is_dir() or not is_regular(folder / MANIFEST):
        return None
    try:
        values = read_json(folder / MANIFEST, limit=_LARGEST_MANIFEST)
        files = {path: (entry["size"], entry["sha256"]) for path, entry in values["files"].items()}
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return None
    sound = isinstance(values.get("schema"), int) and all(
        is_inside(path) and isinstance(size, int) and isinstance(sha256, str) for path, (size, sha256) in files.items()
    )
    return files if sound else None


def remove_named(folder: Path, names: re.Pattern[str]) -> list[str]:
    """Removes regular files by names that only we give, right in a real folder; what is left, by name."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name] if os.path.lexists(folder) else []
    for name in _names(folder):
        if names.fullmatch(name) and is_regular(folder / name):
            (folder / name).unlink()
    return _names(folder)


def remove_file(file: Path) -> bool:
    """Removes a regular file whose name only we give, in a place of ours alone; whether it was there."""
    if not is_regular(file):
        return False
    file.unlink(missing_ok=True)
    return True


def take_request(file: Path) -> bool:
    """Whether an empty file was put there, as `touch` makes one; it is taken away. Anything else is no request."""
    if not is_regular(file) or file.stat().st_size > _LARGEST_REQUEST or file.read_bytes().strip():
        return False
    file.unlink()
    return True


def remove_abandoned(folder: Path) -> None:
    """Unfinished files of processes that were killed; of other machines only those that nobody can still be writing."""
    for file in folder.glob("*.tmp-*"):
        if (match := TEMPORARY.search(file.name)) and file.is_file() and not file.is_symlink():
            with suppress(OSError):  # another process removes it too, or the folder is only for reading
                dead = match["host"] == socket.gethostname() and not is_alive(int(match["pid"]))
                if dead or time.time() - file.stat().st_mtime > _DAY:
                    file.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """A real folder with nothing in it but litter goes."""
    if folder.is_dir() and not folder.is_symlink() and not _names(folder):
        _remove_litter(folder)
        with suppress(OSError):
            folder.rmdir()


def publish_folder(new: Path, folder: Path) -> Path | None:
    """Gives a finished checkpoint its name. What is there goes if it is one of ours; else where it was put aside."""
    aside = None
    if os.path.lexists(folder):
        remove_checkpoint(folder)
        aside = set_aside(folder) if os.path.lexists(folder) else None
    os.rename(new, folder)
    return aside


def set_aside(path: Path) -> Path:
    """Another name for what is in the way and not ours: nothing in it is lost."""
    aside = _free(path, "aside")
    os.rename(path, aside)
    return aside


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """An empty folder of ours alone beside `folder`, in a cache, that gets its name unless the block fails."""
    _remove_abandoned_folders(folder)
    new = _begin_building(folder)
    try:
        yield new
        record_of(new).file.unlink()
        os.rename(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # made above, by nobody else
        raise


def _remove_empty(root: Path, paths: Iterable[str], litter: bool) -> None:
    """The folders, below `root`, that files were in which are gone; the deepest first."""
    folders = {parent for path in paths for parent in Path(path).parents if parent != Path(".")}
    for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
        path = root / folder
        if blocked(root, path / "x"):
            continue
        if litter and path.is_dir() and not _names(path):
            _remove_litter(path)
        with suppress(OSError):  # not empty, or not there
            path.rmdir()


def _remove_litter(folder: Path) -> None:
    for entry in os.scandir(folder):
        if _is_litter(entry):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _is_litter(entry: "os.DirEntry[str]") -> bool:
    """What systems leave in folders by themselves: it goes with a folder of ours."""
    if entry.name == _LITTER_FOLDER:
        return entry.is_dir(follow_symlinks=False)
    return bool(_LITTER.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False)


def _names(folder: Path) -> list[str]:
    """What lies in a folder but litter; nothing for what is none."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not _is_litter(entry))
    except OSError:
        return []


def _free(path: Path, word: str) -> Path:
    number = 1
    while True:
        free = path.with_name(f"{path.name}.{word}{'' if number == 1 else f'-{number}'}")
        if not os.path.lexists(free):
            return free
        number += 1
