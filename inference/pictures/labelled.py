"""Pictures in rows and columns with words beside them, as one picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ...images.lettering import Lettering

GAP, MARGIN, LINE = 4, 14, 18  # pixels
SMALLEST = 96  # pixels; smaller pictures are enlarged by a whole factor
WIDEST_LABEL = 220
PAGE, TEXT, SOFT = "white", "#17191e", "#626a76"


def labelled(
    images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str], title: str = "", note: str = ""
) -> Image.Image:
    """Images row by row, of any sizes; `columns` and `rows` are their words, wrapped to the room that they have."""
    font, head = Lettering(13), Lettering(17)
    enlarged = [_enlarged(image) for image in images]
    width, height = max(image.width for image in enlarged), max(image.height for image in enlarged)
    above = [wrapped(label, font, width) for label in columns]
    beside = [wrapped(label, font, WIDEST_LABEL) for label in rows]
    left = MARGIN + max((round(font.width(line)) + 10 for label in beside for line in label), default=0)
    top = MARGIN + (30 if title else 0) + LINE * max(map(len, above)) + 4
    across = left + len(columns) * (width + GAP) + MARGIN
    across = max(across, MARGIN * 2 + round(head.width(title)))
    notes = wrapped(note, font, across - 2 * MARGIN)
    page = Image.new("RGB", (across, top + len(rows) * (height + GAP) + LINE * len(notes) + MARGIN), PAGE)
    draw = ImageDraw.Draw(page)
    head.write(draw, (MARGIN, MARGIN), title, TEXT)
    for number, label in enumerate(above):
        _write(draw, (left + number * (width + GAP), top - 4 - LINE * len(label)), label, TEXT, font)
    for number, label in enumerate(beside):
        middle = top + number * (height + GAP) + (height - LINE * len(label)) // 2
        _write(draw, (MARGIN, middle), label, TEXT, font)
    for number, image in enumerate(enlarged):
        row, column = divmod(number, len(columns))
        page.paste(image, (left + column * (width + GAP), top + row * (height + GAP)))
    _write(draw, (MARGIN, page.height - MARGIN // 2 - LINE * len(notes)), notes, SOFT, font)
    return page


def wrapped(text: str, font: Lettering, width: int) -> list[str]:
    """Lines of whole words. One that is too long is cut at its begin; of letters beyond ASCII it goes on below."""
    found: list[str] = []
    for word in text.split():
        if found and font.width(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
            continue
        while not word.isascii() and font.width(word) > width and (fitting := _fitting(word, font, width)) < len(word):
            found.append(word[:fitting])
            word = word[fitting:]
        while len(word) > 1 and font.width(word) > width:
            word = f"…{word.lstrip('…')[1:]}"
        found.append(word)
    return found


def _fitting(word: str, font: Lettering, width: int) -> int:
    """How many letters of a word fit; one at least."""
    return next((count for count in range(1, len(word)) if font.width(word[: count + 1]) > width), len(word))


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-SMALLEST // max(image.size))
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: Sequence[str],
    colour: str,
    font: Lettering,
) -> None:
    for number, line in enumerate(text):
        font.write(draw, (place[0], place[1] + LINE * number), line, colour)
