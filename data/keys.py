"""What things are kept under: hashes of all that decides them, and the folder of all caches."""

import hashlib
import json
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ..configs.bounded import KIB, read_json
from ..configs.errors import UserError
from ..configs.files import replace_file

FORMAT = 1
"""Of keys and of what is kept under them: another number, and everything is computed anew."""

KEY_BYTES = 16

Part: TypeAlias = "str | int | float | bytes | tuple[Part, ...] | None"

_COMPONENT_FILES = frozenset({".safetensors", ".json", ".txt", ".model"})
_SETTLED = 2.0  # seconds; the coarsest file times in use (FAT)


def content_key(*parts: Part) -> str:
    """32 hex characters; parts that differ in any value, type or grouping give another key."""
    return hashlib.blake2b(_unambiguous((FORMAT, *parts)), digest_size=KEY_BYTES).hexdigest()


def _unambiguous(part: Part) -> bytes:
    """Type, length and value: reading from the left gives the part back, so no two parts are the same bytes."""
    match part:
        case None:
            kind, value = b"n", b""
        case int():
            kind, value = b"i", str(part).encode()  # in words for True and False, which are no numbers here
        case float():
            kind, value = b"f", struct.pack(">d", part)
        case str():
            kind, value = b"s", part.encode("utf-8", "surrogatepass")  # file names may hold lone surrogates
        case bytes():
            kind, value = b"y", part
        case tuple():
            kind, value = b"t", b"".join(map(_unambiguous, part))
        case _:
            raise TypeError(f"a key cannot be made of {type(part).__name__}")
    return kind + len(value).to_bytes(8, "big") + value


def file_stamp(file: str | Path) -> tuple[int, int, int]:
    """Size, time of writing and time of change, in ns: a file with the same three has the same bytes.

    The last one moves when a file with old times is put in the place of another (cp -p, tar, rsync).
    """
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def weights_hash(folder: Path, cache: Path | None = None) -> str:
    """32 hex characters for the weights, config and tokenizer files of one component folder: their names and bytes.

    Hashes of files are remembered under `cache`, if given, for as long as path, size and times of a file stay the
    same. Raises UserError for a folder that cannot be read or has no such files.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in _COMPONENT_FILES and file.is_file())
        if files:
            return content_key("weights", *((file.name, _remembered_hash(file, cache)) for file in files))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check `model.base`") from error
    kinds = " ".join(sorted(_COMPONENT_FILES))
    raise UserError(f"{folder}: holds no weights, config or tokenizer (looked for {kinds}); check `model.base`")


def _remembered_hash(file: Path, cache: Path | None) -> str:
    if cache is None:
        return _file_hash(file)
    path = str(file.resolve())
    stamp = [path, *file_stamp(file)]
    memory = cache / "weights" / f"{content_key(path)}.json"
    with suppress(OSError, ValueError, TypeError):  # not there, or not ours
        *known, digest, check = read_json(memory, list, KIB * 16)
        if known == stamp and check == content_key(*stamp, digest):  # a flipped bit would be another base
            return digest
    digest = _file_hash(file)
    # a file changed just now may change again without a change of its times, which are counted in ticks
    if time.time_ns() - max(stamp[2:]) > _SETTLED * 1e9:
        with suppress(OSError):  # remembering saves time, nothing else
            memory.parent.mkdir(parents=True, exist_ok=True)
            replace_file(memory, json.dumps([*stamp, digest, content_key(*stamp, digest)]))
    return digest


def _file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).hexdigest()
