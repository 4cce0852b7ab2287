"""Many pictures on one: tiles in rows, each with a line or two below it. No file is read or written here."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ...images.lettering import Lettering

SIDE = 240  # pixels, the longest side of a picture on the sheet
GAP, MARGIN, TITLE = 20, 28, 64
COLUMNS = 6
NARROWEST = 190  # pixels that words have below a picture
PAGE, TEXT, SOFT = "#f5f6f8", "#17191e", "#626a76"


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture with its words; without a picture an empty frame."""

    picture: Image.Image | None  # RGB
    lines: Sequence[str]  # two at most; what is too long is cut at its begin


def contact_sheet(title: str, tiles: Sequence[Tile], size: tuple[int, int]) -> Image.Image:
    """All tiles, whose pictures have this (width, height), below a title."""
    width, height = shown_size(size)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    font, small = Lettering(22), Lettering(13)
    across, down = max(width, NARROWEST) + GAP, height + 2 * 18 + GAP
    room = max(2 * MARGIN + columns * across - GAP, 2 * MARGIN + round(font.width(title)))
    sheet = Image.new("RGB", (room, 2 * MARGIN + TITLE + rows * down - GAP), PAGE)
    draw = ImageDraw.Draw(sheet)
    font.write(draw, (MARGIN, MARGIN), title, TEXT)
    for number, tile in enumerate(tiles):
        left, top = MARGIN + number % columns * across, MARGIN + TITLE + number // columns * down
        if tile.picture is None:
            draw.rectangle((left, top, left + width - 1, top + height - 1), outline=SOFT)
        else:
            sheet.paste(scaled(tile.picture, (width, height)), (left, top))
        for line, (text, colour) in enumerate(zip(tile.lines, (TEXT, SOFT), strict=False)):
            small.write(draw, (left, top + height + 4 + 16 * line), _fitting(text, small, across - GAP), colour)
    return sheet


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """How large a picture of this size is on a sheet: SIDE at most; a tiny one is enlarged by a whole factor."""
    if max(size) <= SIDE:
        factor = SIDE // max(size)
        return size[0] * factor, size[1] * factor
    return round(size[0] * SIDE / max(size)), round(size[1] * SIDE / max(size))


def scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at another size; pixels of an enlarged one stay squares, so that each can be seen."""
    enlarged = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _fitting(text: str, font: Lettering, width: int) -> str:
    """The end of the text that is no wider than this: paths differ at their end."""
    if font.width(text) <= width:
        return text
    while text and font.width(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"
