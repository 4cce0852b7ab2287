"""Headers of binary files, checked before anything relies on them: safetensors, indexes of weights, texts of PNGs."""

import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .bounded import LARGEST, MIB, kind_of, open_regular, parse_json, read_json, regular, why_no_text
from .errors import UserError

MOST_HEADER = 32 * MIB
"""Bytes of the header of a safetensors file; that of SDXL has 400 KB."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Types of the format, and the bits of a number."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MOST_TEXT = 4 * MIB
"""Bytes of one text of a PNG, compressed or not."""


class TensorEntry(NamedTuple):
    """A tensor as the header has it."""

    dtype: str  # F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # in the file, in bytes
    end: int


class SafetensorsHeader(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int  # of the file, in bytes


def safetensors_header(file: str | Path) -> SafetensorsHeader:
    """The header of a safetensors file, every entry of it checked; Missing, or UserError that names the file."""
    with open_regular(file) as stream:
        return header_of_stream(stream, str(file), regular(file).st_size)


def header_of_stream(stream: BinaryIO, name: str, size: int) -> SafetensorsHeader:
    """The same of an opened file of `size` bytes."""
    try:
        return _header(stream, name, size)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error


def _header(stream: BinaryIO, name: str, size: int) -> SafetensorsHeader:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError("is no safetensors file, or was cut off: it is shorter than its header says")
    if length > MOST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than the {MOST_HEADER:,} that are read")
    values = parse_json(stream.read(length), f"{name}: its header", checked_later=True)
    if not isinstance(values, dict):
        raise ValueError(f"is no safetensors file: its header is {kind_of(values)}, not an object")
    metadata = values.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("is no sound safetensors file: its metadata holds more than texts")
    tensors = {tensor: _entry(tensor, about, 8 + length) for tensor, about in values.items()}
    _check_places(tensors, 8 + length, size)
    return SafetensorsHeader(tensors, metadata, size)


def _entry(name: str, about: Any, begin: int) -> TensorEntry:
    what = f"is no sound safetensors file: tensor {name[:120]!r}"
    if why_no_text(name):
        raise ValueError(f"{what}: its name is no text")
    if not isinstance(about, dict):
        raise ValueError(f"{what} is described by {kind_of(about)}")
    dtype, shape, offsets = about.get("dtype"), about.get("shape"), about.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{what} has the unknown type {str(dtype)[:20]!r}")
    if not (isinstance(shape, list) and len(shape) <= 64 and all(map(_is_count, shape))):
        raise ValueError(f"{what} has the shape {str(shape)[:60]}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise ValueError(f"{what} has the place {str(offsets)[:60]}")
    start, end = offsets
    if end < start or (end - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{what} has {end - start:,} bytes, which is not what {dtype} {str(shape)[:60]} takes")
    return TensorEntry(dtype, tuple(shape), begin + start, begin + end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _check_places(tensors: dict[str, TensorEntry], begin: int, size: int) -> None:
    """ValueError for tensors that lie over one another or beyond the file, and for bytes that belong to none."""
    last = begin
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != last:
            what = "lie over one another" if entry.start < last else "leave bytes between them"
            raise ValueError(f"is no sound safetensors file: its tensors {what}")
        last = entry.end
    if last > size:
        raise ValueError(f"was cut off: it has {size:,} bytes, its header says {last:,}")
    if last < size:
        raise ValueError(f"is no sound safetensors file: it goes on after its last tensor, at byte {last:,}")


def weight_index(file: str | Path) -> list[Path]:
    """The files that an index of weights names, all of them in its own folder; UserError for any other index."""
    found = read_json(file).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file}: its weight_map should name the file of each tensor, found {kind_of(found)}")
    names: dict[str, None] = {}
    for name in found.values():
        if not (isinstance(name, str) and is_plain_name(name)):
            raise UserError(f"{file}: its weight_map names {str(name)[:80]!r}, which is no file in its folder")
        names[name] = None
    files = [Path(file).parent / name for name in sorted(names)]
    for each in files:
        regular(each)
    return files


def is_plain_name(name: str) -> bool:
    """Whether it is the name of a file in a folder and nothing else."""
    return (
        bool(name)
        and name not in (".", "..")
        and not any(c in name for c in "/\\\0")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def png_text(file: str | Path, keyword: str) -> str | None:
    """A text of a PNG, the first under its keyword; no pixel is read. None where there is none.

    Missing, or UserError for a file that is no PNG, or one whose text is damaged or takes more than `MOST_TEXT`.
    """
    with open_regular(file) as stream:
        try:
            return _png_text(stream, keyword.encode("latin-1"), regular(file).st_size)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, zlib.error) as error:
            raise UserError(f"{file}: {error}") from error


def _png_text(stream: BinaryIO, keyword: bytes, size: int) -> str | None:
    if stream.read(8) != _SIGNATURE:
        raise ValueError("is no PNG")
    while len(head := stream.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        after = stream.tell() + length + 4  # with its checksum
        if kind == b"IEND" or after > size:
            return None
        if kind in _TEXTS and stream.read(len(keyword) + 1) == keyword + b"\0":
            rest = length - len(keyword) - 1
            if rest > MOST_TEXT:
                raise ValueError(f"its text {keyword.decode()!r} has {rest:,} bytes, more than the {MOST_TEXT:,} read")
            return _decoded(kind, stream.read(max(0, rest)))
        stream.seek(after)
    return None


def _decoded(kind: bytes, content: bytes) -> str:
    """The words of a text chunk, after its keyword."""
    if kind == b"tEXt":
        return content.decode("latin-1")
    if kind == b"zTXt":
        return _inflated(content[1:]).decode("latin-1")
    compressed, _, rest = content[:1], content[1:2], content[2:]
    words = rest.split(b"\0", 2)[-1]
    return (_inflated(words) if compressed == b"\1" else words).decode("utf-8", "replace")


def _inflated(content: bytes) -> bytes:
    stream = zlib.decompressobj()
    found = stream.decompress(content, MOST_TEXT + 1)
    if len(found) > MOST_TEXT:
        raise ValueError(f"its text has more than {MOST_TEXT:,} bytes when it is unpacked")
    return found
