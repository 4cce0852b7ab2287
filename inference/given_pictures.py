"""Pictures that sampling begins with or follows, through the decoder of training: files, and what Python code gives."""

from PIL import Image

from ..configs.bounded import PICTURE, read_bytes
from ..configs.errors import UserError
from ..images.decoding import WHITE, BadImage, PixelRules, Size, as_shown, decode, decode_mask, mask_as_shown

RULES = PixelRules(background=WHITE, animated="first", alpha_mask=False)
_HALF = 128  # of 255: from here on a pixel of a mask may change
_ROUNDED = 1.5  # pixels that proportions may be off, as sides are whole numbers


def read_picture(name: str) -> Image.Image:
    """RGB of an image file, as it is shown. UserError for what cannot be used."""
    try:
        return decode(_content(name), RULES)[0]
    except BadImage as error:
        raise UserError(f"{name}: {error}") from error


def read_mask(name: str) -> Image.Image:
    """Mode L of a mask file, white where a picture may change; transparent pixels are black."""
    try:
        return decode_mask(_content(name))
    except BadImage as error:
        raise UserError(f"{name}: {error}") from error


def shown_picture(image: Image.Image) -> Image.Image:
    """RGB of a picture of Python code, as its file would be shown. UserError for what has no look."""
    try:
        return as_shown(image)
    except BadImage as error:
        raise UserError(f"a picture {error}") from error


def shown_mask(mask: Image.Image, size: Size) -> Image.Image:
    """Mode L of a mask of a picture of this (width, height). UserError where nothing, or not this one, can be meant."""
    try:
        shown = mask_as_shown(mask)
    except BadImage as error:
        raise UserError(f"a mask {error}") from error
    (width, height), (wide, high) = size, shown.size
    if abs(width * high - height * wide) > _ROUNDED * max(width, height, wide, high):
        raise UserError(
            f"the mask has {wide} x {high} pixels, the picture {width} x {height}: other proportions; "
            "make the mask from the picture, at its size"
        )
    if int(shown.getextrema()[1]) < _HALF:  # type: ignore[arg-type] # one channel
        raise UserError(
            "the mask is black, or transparent, everywhere, so nothing would change: paint white what may change"
        )
    return shown


def _content(name: str) -> bytes:
    return read_bytes(name, PICTURE)  # of a regular file: a pipe or a device would never end
