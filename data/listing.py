"""What lies in a folder: images, the caption files and masks that belong to them, and what is left over.

Looks into no file. Endings are told without regard to case, names compared as Unicode means them (NFC): macOS and zip
archives write one name in two ways. A file that belongs to no image by its letters belongs to the one whose name
differs in case alone, as cameras and Windows leave them.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..configs.words import agreeing
from ..images.endings import HEIF, INSTALL_HEIF, SUFFIXES
from .metadata import NAMES
from .source import MASKS, is_utf8, named, shown

pc: Any = pyarrow.compute  # its functions are made when it is imported: a type checker sees none

CAPTION_FILES = (".txt", ".caption")
BESIDE = {ending: 1 << bit for bit, ending in enumerate((*CAPTION_FILES, *MASKS))}
"""What stands after an image's stem, or its whole name, in the names of the files that belong to it, and its bit in
`Listing.beside`."""
MASK_BITS = frozenset(BESIDE[ending] for ending in MASKS)
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@recently-snapshot"),  # of network disks
        *("$recycle.bin", "recycler", "system volume information"),  # of Windows
        *("__macosx", "lost+found"),
    }
)
"""Thumbnails, deleted files and copies that nobody meant, in small letters. Hidden folders are none of them."""
UNSURPRISING = frozenset(
    {
        *(".md", ".log", ".html", ".pdf", ".npz", ".npy", ".pt", ".ckpt", ".safetensors", ".zip", ".db", ".lock"),
        *(".py", ".sh", ".bat", ".ps1", ".yaml", ".yml", ".toml", ".ini"),
    }
)
"""Endings of files of which nobody thinks that they are trained."""
LISTS = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
"""Endings of files that may say something of all images."""
BATCH = 8192  # names that are Python objects at the same time
_REPEATS = re.compile(r"(?:^|/)(?P<repeats>\d+)_[^/]*/")  # a folder as kohya's trainers read it


@dataclass
class LeftOver:
    """What is nothing to us: how many of each kind, and the names of the first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, path: str) -> None:
        """One more."""
        self.counts[kind] += 1
        if len(self.first[kind]) < 4:
            self.first[kind].append(path)


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a folder and the folders in it, without hidden files."""

    images: pa.ChunkedArray  # (N,) strings: paths from the folder with "/", sorted
    beside: np.ndarray  # (N,) uint8: which of `BESIDE` each image has
    odd: dict[str, list[str]]  # path of an image to those of its files, where any is not just its stem and an ending
    refused: dict[str, str]  # path to "why; what to do"; that of a folder ends with "/"
    metadata: list[str]  # paths of lists of images in the folders below
    left_over: LeftOver

    @property
    def counts(self) -> dict[str, int]:
        """Files that are nothing to us."""
        return dict(self.left_over.counts)

    def files(self, image: str, bits: int, endings: Sequence[str]) -> list[str]:
        """Paths of the files of an image with one of these endings."""
        if image in self.odd:
            return [path for path in self.odd[image] if path.lower().endswith(tuple(endings))]
        stem = os.path.splitext(image)[0]
        return [stem + ending for ending in endings if bits & BESIDE[ending]]


def list_folder(root: Path) -> Listing:
    """Everything in a folder."""
    paths, bits, chunks = [], bytearray(), [pa.array([], pa.string())]
    refused: dict[str, str] = {}
    odd: dict[str, list[str]] = {}
    metadata: list[str] = []
    left_over = LeftOver()
    for folder, images, others in walk(root, refused, left_over):
        neighbours = _Neighbours(others)
        used: set[str] = set()
        start = len(bits)
        for image in images:
            own = neighbours.of(image)
            bits.append(_together(own))
            used.update(name for name, _ in own)
            if not _is_plain(image, own):
                odd[folder + image] = [folder + name for name, _ in own]
        for place, own in _in_other_case(images, others - used, neighbours):
            bits[start + place] = _together(own)
            used.update(name for name, _ in own)
            odd[folder + images[place]] = [folder + name for name, _ in own]
        paths += [folder + name for name in images]
        metadata += [folder + name for name in sorted(others) if folder and name.lower() in NAMES]
        _count_left_over(folder, others - used, left_over)
        if len(paths) >= BATCH:
            chunks.append(pa.array(paths, pa.string()))
            paths = []
    images = pa.chunked_array([*chunks, pa.array(paths, pa.string())])
    order = pc.sort_indices(images)
    beside = np.frombuffer(bytes(bits), np.uint8)[order.to_numpy()]
    return Listing(images.take(order), beside, odd, refused, metadata, left_over)


def walk(
    root: Path, refused: dict[str, str], left_over: LeftOver | None = None
) -> Iterator[tuple[str, list[str], set[str]]]:
    """Of each folder its path from the root, its images, and its other files; links to folders are not followed.

    Files and folders that may not be used are put into `refused`, as in `Listing`; folders of the system are left over.
    """
    folders, left_over = [""], left_over or LeftOver()
    while folders:
        folder = folders.pop()
        inner, names = _entries(root, folder, refused)
        for path in inner:
            if path.split("/")[-2].lower() in SYSTEM_FOLDERS:
                left_over.add("folders of the system, left out", path)
            else:
                folders.append(path)
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
                if is_folder or _is_image(name) or name.lower().endswith(tuple(BESIDE)):
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


class _Neighbours:
    """The caption files and masks of one folder, found by the image that they belong to."""

    def __init__(self, names: set[str]):
        self._names = names
        self._odd: defaultdict[str, list[str]] = defaultdict(list)  # as it would be spelled -> as it is
        for name in names:
            ending = _ending(name)
            if ending and (spelled := composed(name[: -len(ending)]) + ending) != name:
                self._odd[spelled].append(name)

    def of(self, image: str) -> list[tuple[str, int]]:
        """Names and bits of the files of an image: `a.txt` or `a.jpg.txt` of `a.jpg`."""
        stem = os.path.splitext(image)[0]
        found: dict[str, int] = {}
        for start in (stem, image):
            for ending, bit in BESIDE.items():
                if start + ending in self._names:
                    found[start + ending] = bit
                if self._odd or not start.isascii():
                    spelled = composed(start) + ending
                    found |= {name: bit for name in (spelled, *self._odd.get(spelled, ())) if name in self._names}
        return list(found.items())


def _in_other_case(
    images: Sequence[str], left: set[str], neighbours: _Neighbours
) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """Place and files of each image that has some of `left` but for the case of letters: `img_0.txt` of `IMG_0.JPG`.

    Not where a name fits two images, or the image has a file of that kind which is spelled as it is.
    """
    loose: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for name in sorted(left):
        if ending := _ending(name):
            loose[folded(name[: -len(ending)])].append((name, BESIDE[ending]))
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    wanted: defaultdict[int, list[str]] = defaultdict(list)
    for place, image in enumerate(images if loose else ()):
        for start in (os.path.splitext(image)[0], image):
            if (key := folded(start)) in loose:
                spellings[key].add(composed(start))
                wanted[place].append(key)
    for place, keys in wanted.items():
        own = neighbours.of(images[place])
        taken = {bit in MASK_BITS for _, bit in own}
        files = [file for key in keys if len(spellings[key]) == 1 for file in loose[key]]
        if files := [file for file in files if (file[1] in MASK_BITS) not in taken]:
            yield place, own + files


def _together(files: Sequence[tuple[str, int]]) -> int:
    return sum({bit for _, bit in files})


def folded(name: str) -> str:
    """A name without regard to case."""
    return name.lower() if name.isascii() else composed(composed(name).casefold())


def composed(name: str) -> str:
    """A name as Unicode composes it (NFC)."""
    return name if name.isascii() else normalize("NFC", name)


def _ending(name: str) -> str | None:
    low = name.lower()
    return next((ending for ending in BESIDE if low.endswith(ending)), None)


def _is_plain(image: str, own: Sequence[tuple[str, int]]) -> bool:
    stem = os.path.splitext(image)[0]
    return all(name.removeprefix(stem) in BESIDE for name, _ in own)


def _count_left_over(folder: str, names: set[str], left_over: LeftOver) -> None:
    """What the files of a folder are that are no images and belong to none, for people."""
    for name in sorted(names):
        ending = _ending(name)
        if ending is not None:
            left_over.add(
                "masks without an image" if ending in MASKS else "caption files without an image", folder + name
            )
        elif folder and name.lower() in NAMES:
            left_over.add("lists of images in the folders below", folder + name)
        elif name.lower() not in SYSTEM_FILES and name.lower() not in NAMES:
            suffix = os.path.splitext(name)[1].lower()
            left_over.add(f"ignored {suffix} files" if suffix else "ignored files without an ending", folder + name)


def notes_on(root: Path, listing: Listing) -> list[str]:
    """What lies in a folder and is not trained, where somebody may have meant it to be: a line for each kind."""
    left, notes = listing.left_over, []

    def note(kinds: Sequence[str], what: str, advice: str) -> None:
        if count := sum(left.counts[kind] for kind in kinds):
            first = [path for kind in kinds for path in left.first[kind]]
            notes.append(f"{root}: {agreeing(count, what)} ({named(first, count)}); {advice}")

    phones = [f"ignored {ending} files" for ending in HEIF if f"ignored {ending} files" in left.counts]
    note(phones, "files in HEIC left out", INSTALL_HEIF)
    note(["caption files without an image"], "caption files without an image", "name them as their images")
    note(["masks without an image"], "masks without an image", "name them as their images")
    lists = [kind for ending in LISTS if (kind := f"ignored {ending} files") in left.counts]
    note(lists, "other files left out", f"captions for all images are read of a file named {' or '.join(NAMES)}")
    quiet = {f"ignored {ending} files" for ending in UNSURPRISING} | {*phones, *lists}
    others = [kind for kind in sorted(left.counts) if kind.startswith("ignored ") and kind not in quiet]
    note(others, "other files left out", f"images end with {' '.join(sorted(SUFFIXES))}")
    numbered = {match[0].strip("/") for path in _some(listing.images) if (match := _REPEATS.search(path))}
    if numbered:
        folders = named(sorted(numbered), len(numbered))
        notes.append(
            f"{root}: the numbers of {folders} are not read as repeats, and all of it is one source; write a source "
            "for each such folder, with `repeats`"
        )
    return notes


def _some(images: pa.ChunkedArray) -> list[str]:
    """Paths with a folder that begins as kohya's do."""
    return images.filter(pc.match_substring_regex(images, r"(^|/)[0-9]+_[^/]*/")).to_pylist()


def endings_in(listing: Listing) -> str:
    """What a folder without images holds instead: "3 .heic files, 2 .mov files"; "" where there is nothing."""
    counts = listing.left_over.counts.most_common(5)
    return ", ".join(agreeing(count, kind.removeprefix("ignored ")) for kind, count in counts)


def mask_file(image: Path) -> Path | None:
    """The mask beside an image that is in no listing."""
    files = (image.with_name(image.stem + ending) for ending in MASKS)
    return next((file for file in files if file.is_file()), None)
