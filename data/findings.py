"""What is known of the images of a source, and the file that keeps it from run to run. Decodes nothing.

The file is a Parquet table with a row for each image: its stamp (location, size and time of change), the fields of a
Finding, and why the image cannot be used.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from PIL import __version__ as pillow_version

from ..configs.bounded import Missing, read_bytes, regular
from ..configs.errors import UserError
from ..configs.files import replacing
from ..configs.machine import cores
from ..images.decoding import PixelRules, Size
from .keys import content_key, file_stamp
from .source import first_line

if TYPE_CHECKING:
    import pyarrow as pa

    from .source import ImageSource

VERSION = 4
"""Of what is kept: another number, and every image is looked at anew."""

_MASKS = 1024  # masks that are read and compared as one piece of work
_ROW = np.dtype(
    [
        ("digest", "S64"),
        ("mask", "S64"),
        ("width", np.int32),
        ("height", np.int32),
        ("mode", "S8"),
        ("orientation", np.uint8),
        ("profile", np.uint8),
    ]
)
_FIELDS = _ROW.names or ()
_CHECK = b"loraloom.checksum"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one image is."""

    digest: bytes = b""
    mask: bytes = b""  # digest of its mask file
    size: Size = (0, 0)  # as shown; as stored for an image that cannot be decoded
    mode: str = ""
    orientation: int = 1
    profile: int = 0  # what its colour profile does: one of those of `images.colour`
    reason: str | None = None  # why it cannot be used

    @property
    def row(self) -> tuple:
        """Values in the order of `_ROW`."""
        return (self.digest, self.mask, *self.size, self.mode.encode(), self.orientation, self.profile)


@dataclass
class Findings:
    """What is known of the images of a source."""

    rows: np.ndarray  # (N,) of _ROW
    known: np.ndarray  # (N,) bool
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def none(cls, count: int) -> "Findings":
        """Nothing known of so many images."""
        return cls(np.zeros(count, _ROW), np.zeros(count, bool))

    def add(self, index: int, finding: Finding) -> None:
        """One more image."""
        self.rows[index] = finding.row
        self.known[index] = True
        if finding.reason is not None:
            self.reasons[index] = finding.reason

    def forget(self, indices: np.ndarray) -> None:
        """So many images less."""
        self.known[indices] = False
        for index in indices:
            self.reasons.pop(int(index), None)


@contextmanager
def remembered(
    findings: Findings, source: "ImageSource", rules: PixelRules, cache: Path | None, notes: list[str]
) -> Iterator[None]:
    """Begins with what earlier scans have found, and keeps what is found within, whatever ends it."""
    memory = None if cache is None else _memory_file(cache, source, rules)
    with ExitStack() as stack:
        if memory is not None:
            try:
                memory.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(memory.with_suffix(".lock")))
            except OSError as error:
                notes.append(_not_kept(memory, error))
                memory = None
        if memory is None:
            yield
            return
        stamps = _stamps(source)
        _recall(memory, stamps, findings, notes)
        _forget_doubted(memory, source, findings)
        _forget_changed_masks(source, findings)
        recalled = findings.known.sum()
        try:
            yield
        finally:
            if findings.known.sum() > recalled:
                _keep(memory, stamps, findings, notes)


def _memory_file(cache: Path, source: "ImageSource", rules: PixelRules) -> Path | None:
    """File with what is known of a source; None if its images are no files.

    Its name is made of what decides the findings besides the images. A source is known by its name and the folder
    around all its files, so that it may grow.
    """
    paths = [path for path in map(source.path, {0, len(source) - 1}) if path is not None] if len(source) else []
    if not paths:
        return None
    folder = os.path.commonpath([path.resolve() for path in paths])
    key = content_key("scan", VERSION, pillow_version, rules.animated, source.name, folder)
    return cache / "scans" / f"{key}.parquet"


def _stamps(source: "ImageSource") -> np.ndarray:
    """(N,) "S32" of location, size and time of change of each image's file; b"" where there is none."""
    stamps = np.zeros(len(source), "S32")
    for index in range(len(source)):
        path = source.path(index)
        if path is not None:
            with suppress(OSError):  # a file that has vanished is a problem when it is read
                stamps[index] = content_key(source.location(index), file_stamp(path))
    return stamps


def _recall(memory: Path, stamps: np.ndarray, findings: Findings, notes: list[str]) -> None:
    """Adds what is known of files that have not changed since."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        regular(memory)
        kept = pq.ParquetFile(memory, page_checksum_verification=True).read()
        if not kept.schema.equals(_schema(stamps.dtype)) or _checksum(kept) != (kept.schema.metadata or {}).get(_CHECK):
            raise ValueError("is not what was written")
    except Missing:
        return
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        notes.append(f"{memory}: {first_line(error)[:120]}; it is made anew, from the images")
        return
    known = _to_numpy(kept["stamp"], stamps.dtype)
    if not len(known):
        return
    order = np.argsort(known)
    places = order[np.searchsorted(known, stamps, sorter=order).clip(max=len(known) - 1)]
    same = (known[places] == stamps) & (stamps != b"")
    indices, places = np.flatnonzero(same), places[same]
    for name in _FIELDS:
        findings.rows[name][indices] = _to_numpy(kept[name], _ROW[name])[places]
    findings.known[indices] = True
    reasons = kept["reason"].take(places)
    for row in np.flatnonzero(reasons.is_valid().to_numpy()):
        findings.reasons[int(indices[row])] = reasons[int(row)].as_py()


def _forget_changed_masks(source: "ImageSource", findings: Findings) -> None:
    """An image's size and time say nothing of the mask file beside it."""

    def mask_digest(index: int) -> bytes | None:
        with suppress(OSError, ValueError):  # then it is looked at again, and the problem told
            return sha256(source.read_mask(index))
        return None

    def changed(indices: np.ndarray) -> np.ndarray:
        return indices[[mask_digest(int(index)) != findings.rows["mask"][index] for index in indices]]

    known = np.flatnonzero(findings.known)
    with ThreadPoolExecutor(cores()) as pool:
        for indices in pool.map(changed, np.split(known, range(_MASKS, len(known), _MASKS))):
            findings.forget(indices)


def _keep(memory: Path, stamps: np.ndarray, findings: Findings, notes: list[str]) -> None:
    """Writes what is known of files, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"stamp": _to_arrow(stamps)} | {name: _to_arrow(findings.rows[name]) for name in _FIELDS}
    columns["reason"] = pa.array([findings.reasons.get(index) for index in range(len(stamps))], pa.string())
    # an image that could not be read may be readable tomorrow, with the same size and time
    worth = findings.known & (findings.rows["digest"] != b"") & (stamps != b"")
    table = pa.table(columns).filter(pa.array(worth))
    try:
        with replacing(memory) as new:
            pq.write_table(table.replace_schema_metadata({_CHECK: _checksum(table)}), new, write_page_checksum=True)
        if _doubted(memory).is_file():
            _doubted(memory).write_bytes(b"")
    except OSError as error:
        notes.append(_not_kept(memory, error))


def _schema(stamp: np.dtype) -> "pa.Schema":
    """Of the table, whose rows are those of `_ROW` with a stamp and a reason."""
    import pyarrow as pa

    own = {name: _to_arrow(np.zeros(0, _ROW[name])).type for name in _FIELDS}
    return pa.schema({"stamp": pa.binary(stamp.itemsize), **own, "reason": pa.string()})


def _checksum(table: "pa.Table") -> bytes:
    """Of all values, so that a flipped bit is seen: Parquet's own cover its pages only."""
    digest = hashlib.blake2b(digest_size=16)
    for name, column in zip(table.column_names, table.columns, strict=True):
        texts = column.to_pylist() if name == "reason" else None
        values = repr([text for text in texts if text]).encode() if texts else _values(column)
        digest.update(b"%s %d " % (name.encode(), len(values)) + values)
    return digest.hexdigest().encode()


def _values(column: "pa.ChunkedArray") -> bytes:
    import pyarrow as pa

    kind = np.dtype(f"S{column.type.byte_width}") if pa.types.is_fixed_size_binary(column.type) else np.dtype(np.uint8)
    return np.ascontiguousarray(_to_numpy(column, kind)).tobytes()


def doubt(source: "ImageSource", index: int, rules: PixelRules, cache: Path) -> None:
    """An image is not what was found of it: the next scan looks at it anew, whatever its size and times say."""
    with suppress(OSError):
        if (memory := _memory_file(cache, source, rules)) and memory.is_file():
            with _doubted(memory).open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(json.dumps(source.location(index)) + "\n")


def _doubted(memory: Path) -> Path:
    return memory.with_suffix(".doubted")


def _forget_doubted(memory: Path, source: "ImageSource", findings: Findings) -> None:
    try:
        lines = read_bytes(_doubted(memory)).decode("utf-8", "replace").splitlines()
    except UserError:  # nobody doubts
        return
    if wanted := set(lines):
        known = np.flatnonzero(findings.known)
        findings.forget(np.array([i for i in known if json.dumps(source.location(int(i))) in wanted], np.int64))


def _not_kept(memory: Path, error: OSError) -> str:
    return f"{memory.parent}: cannot be written ({error.strerror or error}), so the next run reads all images again"


def _to_arrow(column: np.ndarray) -> "pa.Array":
    """Texts of one length stay one buffer instead of an object for each."""
    import pyarrow as pa

    column = np.ascontiguousarray(column)
    if column.dtype.kind != "S":
        return pa.array(column)
    kind = pa.binary(column.dtype.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(column), [None, pa.py_buffer(column.view(np.uint8))])


def _to_numpy(column: "pa.ChunkedArray", dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "S":
        return column.to_numpy()
    array = column.combine_chunks()
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def sha256(data: bytes | None) -> bytes:
    """Digest in hex; b"" of nothing."""
    return b"" if data is None else hashlib.sha256(data).hexdigest().encode()
