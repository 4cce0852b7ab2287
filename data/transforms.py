"""Pixels from a file: PIL, numpy and torch only."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..configs.errors import TrainingError

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels


def read_rgb(file: Path) -> Image.Image:
    """The picture as a viewer shows it: EXIF orientation applied, transparency on white, 16 bits scaled to 8."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values to white
        return Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover width x height, then cropped in the middle."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def load_pixels(file: Path, resolution: int) -> Tensor:
    """(3, resolution, resolution) in [-1, 1]; TrainingError with the path if it is no longer what was scanned."""
    try:
        return to_tensor(cover(read_rgb(file), resolution, resolution))
    except (OSError, SyntaxError, ValueError) as error:
        raise TrainingError(f"{file}: can no longer be read ({error}); it was sound when the run started") from error
