"""Latents and prompt embeddings on disk, under the hash of all that decides them. Knows no model.

An entry is a dict of tensors; its key is made of content (the bytes of the image file, the caption, the weights of the
encoder, the geometry), so whatever changes asks for another key, and nothing stale can be read. Entries lie in shards,
safetensors files with a name made of their keys. A shard appears by one rename, whole and synced: what a build has
finished stays, whatever ends it.
"""

import errno
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..configs.bounded import open_regular, parse_json
from ..configs.errors import UserError
from ..configs.files import replace_file
from ..configs.headers import MOST_HEADER
from ..configs.ownership import remove_abandoned, remove_file
from ..configs.progress import Bar
from .keys import FORMAT, content_key

if TYPE_CHECKING:
    from torch import Tensor

Entry: TypeAlias = "dict[str, Tensor]"

_HEADER = "loraloom.cache"
_SUFFIX = ".safetensors"
_MOST_MAPPED = 16_384  # shards; Linux allows a process 65,530 mappings
_MOST_CHECKED = 2**30  # bytes that are read before a run: about a second
_ROW_BITS = 32
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "BOOL": "bool"}
"""Types of tensors, as safetensors calls them and as torch does."""


class CacheError(UserError):
    """The cache lacks something, is damaged or cannot be written."""


class _Layout(NamedTuple):
    """One tensor of an entry."""

    name: str
    dtype: str  # in torch
    shape: tuple[int, ...]
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is kept in memory of a shard, some 40 bytes for an entry; row i is its i-th key in alphabetical order."""

    file: Path
    size: int  # bytes
    layouts: list[tuple[_Layout, ...]]  # of each row; the same object for rows that are alike
    starts: "array[int]"  # where each tensor begins in the file, row after row
    firsts: "array[int]"  # of each row and one more: where in `starts` its tensors begin
    checksums: "array[int]"  # crc32 of each row


class Store:
    """Entries of one kind from one encoder, in the shards of one folder.

    A shard that is not whole, or is something else, is not used: `problems` has a line for it and its entries count as
    missing. A store can be used after a fork, and can be pickled.
    """

    def __init__(self, folder: Path, *, shard_entries: int = 256, shard_bytes: int = 64 * 2**20):
        self.folder, self.shard_entries, self.shard_bytes = folder, shard_entries, shard_bytes
        self.problems: list[str] = []
        self._forget()
        remove_abandoned(folder)
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    @property
    def size_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.size for shard in self._shards)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without an entry, in the order given, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self]

    def check(self, keys: Iterable[str], most: int = _MOST_CHECKED) -> None:
        """Takes away shards with a wanted entry that is not what was written: those entries are missing then.

        So many bytes are read at most; `get` looks at each entry again. `problems` has a line for each.
        """
        found: dict[int, str] = {}
        for place in sorted(self._index[key] for key in map(bytes.fromhex, keys) if key in self._index):
            number, row = place >> _ROW_BITS, place & (1 << _ROW_BITS) - 1
            shard = self._shards[number]
            most -= sum(tensor.size for tensor in shard.layouts[row])
            if most < 0:
                break
            if number not in found and (reason := self._why_damaged(number, row)):
                found[number] = f"{shard.file}: {reason}; what it held is computed anew"
        for number in found:
            with suppress(OSError):  # `get` refuses it
                remove_file(self._shards[number].file)
        if found:
            self.refresh()
            self.problems += found.values()

    def _why_damaged(self, number: int, row: int) -> str | None:
        shard = self._shards[number]
        try:
            _check_length(shard)
            same = _checksum(_read_row(self._map(number), shard, row)) == shard.checksums[row]
        except (RuntimeError, OSError) as error:
            return f"cannot be read ({error})"
        return None if same else "damaged, an entry is not what was written"

    def require(self, keys: Iterable[str]) -> None:
        """Raises CacheError unless every key has an entry."""
        wanted = dict.fromkeys(keys)
        if missing := self.missing(wanted):
            raise CacheError(
                f"{self.folder}: {len(missing):,} of {len(wanted):,} entries are missing; "
                "compute them with `loraloom cache` and the same config"
            )

    def get(self, key: str) -> Entry:
        """The tensors of an entry, in memory of their own; CacheError if it is missing or damaged."""
        place = self._index.get(bytes.fromhex(key))
        if place is None:
            raise CacheError(f"{self.folder}: has no entry {key}; compute it with `loraloom cache` and the same config")
        number, row = place >> _ROW_BITS, place & (1 << _ROW_BITS) - 1
        shard = self._shards[number]
        try:
            _check_length(shard)
            entry = _read_row(self._map(number), shard, row)
        except (RuntimeError, OSError) as error:
            raise CacheError(_removed(shard.file, f"cannot be read ({error})")) from error
        if _checksum(entry) != shard.checksums[row]:
            raise CacheError(_removed(shard.file, f"damaged, entry {key} is not what was written"))
        return entry

    def check_room(self, num_bytes: int) -> None:
        """CacheError if so much cannot be written: known before the first entry is computed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            if shutil.disk_usage(self.folder).free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CacheError(
                f"{self.folder}: {num_bytes:,} bytes cannot be written ({error.strerror}); make room or give another "
                "folder as `data.cache.dir`"
            ) from error

    def fill(
        self,
        keys: Sequence[str],
        compute: Callable[[str], Entry],
        *,
        entry_bytes: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: str | None = None,
    ) -> int:
        """Computes this process's part of the missing entries and returns how many that were.

        `keys` are all that are wanted, the same list in every process. `entry_bytes`, the size of one entry, shortens
        shards of large ones to `shard_bytes`. Raises CacheError if a shard cannot be written; whatever ends the
        build, only the entries of the shard under way are lost.

        The files do not depend on interruptions or on the number of processes, as long as the entry of a key is always
        the same. The missing keys, in order, are cut into chunks of one length, the last may be shorter. A build adds
        whole chunks or nothing, so whoever looks later sees the list without some whole chunks, and cutting that gives
        the other chunks as they were. Name and bytes of a shard are made of its chunk alone. Nor does it matter when a
        process looks, before or after the others have begun: a chunk belongs to the process that the place of its first
        key among all `keys` says, which no other chunk can change.
        """
        self.refresh()
        length = max(1, min(self.shard_entries, self.shard_bytes // max(1, entry_bytes)))
        chunks = [chunk for chunk, first in self._chunks(keys, length) if first // length % world == rank]
        total = sum(map(len, chunks))
        with Bar(
            total=total, desc=progress, unit="entry", disable=True if progress is None else None, leave=False
        ) as bar:
            for chunk in chunks:
                entries: dict[str, Entry] = {}
                for key in chunk:
                    entries[key] = _own(compute(key))
                    bar.update()
                file = self.folder / f"{content_key(*chunk)}{_SUFFIX}"
                if file.is_dir():  # somebody else's, which stays
                    file = file.with_name(f"{file.stem}-file{_SUFFIX}")
                _write(file, _serialised(entries))
                self._add(file)
        self.refresh()
        return total

    def refresh(self) -> None:
        """Sees what other processes have written and what was deleted."""
        files = {file.name: file for file in _listing(self.folder) if file.suffix == _SUFFIX}
        if any(shard.file.name not in files for shard in self._shards):
            self._forget()
        self.problems = []
        known = {shard.file.name for shard in self._shards}
        for name in sorted(files.keys() - known):
            try:
                self._add(files[name])
            except CacheError as error:
                self.problems += error.problems

    def _chunks(self, keys: Iterable[str], length: int) -> Iterable[tuple[list[str], int]]:
        """The missing keys in chunks, each with the place of its first key among all keys."""
        missing = [(key, place) for place, key in enumerate(dict.fromkeys(keys)) if key not in self]
        for start in range(0, len(missing), length):
            chunk = missing[start : start + length]
            yield [key for key, _ in chunk], chunk[0][1]

    def _forget(self) -> None:
        self._index: dict[bytes, int] = {}  # of each key: number of its shard, row in it
        self._shards: list[_Shard] = []
        self._mapped: dict[int, Tensor] = {}  # of each shard that was read from: its bytes

    def _add(self, file: Path) -> None:
        shard, keys = _read_shard(file)
        first = len(self._shards) << _ROW_BITS
        self._shards.append(shard)
        for row, key in enumerate(keys):
            self._index.setdefault(key, first + row)

    def _map(self, number: int) -> "Tensor":
        import torch

        if number not in self._mapped:
            if len(self._mapped) >= _MOST_MAPPED:
                del self._mapped[next(iter(self._mapped))]
            # not `safe_open`: it keeps every name (another 400 MB for a million entries) and takes twice as long
            shard = self._shards[number]
            self._mapped[number] = torch.from_file(str(shard.file), size=shard.size, dtype=torch.uint8)
        return self._mapped[number]


def _check_length(shard: _Shard) -> None:
    """OSError for a shard that was cut since it was mapped: to read beyond the end of a file ends the process (SIGBUS).

    One that was deleted is whole as long as it is mapped.
    """
    try:
        size = os.stat(shard.file).st_size
    except FileNotFoundError:
        return
    if size < shard.size:
        raise OSError(errno.EIO, f"{size:,} of its {shard.size:,} bytes are left")


def _own(entry: Entry) -> Entry:
    """A copy: `compute` may return views of a batch, or go on writing into its tensors."""
    import torch

    assert entry, "an entry has at least one tensor"
    assert all(str(tensor.dtype).removeprefix("torch.") in _DTYPES.values() for tensor in entry.values())
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in entry.items()
    }


def _checksum(entry: Entry) -> int:
    """crc32 of names, types, shapes and values."""
    import torch

    total = 0
    for name, tensor in sorted(entry.items()):
        total = zlib.crc32(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _serialised(entries: dict[str, Entry]) -> bytes:
    """A shard; the same entries always give the same bytes."""
    import safetensors.torch

    checksums = {key: _checksum(entry) for key, entry in entries.items()}
    tensors = {f"{key}/{name}": tensor for key, entry in entries.items() for name, tensor in entry.items()}
    # one text and not several: safetensors writes the texts of a header in another order each time
    header = json.dumps({"crc32": checksums, "format": FORMAT}, sort_keys=True, separators=(",", ":"))
    return safetensors.torch.save(tensors, {_HEADER: header})


def _read_shard(file: Path) -> tuple[_Shard, list[bytes]]:
    """A shard's header and its keys; CacheError if it is not whole or was written by something else."""
    try:
        size = file.stat().st_size
        header, begin = _read_header(file, size)
        own = parse_json(header.pop("__metadata__", {}).get(_HEADER, "{}"), "its header")
        if own.get("format") != FORMAT:
            raise ValueError("no shard of this cache format")
        if begin + max(info["data_offsets"][1] for info in header.values()) != size:
            raise ValueError("it has not the length that its header says")
        rows: dict[str, list[tuple[_Layout, int]]] = {}
        for key, _, name in sorted(tensor.partition("/") for tensor in header):
            info = header[f"{key}/{name}"]
            start, stop = info["data_offsets"]
            layout = _Layout(name, _DTYPES[info["dtype"]], _sides(info["shape"]), stop - start)
            rows.setdefault(key, []).append((layout, begin + start))
        if list(rows) != sorted(own["crc32"]):
            raise ValueError("its tensors are not those that its header lists")
        layouts = [tuple(layout for layout, _ in row) for row in rows.values()]
        alike = {layout: layout for layout in layouts}
        shard = _Shard(
            file,
            size,
            [alike[layout] for layout in layouts],
            array("Q", (start for row in rows.values() for _, start in row)),
            array("I", accumulate((len(row) for row in rows.values()), initial=0)),
            array("I", (own["crc32"][key] for key in rows)),
        )
        return shard, [bytes.fromhex(key) for key in rows]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise CacheError(
            f"{file}: not used ({error}); its entries are computed again, and it may be deleted"
        ) from error


def _sides(shape: list[Any]) -> tuple[int, ...]:
    """Of a tensor; ValueError for what is no shape, as a flipped bit makes 2.3 of 2,3."""
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its header has the shape {shape}")
    return tuple(shape)


def _read_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    with open_regular(file) as stream:
        begin = 8 + int.from_bytes(stream.read(8), "little")
        if begin > size or begin > MOST_HEADER:
            raise ValueError("not a whole safetensors file")
        return parse_json(stream.read(begin - 8), "its header", checked_later=True), begin


def _read_row(content: "Tensor", shard: _Shard, row: int) -> Entry:
    """Copies of the tensors of one entry; RuntimeError if they do not fit their place."""
    import torch

    entry: Entry = {}
    starts = shard.starts[shard.firsts[row] : shard.firsts[row + 1]]
    for tensor, start in zip(shard.layouts[row], starts, strict=True):
        copied = content[start : start + tensor.size].clone()  # whose begin suits every type, the file's does not
        entry[tensor.name] = copied.view(getattr(torch, tensor.dtype)).reshape(tensor.shape)
    return entry


def _removed(file: Path, reason: str) -> str:
    """A shard that is no good is taken away, so that the next start computes what it held, and only that."""
    try:
        remove_file(file)
    except OSError:
        return f"{file}: {reason}; delete it and start again: only what it held is computed anew"
    return f"{file}: {reason}; it was removed: start again or resume, and only what it held is computed anew"


def _listing(folder: Path) -> list[Path]:
    """Files of a folder; none if it is not there yet."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(
            f"{folder}: cannot be read ({error.strerror}); give another folder as `data.cache.dir`"
        ) from error


def _write(file: Path, content: bytes) -> None:
    """Writes a shard whole or not at all; CacheError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(file, content)
    except OSError as error:
        raise CacheError(
            f"{file}: {len(content):,} bytes cannot be written ({error.strerror}); make room or give another folder as "
            "`data.cache.dir`, and start again: what is finished stays"
        ) from error
