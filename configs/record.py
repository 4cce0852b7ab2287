"""The record of a folder: which files in it are ours, and what they held when we wrote them; lines are only added.

`.loraloom.jsonl` has a line for each file, such as `{"path": "run.json", "sha256": "…", "by": "run"}`, written before
the file gets its name. A file is ours as long as it holds what one of its lines says; `null` stands for a log that
grows. What cannot be read makes no file ours.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .bounded import LINE, RECORD, parse_json
from .errors import UserError

NAME = ".loraloom.jsonl"
HEAD = {"record": "loraloom", "about": "files that loraloom wrote here; it removes and replaces no others"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PNG, _MARKS = b"\x89PNG\r\n\x1a\n", (b"loraloom\0", b"loraloom.")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_known: dict[str, "Record"] = {}


@dataclass(slots=True)
class Entry:
    """What the lines of one file say."""

    hashes: set[str] = field(default_factory=set)  # of all contents that we gave it
    grows: bool = False  # a log: whatever it holds
    by: str = ""  # what wrote it last


class Record:
    """What is ours in a folder. Other processes may add to it: their lines are read before each answer."""

    def __init__(self, root: Path):
        self.root, self.file = root, root / NAME
        self._supposed: dict[str, Entry] = {}
        self._forget()

    def _forget(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._building = False
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    @property
    def building(self) -> bool:
        """Whether the folder was made by us and is not finished: all in it is ours."""
        self._read()
        return self._building

    def begin_building(self) -> None:
        """For a folder that we have just made, under a name of a moment."""
        self._append([{"building": True}])

    @property
    def entries(self) -> dict[str, Entry]:
        """Path in the folder, with `/`, to what is known of it."""
        self._read()
        if not self._supposed:
            return self._entries
        own = dict(self._entries)
        for path in own.keys() & self._supposed.keys():
            hashes = own[path].hashes | self._supposed[path].hashes
            own[path] = Entry(hashes, own[path].grows, own[path].by)
        return self._supposed | own

    def supposing(self, lines: Mapping[str, str | None], by: str = "") -> "Record":
        """The same as if these lines were in it too."""
        other = Record(self.root)
        other._supposed = dict(self._supposed)
        for path, sha256 in lines.items():
            other._supposed[path] = Entry({sha256} if sha256 else set(), sha256 is None, by)
        return other

    def path_of(self, file: Path) -> str:
        """What its lines call a file."""
        return PurePosixPath(os.path.relpath(file, self.root)).as_posix()

    def owns(self, file: Path) -> bool:
        """Whether it is a regular file, reached without a link, that holds what we wrote."""
        return self._holds(file, self.entries.get(self.path_of(file)))

    def _holds(self, file: Path, entry: Entry | None) -> bool:
        if entry is None or blocked(self.root, file) or not is_regular(file):
            return False
        return entry.grows or digest(file) in entry.hashes

    def why_foreign(self, file: Path, by: str = "") -> str | None:
        """Why a file may be neither replaced nor removed; None where it is ours, or where nothing is.

        With `by`, what another command wrote is foreign too.
        """
        if way := blocked(self.root, file):
            return way
        if not os.path.lexists(file):
            return None
        if file.is_symlink():
            return "is a link"
        if not is_regular(file):
            return "is a folder" if file.is_dir() else "is no regular file"
        entry = self.entries.get(self.path_of(file))
        if entry is None:
            return None if is_marked(file) else "was not written by loraloom, as far as can be known"
        if not self._holds(file, entry):
            return "was changed since loraloom wrote it"
        return f"was written by loraloom, but not as this ({entry.by})" if by and entry.by not in ("", by) else None

    def add(self, lines: Mapping[str, str | None], by: str = "") -> None:
        """Paths with the SHA-256 of what they will hold, or None for logs. On disk when this returns; OSError else."""
        self._append({"path": path, "sha256": sha256, "by": by} for path, sha256 in lines.items())

    def drop(self, paths: Iterable[str]) -> None:
        """Files that are gone: what somebody puts there later is not ours."""
        self._append({"path": path, "gone": True} for path in paths)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if not text:
            return
        self._begin()
        descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
        try:
            end = os.fstat(descriptor).st_size
            cut = end and os.pread(descriptor, 1, end - 1) != b"\n"  # somebody was killed within a line
            text = b"\n" + text if cut else text
            if os.write(descriptor, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _begin(self) -> None:
        """The file with its head, made at once; UserError where something else has its name."""
        if not os.path.lexists(self.file):
            new = self.file.with_name(f"{NAME}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
            try:
                with new.open("xb") as stream:
                    stream.write(json.dumps(HEAD).encode() + b"\n")
                place(new, self.file)
            except FileExistsError:  # another process was faster
                pass
            finally:
                new.unlink(missing_ok=True)
        if not is_regular(self.file) or not self._has_head():
            raise UserError(f"{self.file}: is no record of loraloom's; move it away")

    def _has_head(self) -> bool:
        with self.file.open("rb") as stream:
            return _line(stream.readline(LINE)).get("record") == HEAD["record"]

    def _read(self) -> None:
        try:
            if not is_regular(self.file):
                self._forget()
                return
            with self.file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if self._identity != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._forget()
                    self._identity = status.st_dev, status.st_ino
                if status.st_size > RECORD or (not self._offset and not self._has_head()):
                    self._entries = {}
                    return
                stream.seek(self._offset)
                whole, newline, _ = stream.read(RECORD).rpartition(b"\n")
        except OSError:
            self._forget()
            return
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            self._take(_line(line))

    def _take(self, line: Mapping[str, Any]) -> None:
        path, sha256 = line.get("path"), line.get("sha256")
        self._building = self._building or line.get("building") is True
        if not isinstance(path, str) or not is_inside(path):
            return
        if line.get("gone") is True:
            self._entries.pop(path, None)
            return
        if "sha256" not in line or not (sha256 is None or (isinstance(sha256, str) and _DIGEST.fullmatch(sha256))):
            return
        entry = self._entries.setdefault(path, Entry())
        entry.by = line["by"] if isinstance(line.get("by"), str) else ""
        entry.grows = sha256 is None
        entry.hashes |= {sha256} if sha256 else set()


def record_of(root: Path) -> Record:
    """The record of a folder; what was read of it once is kept."""
    key = os.path.abspath(root)
    if key not in _known:
        if len(_known) >= 64:
            del _known[next(iter(_known))]
        _known[key] = Record(Path(key))
    return _known[key]


def _line(raw: bytes) -> dict[str, Any]:
    """A line of a record; nothing for a damaged one."""
    if not raw.strip() or len(raw) > LINE:
        return {}
    with suppress(UserError):
        values = parse_json(raw, NAME)
        return values if isinstance(values, dict) else {}
    return {}


def is_inside(path: str) -> bool:
    """Whether a path from a record or a manifest names a file in its folder, whatever a stranger wrote there."""
    parts = path.split("/")
    return bool(path) and "\0" not in path and "\\" not in path and not {"", ".", ".."} & set(parts)


def blocked(root: Path, file: Path) -> str | None:
    """Why there is no way from a folder to a file in it without a link; what is not there yet is no hindrance."""
    way = Path(os.path.abspath(root))
    for part in Path(os.path.relpath(file, root)).parts[:-1]:
        way /= part
        try:
            mode = os.lstat(way).st_mode
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"cannot be looked at ({error.strerror})"
        if not stat.S_ISDIR(mode):
            return f"lies behind {way}, which is {'a link' if stat.S_ISLNK(mode) else 'no folder'}"
    return None


def is_regular(file: Path) -> bool:
    """Whether it is a regular file itself, and not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(file).st_mode)
    except (OSError, ValueError):
        return False


def digest(file: Path) -> str | None:
    """SHA-256 of a regular file that is no link; None for anything else, and for what cannot be read."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(file, flags), "rb") as stream:
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        pass
    return None


def is_marked(file: Path) -> bool:
    """Whether a file without a record says that it is ours: a PNG with a text of ours, an adapter with our header."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(8)
            if begin == _PNG:
                return any(text.startswith(_MARKS) for text in _png_texts(stream))
            if file.suffix == ".safetensors" and 0 < (length := int.from_bytes(begin, "little")) < RECORD:
                header = _line(stream.read(min(length, LINE)) if length <= LINE else b"")
                metadata = header.get("__metadata__")
                return isinstance(metadata, dict) and bool(metadata.keys() & {"loraloom.config", "loraloom.method"})
    except OSError:
        pass
    return False


def _png_texts(stream: Any) -> Iterator[bytes]:
    """How the text chunks of a PNG begin, up to its pixels."""
    for _ in range(1000):
        head = stream.read(8)
        length, kind = int.from_bytes(head[:4]), head[4:]
        if len(head) < 8 or kind in (b"IDAT", b"IEND") or length > 2**31:
            return
        begin = stream.read(min(length, 16))
        if kind in _TEXTS:
            yield begin
        stream.seek(length - len(begin) + 4, os.SEEK_CUR)


def place(new: Path, file: Path) -> None:
    """Gives a finished file its name, which nothing may have: FileExistsError else, and both stay as they are."""
    try:
        os.link(new, file, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file)) from None
        os.replace(new, file)
    else:
        new.unlink()
