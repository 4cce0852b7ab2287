"""Images that a Python program hands over, as a list or as a dataset: they are read as any others, by content."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...configs.choices import did_you_mean
from ...configs.data_sections import GivenSource
from ...configs.errors import UserError
from ..source import Given, read_picture
from .dataset import DatasetImages, images_of_rows

if TYPE_CHECKING:
    from datasets import Dataset

_FORMS = "a datasets.Dataset, or a list of images, of (image, caption) or of (image, [captions])"


def open_given(section: GivenSource, given: Given) -> DatasetImages:
    """What was handed over under the name of the section.

    UserError where nothing was, which is so for every command, or something else than images.
    """
    name = section.given
    if name not in given:
        there = f"; there are: {', '.join(map(repr, given))}" if given else ""
        raise UserError(
            f"given: {name!r}: a Python program has to hand these images over{did_you_mean(name, given)}{there}: "
            f"`loraloom.build_trainer(config, given={{{name!r}: images}})`"
        )
    images = given[name]
    rows = images if hasattr(images, "column_names") else _rows(section, images)
    if not len(rows):
        raise UserError(f"given: {name!r}: holds no images")
    return images_of_rows(section, rows, name, name)


def _rows(section: GivenSource, images: Any) -> "Dataset":
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Sequence):
        raise UserError(f"given: {section.given!r}: should be {_FORMS}, found {type(images).__name__}")
    contents, captions = [], []
    for number, entry in enumerate(images):
        image, words = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        contents.append({"bytes": _encoded(f"{section.given}[{number}]", image), "path": None})
        captions.append([words] if isinstance(words, str) else words)
    values = {section.image_column: contents, section.caption_column: captions}
    columns = {section.image_column: ImageFeature(), section.caption_column: List(Value("string"))}
    try:
        return Dataset.from_dict(values, features=Features(columns))
    except (TypeError, ValueError) as error:
        raise UserError(f"given: {section.given!r}: a caption is no text ({error}); give {_FORMS}") from error


def _encoded(where: str, image: Any) -> bytes:
    """The bytes of a file; of a picture in memory a PNG, with its colour profile and without loss."""
    if isinstance(image, str | Path):
        try:
            return read_picture(Path(image))
        except OSError as error:
            raise UserError(f"{image}: cannot be read ({error.strerror or error})") from error
    if not isinstance(image, Image.Image):
        raise UserError(f"{where}: should be a PIL image or the path of one, found {type(image).__name__}")
    content = io.BytesIO()
    try:
        image.save(content, "PNG", compress_level=1)
    except OSError as error:
        raise UserError(f"{where}: a picture of mode {image.mode} has no PNG; give image.convert('RGB')") from error
    return content.getvalue()
