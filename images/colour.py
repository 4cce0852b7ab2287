"""Colour profiles: the pixels of an image with an ICC profile as sRGB has them, which is what bases were trained in.

Conversion is relative colorimetric with black point compensation, in 8 bits, by LittleCMS. A profile that is sRGB, or
one of its close copies, changes no bit; so does one that cannot be used, which `use_of` tells apart.
"""

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

KEPT, CONVERTED, UNUSABLE = range(3)
"""What becomes of an image by its profile: nothing, as it has none or is sRGB; sRGB pixels; nothing, with a warning."""

COLOURED = frozenset({"RGB", "RGBA", "P", "PA", "YCbCr"})
"""Pillow's pixel formats whose pixels a profile of RGB can speak of."""
_SAME = 2  # of 255: copies of sRGB differ so much by their own rounding
_CALLED_SRGB = 12  # and older ones, which say that they are sRGB, by this
_GRID = 17  # colours each way by which profiles are compared


def use_of(image: Image.Image) -> int:
    """One of KEPT, CONVERTED, UNUSABLE for an image that is opened; its pixels need not be decoded.

    CMYK is converted without any profile, of which the scan warns anyway.
    """
    if "icc_profile" not in image.info or image.mode == "CMYK":
        return KEPT
    profile = image.info["icc_profile"]
    if not profile:  # Pillow could not unpack it
        return UNUSABLE
    found, _ = _conversion(bytes(profile))
    return UNUSABLE if found == CONVERTED and image.mode not in COLOURED else found


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """An RGB picture whose numbers are those of a profile that is CONVERTED."""
    return ImageCms.applyTransform(picture, _conversion(profile)[1])  # type: ignore[return-value] # not in place


@lru_cache(16)
def _conversion(profile: bytes) -> tuple[int, Any]:
    """What becomes of images with a profile, and the transform if there is one; usable in several threads at once."""
    if not features.check("littlecms2"):
        return UNUSABLE, None
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        header: Any = given.profile
        if header.xcolor_space.strip() != "RGB":
            return UNUSABLE, None
        transform = ImageCms.buildTransform(
            given,
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # no cache, which threads would share
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
        )
        called = "sRGB" in (header.profile_description or "")
        off = _largest_change(transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return UNUSABLE, None
    return (KEPT, None) if off <= (_CALLED_SRGB if called else _SAME) else (CONVERTED, transform)


def _largest_change(transform: Any) -> int:
    """Of a grid of colours and all greys, in levels of 255."""
    steps = np.linspace(0, 255, _GRID).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    before = np.concatenate([grid, greys])
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(before[None]), transform))[0]
    return int(np.abs(after.astype(int) - before).max())
