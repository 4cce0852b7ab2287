"""What lies in a folder: images, and the caption files and masks that belong to them. Looks into no file."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..images.endings import SUFFIXES
from .metadata import NAMES
from .source import MASKS, is_utf8, shown

pc: Any = pyarrow.compute  # its functions are made when it is imported: a type checker sees none

CAPTION_FILES = (".txt", ".caption")
BESIDE = {ending: 1 << bit for bit, ending in enumerate((*CAPTION_FILES, *MASKS))}
"""What stands after an image's stem in the names of the files that belong to it, and its bit in `Listing.beside`."""
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
BATCH = 8192  # names that are Python objects at the same time


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a folder and the folders in it, without hidden files."""

    images: pa.ChunkedArray  # (N,) strings: paths from the folder with "/", sorted
    beside: np.ndarray  # (N,) uint8: which of `BESIDE` each image has
    refused: dict[str, str]  # path to "why; what to do"; that of a folder ends with "/"
    counts: dict[str, int]  # files that are nothing to us


def list_folder(root: Path) -> Listing:
    """Everything in a folder."""
    paths, bits, chunks = [], bytearray(), [pa.array([], pa.string())]
    refused: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for folder, images, others in walk(root, refused):
        paths += [folder + name for name in images]
        bits += bytes(_bits_beside(name, others) for name in images)
        counts.update(_left_over(folder, images, others))
        if len(paths) >= BATCH:
            chunks.append(pa.array(paths, pa.string()))
            paths = []
    images = pa.chunked_array([*chunks, pa.array(paths, pa.string())])
    order = pc.sort_indices(images)
    return Listing(images.take(order), np.frombuffer(bytes(bits), np.uint8)[order.to_numpy()], refused, dict(counts))


def walk(root: Path, refused: dict[str, str]) -> Iterator[tuple[str, list[str], set[str]]]:
    """Of each folder its path from the root, its images, and its other files; links to folders are not followed.

    Files and folders that may not be used are put into `refused`, as in `Listing`.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        inner, names = _entries(root, folder, refused)
        folders += inner
        images = [name for name in names if _is_image(name)]
        yield folder, images, names.difference(images)


def _entries(root: Path, folder: str, refused: dict[str, str]) -> tuple[list[str], set[str]]:
    """Folders in a folder, as paths from the root that end with "/", and names of the files in it."""
    folders: list[str] = []
    names: set[str] = set()
    try:
        entries = os.scandir(root / folder)
    except OSError as error:
        refused[folder] = f"cannot be listed ({error.strerror}); change its permissions or move it away"
        return folders, names
    with entries:
        for entry in entries:
            name, is_link = entry.name, entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if name.startswith(".") or not (is_folder or is_link or entry.is_file()):
                continue
            path = folder + name + "/" * is_folder
            if reason := _why_refused(root, path, is_link):
                if is_folder or _is_image(name) or name.endswith(tuple(BESIDE)):
                    refused[shown(path)] = reason
            elif not is_folder:
                names.add(name)
            elif not is_link:  # what a link leads to within the root is found where it really is
                folders.append(path)
    return folders, names


def _why_refused(root: Path, path: str, is_link: bool) -> str | None:
    if not is_utf8(path):
        return "its name is not UTF-8; rename it"
    if not is_link:
        return None
    target = os.path.realpath(root / path)
    if not Path(target).is_relative_to(root.resolve()):
        return f"is a link that leads out of the folder, to {target}; copy what you need into the folder"
    if not os.path.isfile(target) and not os.path.isdir(target):
        return f"is a link to {target}, which is no file; delete it or correct it"
    return None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.lower().endswith(MASKS)


def _bits_beside(image: str, others: set[str]) -> int:
    stem = os.path.splitext(image)[0]
    return sum(bit for ending, bit in BESIDE.items() if stem + ending in others)


def _left_over(folder: str, images: list[str], others: set[str]) -> Counter[str]:
    """What the files of a folder are that are no images, for people; nothing is said of those that do their part."""
    stems = {os.path.splitext(image)[0] for image in images}
    counts: Counter[str] = Counter()
    for name in others:
        ending = next((ending for ending in BESIDE if name.endswith(ending)), None)
        if ending is None and name.lower() not in SYSTEM_FILES and folder + name not in NAMES:
            suffix = os.path.splitext(name)[1].lower()
            counts[f"ignored {suffix} files" if suffix else "ignored files without an ending"] += 1
        elif ending and name.removesuffix(ending) not in stems:
            counts["masks without an image" if ending in MASKS else "caption files without an image"] += 1
    return counts


def mask_file(image: Path) -> Path | None:
    """The mask beside an image."""
    files = (image.with_name(image.stem + ending) for ending in MASKS)
    return next((file for file in files if file.is_file()), None)
