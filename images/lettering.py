"""Letters on pictures: of Pillow's own font where it has them, of a font of the system where that one has them, and
escapes such as `\\u72ac` for the rest, never empty boxes.
"""

import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from unicodedata import normalize

from PIL import Image, ImageDraw, ImageFont

_NOBODY = "\U0010ffff"  # is no character, so every font draws the box of one that it has not
_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/System/Library/Fonts/Supplemental", "/Library/Fonts", "~/Library/Fonts"),
    os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"),
)
_FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf"),
    *("Arial Unicode.ttf", "segoeui.ttf", "arial.ttf", "Arial.ttf", "Helvetica.ttc"),  # Latin, Greek, Cyrillic
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.ttf", "NotoSansJP-Regular.ttf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "unifont.ttf"),
    *("Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
)
"""Fonts of the usual systems, those with the most letters first. None has to be there."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Lettering:
    """Text of one size. Its own font is Pillow's, so that plain letters look the same everywhere."""

    def __init__(self, size: int):
        self.own, self.size = _own(size), size

    def width(self, text: str) -> float:
        """Pixels that a line takes."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str) -> None:
        """A line with its upper left corner there."""
        if text.isascii():
            draw.text(place, text, colour, self.own)
            return
        left, base = float(place[0]), place[1] + _ascent(self.own)
        for font, run in self._runs(text):
            draw.text((left, base), run, colour, font, anchor="ls")
            left += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[Font, str]]:
        """The text in pieces that one font has."""
        if text.isascii():
            yield self.own, text
            return
        font, run = self.own, ""
        for letter in normalize("NFC", text):
            other = _font_of(letter, self.size)
            drawn = _escaped(letter) if other is None else letter
            if (other or self.own) is not font:
                if run:
                    yield font, run
                font, run = other or self.own, ""
            run += drawn
        if run:
            yield font, run


def _ascent(font: Font) -> int:
    return font.getmetrics()[0] if isinstance(font, ImageFont.FreeTypeFont) else 0


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()


@lru_cache(4096)
def _font_of(letter: str, size: int) -> Font | None:
    """The first font that has a letter; None where there is none."""
    own = _own(size)
    if letter.isascii() or _has(own, letter):
        return own
    return next((font for file in font_files() if (font := _loaded(file, size)) and _has(font, letter)), None)


@lru_cache(32)
def _own(size: int) -> Font:
    return ImageFont.load_default(size)


def _has(font: Font, letter: str) -> bool:
    """Whether it is something else than the box of a letter that the font has not."""
    return letter.isspace() or _drawn(font, letter) != _box(font)


@lru_cache(256)
def _box(font: Font) -> bytes:
    return _drawn(font, _NOBODY)


def _drawn(font: Font, letter: str) -> bytes:
    page = Image.new("L", (64, 64))
    ImageDraw.Draw(page).text((8, 8), letter, 255, font)
    return page.tobytes()


@lru_cache(64)
def _loaded(file: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(file, size)
    except (OSError, ValueError):
        return None


@lru_cache(1)
def font_files() -> tuple[str, ...]:
    """Those of the known fonts that are on this machine."""
    places: dict[str, str] = {}
    for folder in map(os.path.expanduser, _FOLDERS):
        if sys.platform != "win32" and ":" in folder:
            continue
        for place, _, names in os.walk(folder):
            for name in names:
                places.setdefault(name, os.path.join(place, name))
    return tuple(places[name] for name in _FILES if name in places)
