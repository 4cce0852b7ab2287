"""Pictures as files: PNGs that say how they were made, and many pictures as one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...configs.bounded import parse_json
from ...configs.errors import UserError
from ...configs.headers import png_text
from ...configs.ownership import writing

REQUEST = "loraloom"
"""The text field of a PNG that holds the whole request as JSON."""
SHEET = "loraloom.grid"
"""The text field of a picture of many, with the verb that made it."""


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`; what is left of the last row is white."""
    from diffusers.utils import make_image_grid  # brings torch

    rows = -(-len(images) // columns)
    blank = Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows=rows, cols=columns)


def png_info(**facts: Any) -> PngInfo:
    """PNG text fields, one for each fact that is not None; a mapping as JSON."""
    info = PngInfo()
    for key, value in facts.items():
        if value is not None:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
            info.add_itxt(key, text)
    return info


def save_png(
    image: Image.Image,
    file: Path,
    owner: Path | None = None,
    by: str = "",
    over: bool = False,
    marks: Mapping[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Writes the picture with its facts, whole or not at all; `owner`, `by`, `over` as for `ownership.writing`.

    `marks` are facts with names of ours: `REQUEST`, `SHEET`.
    """
    facts = {**(marks or {}), **facts}
    with writing(file, owner, by, over) as new:
        image.save(new, format="PNG", pnginfo=png_info(**facts))


def request_in(file: Path) -> dict[str, Any]:
    """The request that a picture of ours was made from. UserError where it holds none."""
    text = png_text(file, REQUEST)
    if text is None:
        raise UserError(f"{file}: does not say how it was made; pictures of `loraloom sample` do, as PNG")
    found = parse_json(text, f"{file}: what it says of its making")
    if not isinstance(found, dict):
        raise UserError(f"{file}: what it says of its making is no request")
    return found
