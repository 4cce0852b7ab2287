"""Pixels from the bytes of an image file: the one decoder, of training and of pictures given for sampling. No paths.

What a file looks like is what a viewer shows: EXIF orientation applied, colour profiles converted to sRGB, transparency
on a background, 16 bits scaled to 8. What has no such look (damaged, animated, far too large, without a range) is a
BadImage. What `Image.open` or Python code has made already is brought to the same look by `as_shown`.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin
from PIL.Image import Transpose
from PIL.ImageFile import ImageFile

from .colour import CONVERTED, KEPT, to_srgb, use_of
from .endings import HAS_HEIF, INSTALL_HEIF

Size = tuple[int, int]  # width, height

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", *(["HEIF"] if HAS_HEIF else []))
"""What is read; a JPEG may be the first picture of an MPO, as phones write it."""
WHITE = (255, 255, 255)
MIN_SIDE = 16
"""Pixels that an image needs each way."""
MAX_PIXELS = 200_000_000
"""Of an image, so that a small file cannot fill the memory."""

# For the whole process: above it Pillow warns, above twice as much it refuses (its own 89 million warn for a 12000 x
# 12000 photo). `warnings` cannot be silenced for one thread.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_LONGEST_TEXT = 1 << 24  # bytes of a profile, or of EXIF as text, once unpacked
PngImagePlugin.MAX_TEXT_CHUNK = _LONGEST_TEXT  # its own is one million; what is longer never comes to it

_HEIF = frozenset(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"))
_DEEP = frozenset({"I", "I;16", "I;16B", "I;16L", "F"})
_MODES = _DEEP | {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_TO_8_BITS = ((np.arange(65_536) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}  # EXIF orientation to what undoes it
_BITS = 258  # tag of a TIFF: bits of each sample
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
_PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_TEXT_WITH_EXIF = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_PNG_TEXTS_KEPT = 2  # one of each kind


class BadImage(ValueError):
    """Why an image cannot be used, in one line without its path; `size` as stored, where the header could be read."""

    def __init__(self, reason: str, size: Size = (0, 0)):
        super().__init__(reason)
        self.size = size


@dataclass(frozen=True, slots=True)
class PixelRules:
    """What decides the pixels of a file."""

    background: tuple[int, int, int]  # red, green, blue in 0..255, behind transparent pixels
    # "error", "first" or "never": animations and files of several pages are refused, or their first is taken; "never"
    # refuses too, where there is no setting that would take the first
    animated: str
    alpha_mask: bool  # whether opacity is also returned as a mask


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself before it is decoded."""

    size: Size  # as shown
    mode: str  # Pillow's name of the pixel format in the file
    format: str  # Pillow's name of the file format
    orientation: int  # EXIF, 1..8
    profile: int = KEPT  # what its colour profile does: one of those of `colour`


def header(data: bytes, rules: PixelRules) -> Header:
    """Size, mode, format and orientation without decoding; BadImage for all that can be told from them."""
    return _open(data, rules)[1]


def decode(
    data: bytes, rules: PixelRules, wanted: Size | None = None, colours: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """The picture as a viewer shows it, RGB on the background; with `alpha_mask` its opacity (mode L), if it has any.

    A JPEG is decoded in a half, quarter or eighth of its size where that leaves at least twice the `wanted` (width,
    height). Without `colours` a profile changes nothing. Raises BadImage for what cannot be decoded to its end.
    """
    image, found = _open(data, rules)
    with _decoding(image.size):
        if wanted is not None:
            width, height = reversed(wanted) if found.orientation in _ON_ITS_SIDE else wanted
            image.draft(None, (2 * width, 2 * height))
        image.load()
        # Pillow has turned a TIFF already
        turn = None if image.format == "TIFF" else _UPRIGHT.get(found.orientation)
        picture, alpha = _flatten(image, rules.background, found.profile if colours else KEPT)
        if turn is not None:
            picture, alpha = picture.transpose(turn), alpha and alpha.transpose(turn)
    picture.info = {}  # it is upright, and sRGB: nobody may turn it again
    return picture, alpha if rules.alpha_mask else None


def decode_mask(data: bytes, wanted: Size | None = None) -> Image.Image:
    """A mask image as shown, mode L: white where to look. Its transparent pixels count as black.

    Its numbers are no colours: a profile changes nothing.
    """
    rules = PixelRules(background=(0, 0, 0), animated="never", alpha_mask=False)
    return decode(data, rules, wanted, colours=False)[0].convert("L")


def as_shown(image: Image.Image, background: tuple[int, int, int] = WHITE, colours: bool = True) -> Image.Image:
    """RGB as a viewer shows it, of an image that is open already or made by a program; such a one is itself.

    With `colours` its profile counts. Raises BadImage for what cannot be decoded, or has no look.
    """
    with _decoding(image.size):
        image.load()
        turn = _UPRIGHT.get(_orientation(image))  # of a TIFF there is none left by now
        picture = _flatten(image, background, use_of(image) if colours else KEPT)[0]
        picture = picture if turn is None else picture.transpose(turn)
    if picture is not image:
        picture.info = {}
    return picture


def mask_as_shown(image: Image.Image) -> Image.Image:
    """`as_shown` of a mask: mode L, transparent pixels black."""
    return as_shown(image, (0, 0, 0), colours=False).convert("L")


def _open(data: bytes, rules: PixelRules) -> tuple[ImageFile, Header]:
    """The file with nothing decoded yet; BadImage for what its header tells."""
    if not data:
        raise BadImage("the file is empty; replace it")
    image = _identify(data)
    width, height = size = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are too many, at most {MAX_PIXELS:,} are read; scale it down", size)
    if min(size) < MIN_SIDE:
        raise BadImage(f"{width} x {height} pixels is too small, at least {MIN_SIDE} are needed each way", size)
    with _decoding(size):
        if rules.animated != "first" and image.format != "MPO" and getattr(image, "is_animated", False):
            what = "has several pages" if image.format == "TIFF" else "is an animation"
            way = ", or take the first by `animated: first`" if rules.animated == "error" else ""
            raise BadImage(f"{what}; save the one you mean as an image{way}", size)
        if image.mode not in _MODES:
            raise BadImage(f"has pixels of mode {image.mode}, which are not read; save it as RGB", size)
        orientation, profile = _orientation(image, data), use_of(image)
    if orientation in _ON_ITS_SIDE and image.format != "TIFF":  # Pillow gives the size of a TIFF as shown
        size = (height, width)
    return image, Header(size, image.mode, image.format or "", orientation, profile)


def _identify(data: bytes) -> ImageFile:
    """Pillow's reader for these bytes. Unlike `Image.open` it neither warns nor refuses by size: that is done here."""
    for factory, accepts in _readers():
        if accepts(data[:16]):
            with _decoding():
                return factory(BytesIO(_without_text(data) if factory is PngImagePlugin.PngImageFile else data), "")
    if data[4:12] in _HEIF:  # also under the name of a JPEG, as phones and messengers leave it
        raise BadImage(f"is a photo in HEIC, which is not read here; {INSTALL_HEIF}")
    start = data[:1024].removeprefix(b"\xef\xbb\xbf")
    if re.search(rb"<(!doctype\s+html|html|head|body)\b", start, re.IGNORECASE):
        raise BadImage("is HTML, not an image: a web page was saved under this name; fetch the image again")
    if _is_text(start):
        words = " ".join(start.decode(errors="ignore").split())[:40]
        raise BadImage(f'is text, not an image (it begins with "{words}"); replace it')
    raise BadImage(f"is not an image that can be read ({' '.join(FORMATS)}); save it as PNG")


@cache
def _readers() -> list:
    """Of each format: what opens a file, and what knows one by its first 16 bytes."""
    Image.init()
    if HAS_HEIF:
        import pillow_heif  # type: ignore[import-not-found] # an extra

        pillow_heif.register_heif_opener()
    return [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]


def _is_text(start: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8; the last character may be cut."""
    text = start.decode(errors="replace").rstrip("�")
    return all(character.isprintable() or character.isspace() for character in text) and "�" not in text


@contextmanager
def _decoding(size: Size = (0, 0)) -> Iterator[None]:
    """Whatever a damaged file makes Pillow raise becomes a BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, KeyError, zlib.error, …: each plugin its own
        raise BadImage(f"cannot be decoded ({_first_line(error)}); replace it", size) from error


def _orientation(image: Image.Image, data: bytes = b"") -> int:
    """EXIF orientation in 1..8; 1 where there is none, or none that makes sense."""
    # without EXIF before the pixels of a PNG, Pillow's method for it decodes them to look behind
    look_behind = image.format != "PNG" or _has_exif_behind_pixels(data)
    try:
        exif = image.getexif() if look_behind else Image.Image.getexif(image)
        value = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers show a photo whose EXIF is damaged; if its pixels are, decoding says so
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_exif_behind_pixels(png: bytes) -> bool:
    pixels = False
    for kind, start, _ in _chunks(png):
        pixels = pixels or kind == b"IDAT"
        if pixels and (kind == b"eXIf" or png.startswith(_PNG_TEXT_WITH_EXIF, start + 8)):
            return True
    return False


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk of a PNG: length, kind, content, checksum. The last may be cut."""
    place = 8
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        yield kind, place, place + length + 12
        place += length + 12


def _without_text(png: bytes) -> bytes:
    """The file without what is written in it for people and programs, which has no end: Pillow unpacks all of it.

    What tells of its look stays, as long as it is not far too long: a profile, and EXIF.
    """
    kept: list[bytes] = []
    behind, texts = 0, 0
    for kind, start, end in _chunks(png):
        if kind in _PNG_TEXT:
            with_exif = png.startswith(_PNG_TEXT_WITH_EXIF, start + 8)
            texts += with_exif
            if with_exif and texts <= _PNG_TEXTS_KEPT and _is_short(kind, png[start + 8 : end - 4]):
                continue
            new = b""
        elif kind == b"iCCP" and not _is_short(kind, png[start + 8 : end - 4]):
            new = _chunk(kind, b"too long\0\0")  # which Pillow takes for a profile that cannot be unpacked
        else:
            continue
        kept += [png[behind:start], new]
        behind = end
    return png if not behind else b"".join([*kept, png[behind:]])


def _is_short(kind: bytes, content: bytes) -> bool:
    """Whether a chunk is no longer than what is read, also when it is unpacked."""
    if len(content) > _LONGEST_TEXT:
        return False
    rest = content.partition(b"\0")[2]
    if kind == b"iTXt":
        packed = rest[2:].split(b"\0", 2)[-1] if rest.startswith(b"\1") else b""  # flag, method, two languages
    else:
        packed = b"" if kind == b"tEXt" else rest[1:]  # method
    try:
        return len(zlib.decompressobj().decompress(packed, _LONGEST_TEXT + 1)) <= _LONGEST_TEXT
    except zlib.error:
        return True


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def _flatten(
    image: Image.Image, background: tuple[int, int, int], profile: int
) -> tuple[Image.Image, Image.Image | None]:
    """RGB on the background, and opacity (mode L) of an image that may have transparent pixels."""
    icc = image.info["icc_profile"] if profile == CONVERTED else None
    if image.mode in _DEEP:
        image = _to_8_bits(image)
    if not image.has_transparency_data:
        picture = image if image.mode == "RGB" else image.convert("RGB")
        return picture if icc is None else to_srgb(picture, icc), None
    layer = image.convert("RGBA")
    colours = layer if icc is None else to_srgb(layer.convert("RGB"), icc)
    picture = Image.new("RGB", image.size, background)
    picture.paste(colours, mask=layer)  # colours under transparent pixels do not show, nor bleed when scaled
    return picture, layer.getchannel("A")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by 1/257 and of floats in [0, 1] by 255, to the nearest; Pillow clips the one, and blackens
    the other. BadImage for other values, as they have no range."""
    values = np.asarray(image)
    bits = getattr(image, "tag_v2", {}).get(_BITS, (16,))[0]  # of a TIFF
    if image.mode.startswith("I;16") and bits < 16:
        values = (values.astype(np.uint32) * 65_535 // (2**bits - 1)).astype(np.uint16)  # scanners write 12 bits
    low, high = values.min(), values.max()
    limit = 1 if image.mode == "F" else 65_535
    if not (low >= 0 and high <= limit):  # also for NaN
        kind = "float" if image.mode == "F" else "32-bit"
        raise BadImage(
            f"has {kind} pixels from {low:g} to {high:g}, only 0 to {limit} has a meaning; save it with 8 or 16 bits"
        )
    gray = Image.fromarray(np.rint(values * 255).astype(np.uint8) if limit == 1 else _TO_8_BITS[values])
    key = image.info.get("transparency")
    if key is not None:
        gray.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return gray


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
