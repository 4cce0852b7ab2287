"""Cuts of pictures and their tensors: where an image goes in its bucket. No paths, no random numbers; torch only for
the tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

from ..images.decoding import Size

if TYPE_CHECKING:
    from torch import Tensor

_REDUCING_GAP = 3.0  # a cheap box filter down to three times the size, Lanczos from there


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image came to its bucket: scaled, cut out, then mirrored. All sizes are (width, height).

    SDXL's time ids are `original`, `corner_as_seen` and `target`, each with its height or top first.
    """

    original: Size  # of the image as shown
    scaled: Size  # covers the target
    corner: tuple[int, int]  # left and top of the cut in pixels of the scaled, unmirrored image
    target: Size  # of the cut
    flip: bool  # mirrored left to right

    @property
    def corner_as_seen(self) -> tuple[int, int]:
        """Left and top of the cut in pixels of the scaled image, which was mirrored before if `flip` says so."""
        left, top = self.corner
        return (self.scaled[0] - self.target[0] - left if self.flip else left), top


def place(size: Size, bucket: Size, at: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Geometry:
    """The cut of an image of this size for a bucket, `at` parts of the way from left to right and top to bottom.

    The aspect is kept: one side is scaled to exactly the bucket's, the other to the nearest whole pixel (halves up)
    at or above the bucket's. The corner is the nearest whole pixel to `at` times what is left over (halves to even).
    """
    (width, height), (wide, high) = size, bucket
    if width * high >= wide * height:
        scaled = ((2 * width * high + height) // (2 * height), high)
    else:
        scaled = (wide, (2 * height * wide + width) // (2 * width))
    corner = (round(at[0] * (scaled[0] - wide)), round(at[1] * (scaled[1] - high)))
    return Geometry(size, scaled, corner, bucket, flip)


def crop(image: Image.Image, geometry: Geometry) -> Image.Image:
    """The cut of exactly `geometry.target` pixels; the image may have been decoded in a part of its size.

    As scaling the whole image and cutting it then, but only what is needed is scaled.
    """
    shrunk = round(geometry.original[0] / image.width)  # by the JPEG decoder, which rounds sizes up
    sides = zip(geometry.original, geometry.scaled, geometry.corner, geometry.target, image.size, strict=True)
    (left, right), (top, bottom) = (
        (corner * original / scaled / shrunk, min((corner + target) * original / scaled / shrunk, limit))
        for original, scaled, corner, target, limit in sides
    )
    cut = image.resize(geometry.target, Resampling.LANCZOS, (left, top, right, bottom), _REDUCING_GAP)
    return cut.transpose(Transpose.FLIP_LEFT_RIGHT) if geometry.flip else cut


def to_tensor(image: Image.Image) -> "Tensor":
    """(3, H, W) in [-1, 1] of an RGB image."""
    import torch

    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def mask_to_tensor(mask: Image.Image) -> "Tensor":
    """(1, H, W) in [0, 1] of an image of mode L."""
    import torch

    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255.0)[None]
