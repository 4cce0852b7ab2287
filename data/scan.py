"""The look at every file before any model is loaded: all problems at once. Imports no torch."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..configs.schema import FolderSource, Source

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B"})
MIN_SIDE = 16  # pixels
MAX_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class ScannedFolder:
    """What the scan found in one folder."""

    images: list[Path]
    problems: list[str]


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and the folders in it, sorted; hidden files (`.x.png`, `._x.png`) are no images."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def scan_folder(folder: Path) -> ScannedFolder:
    """Decodes every image once."""
    if not folder.is_dir():
        return ScannedFolder([], [f"{folder}: there is no such folder of images"])
    files = image_files(folder)
    if not files:
        kinds = " ".join(sorted(SUFFIXES))
        return ScannedFolder([], [f"{folder}: holds no images (looked for {kinds}, also in the folders in it)"])
    return ScannedFolder(files, [problem for file in files if (problem := scan_image(file))])


def scan_image(file: Path) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        if file.stat().st_size == 0:
            return f"{file}: the file is empty"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below
            with Image.open(file) as image:
                if problem := _check_header(image):
                    return f"{file}: {problem}"
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{file}: cannot be decoded ({_first_line(error)})"
    return None


def _check_header(image: Image.Image) -> str | None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        return f"{width} x {height} pixels is too small, at least {MIN_SIDE} are needed each way"
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels is too large, at most {MAX_PIXELS:,} pixels are read"
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photo with its preview beside it
        return "an animation or a file of several pages; save the frame you mean as an image of its own"
    if image.mode == "F":
        return "32-bit float pixels have no defined range; save it with 8 or 16 bits"
    if image.mode not in MODES:
        return f"pixels of mode {image.mode} are not read; save it as RGB"
    return None


def scan_sources(sources: Iterable[Source]) -> list[str]:
    """All problems of all folder sources."""
    folders = (Path(source.path) for source in sources if isinstance(source, FolderSource))
    return [problem for folder in folders for problem in scan_folder(folder).problems]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
