"""What is in tar files and where: an index by offset, made once and kept in a cache folder.

A sample is what has the same stem in one tar file: the path up to the first dot of the file name, as in
https://github.com/webdataset/webdataset#the-webdataset-format.
"""

import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..configs.bounded import LINE, MIB, open_regular, parse_json, regular
from ..configs.errors import UserError
from ..configs.files import replacing
from ..images.endings import HAS_HEIF, SUFFIXES
from .keys import content_key, file_stamp
from .listing import SYSTEM_FOLDERS, folded
from .source import (
    CAPTION_LISTS,
    Problems,
    caption_list,
    decode_text,
    is_utf8,
    looks_like_one_text,
    read_sidecars,
    shown,
)

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # stem, ending
MASK_ENDING = "mask.png"
MASK_STEM = "-masklabel"  # at the end of the stem of a mask, as other trainers write it
CAPTION_ENDINGS = ("txt", "caption", "json")
_BESIDE = {MASK_ENDING: "a mask", "txt": "captions", "caption": "captions", "json": "a record"}
CAPTION_FIELDS = ("caption", "text")  # of a .json, the first that it has
ONE_TEXT = "caption files that look like one text"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ENDINGS = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
INDEX_VERSION = 3  # part of the name of cached indexes
INDEX = pa.schema(
    {
        "shard": pa.int32(),  # place in the sorted list of tar files
        "image": pa.string(),  # name of the member
        "offset": pa.int64(),  # of the image in the tar file, in bytes
        "size": pa.int64(),
        "mask_offset": pa.int64(),
        "mask_size": pa.int64(),  # -1: there is none
        "captions": CAPTION_LISTS,
    }
)


class Member(NamedTuple):
    """A file in a tar file."""

    shard: str
    name: str
    stem: str
    ending: str  # in small letters, without its dot
    offset: int
    size: int
    is_plain: bool  # its bytes are there, in a row
    content: bytes | None  # of captions

    @property
    def is_image(self) -> bool:
        """By its ending."""
        return f".{self.ending}" in SUFFIXES


@dataclass(slots=True)
class Index:
    """Where everything is, a row of `INDEX` for each image."""

    rows: pa.Table
    unreadable: list[int]  # rows whose captions are a problem
    counts: dict[str, int]
    own: dict[str, int]  # images with captions from where


def load_index(shards: Sequence[str], cache: Path | None, problems: Problems, lines: str | None = None) -> Index:
    """The index of some tar files; kept in the folder `cache` until one of them changes, unless it has problems.

    `lines` is what the lines of a caption file are.
    """
    file = None if cache is None else cache / "indexes" / f"{_key(shards, lines)}.parquet"
    if file is not None and file.is_file() and (index := _stored_index(file, shards)):
        return index
    index = _make_index(shards, problems, lines)
    if file is not None and not problems.lines():
        _store_index(file, index)
    return index


def _key(shards: Sequence[str], lines: str | None) -> str:
    """Of where all tar files are, how long they are and when they were written."""
    return content_key(
        "shards", INDEX_VERSION, HAS_HEIF, lines, *((os.path.realpath(shard), file_stamp(shard)) for shard in shards)
    )


def _stored_index(file: Path, shards: Sequence[str]) -> Index | None:
    try:
        regular(file)
        rows = pq.ParquetFile(file, page_checksum_verification=True).read()
        counts, own = (parse_json(rows.schema.metadata[key], str(file)) for key in (b"counts", b"own"))
        if not rows.schema.equals(INDEX) or not all(map(_are_counts, (counts, own))) or not _is_within(rows, shards):
            return None
        rows.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError):
        return None  # cut short, or something else under its name: it is made anew
    return Index(rows, [], counts, own)


def _are_counts(values: Any) -> bool:
    return isinstance(values, dict) and all(type(value) is int for value in values.values())


def _is_within(rows: pa.Table, shards: Sequence[str]) -> bool:
    """Whether each image and mask of an index lies in one of the shards."""
    if any(rows[name].null_count for name in INDEX.names if name != "captions"):
        return False
    number = rows["shard"].to_numpy()
    if len(number) and not (number.min() >= 0 and number.max() < len(shards)):
        return False
    sizes = np.array([os.stat(shard).st_size for shard in shards], np.int64)[number]
    places = [("offset", "size", 0), ("mask_offset", "mask_size", -1)]
    return all(
        bool(((start >= 0) & (size >= least) & (start <= sizes) & (size <= sizes - start)).all())
        for begin, length, least in places
        for start, size in [(rows[begin].to_numpy(), rows[length].to_numpy())]
    )


def _store_index(file: Path, index: Index) -> None:
    """Whole or not at all; other processes may be writing the same."""
    about = {"counts": json.dumps(index.counts), "own": json.dumps(index.own)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            pq.write_table(index.rows.replace_schema_metadata(about), new, write_page_checksum=True)
    except IsADirectoryError:
        return  # a folder of somebody's lies there: the index is made each time
    except OSError as error:
        reason = f"the index of the shards cannot be kept there ({error.strerror or error})"
        raise UserError(f"{file.parent}: {reason}; set `data.cache.dir`") from error


def _make_index(shards: Sequence[str], problems: Problems, lines: str | None) -> Index:
    indexer = Indexer(problems, lines)
    for number, shard in enumerate(shards):
        indexer.add(number, shard)
    counts = {"shards": len(shards)} | indexer.counts
    return Index(pa.concat_tables([INDEX.empty_table(), *indexer.tables]), indexer.unreadable, counts, indexer.own)


class Indexer:
    """Goes through shards, one after the other; what it has found in them."""

    def __init__(self, problems: Problems, lines: str | None = None):
        self.problems, self.lines = problems, lines
        self.tables: list[pa.Table] = []
        self.unreadable: list[int] = []
        self.counts: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self._num_rows = 0

    def add(self, number: int, shard: str) -> None:
        """The rows of one more shard; none of one that cannot be read to its end."""
        try:
            members = _read_members(shard)
        except ValueError as error:
            self.problems.add("tar files that cannot be read", f"{shard}: {error}")
            return
        except OSError as error:
            self.problems.add("tar files that cannot be read", f"{shard}: cannot be read ({error.strerror})")
            return
        samples: defaultdict[str, list[Member]] = defaultdict(list)
        for member in filter(self._is_ours, _with_their_images([*_with_all_images(members)])):
            samples[member.stem].append(member)
        rows: list[dict[str, Any]] = []
        for parts in samples.values():
            images = [member for member in parts if member.is_image]
            if len(images) == 1:
                captions = self._captions(shard, parts, self._num_rows + len(rows))
                rows.append(_row(number, images[0], parts, captions))
            elif images:
                names = " and ".join(member.name for member in images)
                self.problems.add(
                    "samples with several images",
                    f"{shard}: {names} are images of one sample, as its name ends at the first dot; rename one",
                )
            else:
                self.counts["samples without an image"] += 1
        self.tables.append(pa.Table.from_pylist(rows, INDEX))
        self._num_rows += len(rows)

    def _is_ours(self, member: Member) -> bool:
        """Whether a member belongs to a sample; counts or tells of the others."""
        known = member.is_image or member.ending in (MASK_ENDING, *CAPTION_ENDINGS)
        if known and member.is_plain and is_utf8(member.name):
            return True
        if known:
            reason = "is a link or has holes" if not member.is_plain else "has a name that is not UTF-8"
            self.problems.add(
                "members that are not read", f"{member.shard}:{shown(member.name)}: {reason}; pack it again"
            )
        else:
            self.counts[f"ignored .{member.ending} members"] += 1
        return False

    def _captions(self, shard: str, parts: Sequence[Member], row: int) -> list[str] | None:
        files = {member.ending: member for member in parts if member.ending in CAPTION_ENDINGS}
        record = files.pop("json", None)
        try:
            if files:
                contents = {f"{shard}:{member.name}": member.content or b"" for member in files.values()}
                captions = read_sidecars(contents, self.lines)
                if self.lines is None and captions is not None and len(captions) > 1:
                    self.counts.update({ONE_TEXT: 1} if any(map(looks_like_one_text, contents.values())) else {})
                origin = next(iter(files))
            else:
                captions = _json_captions(record) if record else None
                origin = "json"
        except ValueError as error:
            self.problems.add("captions that cannot be used", str(error))
            self.unreadable.append(row)
            return None
        if captions is not None:
            self.own[f".{origin}"] += 1
        return captions


def _with_all_images(members: Sequence[Member]) -> Iterator[Member]:
    """With `photo.v2.png` as the image of `photo.v2`, where its sample would have none: names with several dots."""
    has_image = {member.stem for member in members if member.is_image}
    late = {member.stem for member in members if member.stem not in has_image and _split_late(member).is_image}
    for member in members:
        yield _split_late(member) if member.stem in late else member


def _with_their_images(members: Sequence[Member]) -> Iterator[Member]:
    """With caption files and masks that differ in case or Unicode's spelling, or are called `0.png.txt`, as in folders.

    They belong to the one image that they fit, where it has none of that kind under its stem.
    """
    stems: defaultdict[str, set[str]] = defaultdict(set)
    for member in members:
        if member.is_image:
            for start in (member.stem, member.name):
                stems[folded(start)].add(member.stem)
    taken = {(member.stem, _BESIDE[member.ending]) for member in members if member.ending in _BESIDE}
    for member in members:
        start, ending = member.stem, member.ending
        if ending not in _BESIDE:
            ending = next((each for each in (MASK_ENDING, "txt", "caption") if ending.endswith(f".{each}")), "")
            start = member.name[: -len(ending) - 1]
        meant = [*stems.get(folded(start), ())] if ending else []
        is_free = len(meant) == 1 and (meant[0], _BESIDE[ending]) not in taken
        yield member._replace(stem=meant[0], ending=ending) if is_free and not member.is_image else member


def _split_late(member: Member) -> Member:
    """With an ending that begins at the last dot, or where that of a mask does."""
    before, _, ending = member.ending.rpartition(".")
    if member.ending == MASK_ENDING:
        return member
    if member.ending.endswith(f".{MASK_ENDING}"):
        before, ending = member.ending.removesuffix(f".{MASK_ENDING}"), MASK_ENDING
    if not before or ending not in (*_ENDINGS, *CAPTION_ENDINGS, MASK_ENDING):
        return member
    stem = f"{member.stem}{member.name[len(member.stem) : len(member.name) - len(ending) - 1]}"
    return member._replace(stem=stem, ending=ending)


def _read_members(shard: str) -> list[Member]:
    """All files of a tar file; ValueError "what; what to do" if it is no whole tar file."""
    members: list[Member] = []
    with open_regular(shard) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(6)
        if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
            raise ValueError(f"is compressed with {kind}, so it cannot be read at random; unpack it to a plain .tar")
        stream.seek(0)
        try:
            with tarfile.open(fileobj=_Headers(stream), mode="r:") as tar:  # type: ignore[arg-type]
                while (info := tar.next()) is not None:
                    vars(tar)["members"].clear()  # tarfile keeps them all
                    if info.size < 0 or (not info.issparse() and info.offset_data + info.size > size):
                        raise tarfile.ReadError(f"{shown(info.name)[:80]} has {info.size:,} bytes, more than there are")
                    if not info.isdir() and (member := _member(stream, shard, info)):
                        members.append(member)
                _check_end(stream, tar.offset)
        # numbers of 30 digits, long names of long names, and what else its reader does not expect
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError) as error:
            reason = "names within names" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"is no whole tar file ({reason}); make it or fetch it again") from error
    return members


class _Headers:
    """The stream of a tar file for its reader, which reads headers and no content: so none of them is large."""

    def __init__(self, stream: BinaryIO):
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MIB:
            raise tarfile.ReadError(f"a header has {size:,} bytes")
        return self._stream.read(size)


def _member(stream: BinaryIO, shard: str, info: tarfile.TarInfo) -> Member | None:
    """None for a hidden file, one in a folder of the system, or one without an ending."""
    if not (match := MEMBER.fullmatch(info.name)) or SYSTEM_FOLDERS & {*info.name.lower().split("/")[:-1]}:
        return None
    stem, ending = match[1], match[2].lower()
    if ending == "png" and stem.endswith(MASK_STEM):
        stem, ending = stem.removesuffix(MASK_STEM), MASK_ENDING
    content, plain = None, info.isreg() and not info.issparse()
    if ending.rpartition(".")[2] in CAPTION_ENDINGS and plain:
        if info.size > LINE:
            raise ValueError(f"{shown(info.name)[:80]} has {info.size:,} bytes, more than the {LINE:,} of a caption")
        stream.seek(info.offset_data)
        content = stream.read(info.size)
    return Member(shard, info.name, stem, ending, info.offset_data, info.size, plain, content)


def _check_end(stream: BinaryIO, offset: int) -> None:
    """tarfile takes a broken header, and a file that was cut between two members, for the end of the archive."""
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it was cut: the end mark is missing")
    if any(block):
        raise tarfile.ReadError(f"broken at byte {offset:,}")
    while chunk := stream.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"it goes on after its end mark at byte {offset:,}, as joined tar files do")


def _row(number: int, image: Member, parts: Sequence[Member], captions: list[str] | None) -> dict[str, Any]:
    mask = next((member for member in parts if member.ending == MASK_ENDING), None)
    return {
        "shard": number,
        "image": image.name,
        "offset": image.offset,
        "size": image.size,
        "mask_offset": mask.offset if mask else 0,
        "mask_size": mask.size if mask else -1,
        "captions": captions,
    }


def _json_captions(member: Member) -> list[str] | None:
    """Captions in the metadata of a sample; ValueError "where: what; what to do"."""
    place = f"{member.shard}:{member.name}"
    try:
        text = decode_text(member.content or b"")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    try:
        values = parse_json(text, place)
    except UserError as error:
        if isinstance(cause := error.__cause__, json.JSONDecodeError):
            raise ValueError(f"{place}: is not JSON ({cause.msg} at line {cause.lineno}); correct it") from error
        raise
    field = next((field for field in CAPTION_FIELDS if isinstance(values, dict) and field in values), None)
    try:
        return None if field is None else caption_list(values[field])
    except ValueError as error:
        raise ValueError(f"{place}: its {field!r} {error}") from error
