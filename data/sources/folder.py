"""A folder of images: captions in `.txt`/`.caption` files beside them, or all of them in one metadata file."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ...configs.bounded import LINE, read_bytes
from ...configs.data_sections import FolderSource
from ...configs.errors import UserError
from ...configs.paths import looked_in
from ...configs.words import agreeing
from ...images.endings import HEIF, INSTALL_HEIF, SUFFIXES
from ..listing import (
    BESIDE,
    CAPTION_FILES,
    Listing,
    composed,
    endings_in,
    list_folder,
    mask_file,
    notes_on,
    walk,
)
from ..metadata import Metadata, find_metadata, read_metadata
from ..source import (
    CAPTION_LISTS,
    MASKS,
    SAVED,
    Captions,
    Problems,
    check_masks,
    looks_like_one_text,
    named,
    one_text_note,
    read_picture,
    read_sidecars,
)

pc: Any = pyarrow.compute  # its functions are made when it is imported: a type checker sees none

CAPTION_BITS = sum(BESIDE[ending] for ending in CAPTION_FILES)
MASK_BITS = sum(BESIDE[ending] for ending in MASKS)
BATCH = 8192  # images whose names are Python objects at the same time
NO_PATH = "is no path of an image; write one"
BAD_PATHS = (  # pattern of a path in a metadata file, and why it is refused
    (r"^([/\\]|[A-Za-z]:[/\\])", "is an absolute path; write it from the folder of the metadata"),
    (r"(^|[/\\])\.\.([/\\]|$)", "leads out of the folder; copy the image into it"),
    (r"^[./]*$|[/\\]$|\x00", NO_PATH),
)


class FolderImages:
    """An `ImageSource`; paths are kept as one arrow column."""

    declared_sizes: np.ndarray | None

    def __init__(
        self,
        section: FolderSource,
        root: Path,
        images: pa.ChunkedArray,
        captions: Captions,
        sizes: np.ndarray | None,
        listing: Listing,
        problems: list[str],
        notes: list[str],
        counts: dict[str, int],
    ):
        """`root` is the folder that the paths of `images` begin at."""
        folder = Path(section.path)
        self.name = folder.name or folder.resolve().name
        self.declared_sizes, self.problems, self.notes, self.counts = sizes, problems, notes, counts
        self._root, self._images, self._captions = root, images, captions
        self._odd_masks = {image: path for image in listing.odd for path in listing.files(image, 0, MASKS)}
        self._resolved = root.resolve()
        self._has_masks = section.mask == "file"

    def __len__(self) -> int:
        return len(self._images)

    def location(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        return self._root / self._images[index].as_py()

    def read(self, index: int) -> bytes:
        return self._read(self.path(index))

    def read_mask(self, index: int) -> bytes | None:
        if not self._has_masks:
            return None
        odd = self._odd_masks.get(self._images[index].as_py())
        file = mask_file(self.path(index)) if odd is None else self._root / odd
        return self._read(file) if file else None

    def _read(self, file: Path) -> bytes:
        if not file.resolve().is_relative_to(self._resolved):  # a link in a hidden folder, or made after the listing
            raise OSError(f"it leads out of {self._root}, to {file.resolve()}; copy it into the folder")
        return read_picture(file)

    def captions(self, index: int) -> list[str]:
        return self._captions[index]


def open_source(section: FolderSource, cache: Path | None = None, lines: str | None = None) -> FolderImages:
    """The images of a folder; everything in it is listed, and with sidecars every caption is read."""
    root = Path(section.path)
    if not root.is_dir():
        raise UserError(f"{root}: {_why_no_folder(root)}")
    try:
        file = find_metadata(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be listed ({error.strerror}); change its permissions") from error
    listing = list_folder(root)
    problems = Problems(str(root))
    if file is None and (below := _list_of_all(listing)):
        root, listing = root / below, list_folder(root / below)
        file = find_metadata(root)
    if file:
        return _open_listed(section, root, listing, file, problems)
    source = _open_all(section, root, listing, problems, lines)
    if not len(source) and not source.problems:
        kinds, there = " ".join(sorted(SUFFIXES)), endings_in(listing)
        hint = f"; {INSTALL_HEIF}" if any(f"{ending} file" in there for ending in HEIF) else ""
        if any((root / name).is_file() for name in SAVED):
            hint = "; `dataset` in place of `path` reads what `save_to_disk` wrote"
        elif any(f"{ending} file" in there for ending in (".tar", ".parquet")):
            hint = f"; `shards: {root}/*.tar` reads tar files, `dataset: {root}` Parquet files"
        there = f"; there are {there}{hint}" if there else ""
        raise UserError(f"{root}: holds no images (looked for {kinds}, also in the folders in it){there}")
    return source


def _why_no_folder(path: Path) -> str:
    if not path.exists():
        return f"there is no such folder of images{looked_in(path)}"
    if path.suffix.lower() == ".tar":
        return "is a tar file, not a folder; `shards` in place of `path` reads it"
    return "is a file, not a folder of images; give the folder that it is in"


def _list_of_all(listing: Listing) -> str | None:
    """The folder below whose metadata is the only one, where all images lie in it."""
    if len(listing.metadata) != 1:
        return None
    folder = os.path.dirname(listing.metadata[0])
    return folder if len(listing.images) and pc.all(pc.starts_with(listing.images, folder + "/")).as_py() else None


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and the folders in it, sorted; hidden files (`.x.png`, `._x.png`) and masks are none."""
    return sorted(folder / inner / image for inner, images, _ in walk(folder, {}) for image in images)


def _open_all(
    section: FolderSource, root: Path, listing: Listing, problems: Problems, lines: str | None
) -> FolderImages:
    """Every image of the folder, with the captions beside it."""
    for path, reason in sorted(listing.refused.items()):
        problems.add("files that are not taken", f"{root / path}: {reason}")
    found = _read_captions(root, listing, problems, lines)
    captions = Captions(found.column, section, found.unreadable)
    paths = listing.images

    def location(row: int) -> str:
        return str(root / paths[row].as_py())

    captions.check(problems, location, lambda row: f"put {Path(paths[row].as_py()).stem}.txt beside it")
    masks = check_masks(section, listing.beside & MASK_BITS > 0, problems, location)
    counts = captions.counts(found.own) | masks | listing.counts
    notes = notes_on(root, listing)
    if listing.metadata:
        read = "a list is read in the folder of its source, or where all of its images lie beside it"
        notes.append(f"{root}: {named(listing.metadata, len(listing.metadata))} is not read: {read}")
    if found.one_text:
        notes.append(one_text_note(str(root), len(found.one_text), found.one_text))
    return FolderImages(section, root, paths, captions, None, listing, problems.lines(), notes, counts)


@dataclass
class _Sidecars:
    """What the files beside images say."""

    column: pa.ChunkedArray  # (N,) lists of captions
    unreadable: list[int]  # rows whose files cannot be used
    own: Counter[str]  # how many captions come from where
    one_text: list[str]  # files whose lines look like one text, where nobody has said what they are


def _read_captions(root: Path, listing: Listing, problems: Problems, lines: str | None) -> _Sidecars:
    chunks: list[pa.Array] = []
    unreadable: list[int] = []
    own: Counter[str] = Counter()
    one_text: list[str] = []
    for start in range(0, len(listing.images), BATCH):
        rows: list[list[str] | None] = []
        paths = listing.images[start : start + BATCH].to_pylist()
        for path, bits in zip(paths, listing.beside[start : start + BATCH].tolist(), strict=True):
            files = listing.files(path, bits, CAPTION_FILES)
            captions = None
            try:
                contents = {str(root / file): read_bytes(root / file, LINE) for file in files}
                captions = read_sidecars(contents, lines)
                own.update(os.path.splitext(file)[1].lower() for file in files[:1])
                if lines is None and captions is not None and len(captions) > 1:
                    one_text += [
                        file for file, text in zip(files, contents.values(), strict=True) if looks_like_one_text(text)
                    ]
            except (ValueError, OSError) as error:
                unreadable.append(start + len(rows))
                problems.add("caption files that cannot be used", _sidecar_problem(error))
            rows.append(captions)
        chunks.append(pa.array(rows, CAPTION_LISTS))
    return _Sidecars(pa.chunked_array(chunks, CAPTION_LISTS), unreadable, own, one_text)


def _sidecar_problem(error: ValueError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: cannot be read ({error.strerror}); change its permissions or delete it"
    return str(error)


def _open_listed(section: FolderSource, root: Path, listing: Listing, file: Path, problems: Problems) -> FolderImages:
    """The images that a metadata file lists."""
    metadata = read_metadata(file, section, problems)
    metadata = replace(metadata, images=_as_on_disk(_plain_paths(metadata.images), listing))
    places = _places(metadata.images, listing)
    sound = _check_paths(root, metadata, listing, places >= 0, problems)
    if not sound.all():
        metadata, places = metadata.filter(sound), places[sound]
    images = metadata.images

    def location(row: int) -> str:
        return str(root / images[row].as_py())

    column = pa.chunked_array([pa.nulls(len(images), pa.string())]) if metadata.captions is None else metadata.captions
    captions = Captions(column, section)
    remedy = f"fill its {section.caption_column!r} in {file.name}"
    captions.check(problems, location, lambda row: remedy, metadata.place)
    masks = check_masks(section, _have_masks(section, root, images, listing, places), problems, location)
    unlisted = _unlisted(listing, places, file.name)
    counts = captions.counts({file.name: captions.num_own}) | masks | unlisted | listing.counts
    notes = [*_notes_on_list(root, listing, places, file), *notes_on(root, listing)]
    return FolderImages(section, root, images, captions, metadata.sizes, listing, problems.lines(), notes, counts)


def _notes_on_list(root: Path, listing: Listing, places: np.ndarray, file: Path) -> list[str]:
    """Images and captions of the folder that its list leaves out."""
    listed = np.zeros(len(listing.images), bool)
    listed[places[places >= 0]] = True
    notes = []
    for rows, what in (
        (np.flatnonzero(~listed), f"images left out, not in {file.name}"),
        (np.flatnonzero(listing.beside & CAPTION_BITS > 0), f"images with caption files, which {file.name} replaces"),
    ):
        if len(rows):
            first = listing.images.take(rows[:BATCH][:4]).to_pylist()
            notes.append(f"{root}: {agreeing(len(rows), what)} ({named(first, len(rows))})")
    return notes


def _as_on_disk(images: pa.ChunkedArray, listing: Listing) -> pa.ChunkedArray:
    """Paths as the folder spells them, where Unicode has two ways to write one name."""
    foreign = np.flatnonzero(_places(images, listing) < 0)
    other = listing.images.filter(pc.invert(pc.string_is_ascii(listing.images)))
    if not len(foreign) or not len(other):
        return images
    spelled = {composed(path): path for path in other.to_pylist()}
    paths = images.to_pylist()
    for row in foreign:
        paths[row] = spelled.get(composed(paths[row] or ""), paths[row])
    return pa.chunked_array([pa.array(paths, images.type)])


def _plain_paths(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without "./" and "//", so that one file has one path."""
    if not pc.any(pc.match_substring_regex(images, r"//|(^|/)\./")).as_py():
        return images
    return pc.replace_substring_regex(pc.replace_substring_regex(images, r"/(\.?/)+", "/"), r"^(\./)+", "")


def _places(images: pa.ChunkedArray, listing: Listing) -> np.ndarray:
    """(N,) index of each path in the listing, -1 where it is not there."""
    found = pc.index_in(images, value_set=listing.images.cast(images.type))
    return found.fill_null(-1).to_numpy()


def _check_paths(
    root: Path, metadata: Metadata, listing: Listing, listed: np.ndarray, problems: Problems
) -> np.ndarray:
    """(N,) bool: rows that name an image of the folder. `listed` (N,) are those that are in its listing."""
    images, sound = metadata.images, np.ones(len(metadata.images), bool)

    def refuse(found: np.ndarray, reason: Callable[[str], str]) -> None:
        rows = np.flatnonzero(found & sound)
        sound[rows] = False
        problems.add_rows(
            "paths that are refused",
            rows,
            lambda row: f"{metadata.place(row)}: {(path := images[row].as_py())!r} {reason(path)}",
        )

    refuse(images.is_null().to_numpy(), lambda path: NO_PATH)
    for pattern, reason in BAD_PATHS:
        refuse(_true(pc.match_substring_regex(images, pattern)), lambda path, reason=reason: reason)
    refuse(_true(pc.is_in(images, value_set=pa.array(list(listing.refused), images.type))), listing.refused.__getitem__)
    for folder in (path for path in listing.refused if path.endswith("/")):
        through = f"is reached through {root / folder}, which {listing.refused[folder]}"
        refuse(_true(pc.starts_with(images, folder)), lambda path, reason=through: reason)
    if metadata.sizes is None:  # images with declared sizes, a million perhaps, are looked at by the scan
        absent = np.zeros(len(images), bool)
        elsewhere = np.flatnonzero(~listed & sound)
        absent[elsewhere] = [not os.path.isfile(root / images[row].as_py()) for row in elsewhere]
        if absent.any():
            meant = _meant(images.filter(pa.array(absent)).to_pylist(), listing)
            refuse(absent, lambda path: f"does not exist{meant(path)}; correct it or take it out")
    return sound


def _meant(absent: list[str], listing: Listing) -> Callable[[str], str]:
    """What to say of a path that is not there: the one image of its name in another case, or another folder."""
    wanted = {os.path.basename(path).lower() for path in absent}
    there: defaultdict[str, list[str]] = defaultdict(list)
    for chunk in listing.images.chunks:
        for path in chunk.to_pylist():
            if (name := os.path.basename(path).lower()) in wanted:
                there[name].append(path)

    def words(path: str) -> str:
        found = there[os.path.basename(path).lower()]
        return f" ({found[0]} does)" if len(found) == 1 else ""

    return words


def _true(found: pa.ChunkedArray) -> np.ndarray:
    return found.fill_null(False).to_numpy()


def _have_masks(
    section: FolderSource, root: Path, images: pa.ChunkedArray, listing: Listing, places: np.ndarray
) -> np.ndarray:
    """(N,) bool; images outside of the listing, such as those in hidden folders, are looked at one by one."""
    has_mask = np.zeros(len(images), bool)
    has_mask[places >= 0] = listing.beside[places[places >= 0]] & MASK_BITS > 0
    if section.mask == "file":
        outside = np.flatnonzero(places < 0)
        has_mask[outside] = [mask_file(root / images[row].as_py()) is not None for row in outside]
    return has_mask


def _unlisted(listing: Listing, places: np.ndarray, name: str) -> dict[str, int]:
    """What lies in the folder and not in its metadata, for people. `places` (N,) of its rows in the listing, or -1."""
    inside = places[places >= 0]
    used = len(np.unique(inside))
    counts = {
        f"images that {name} does not list": len(listing.images) - used,
        f"images that {name} lists again": len(inside) - used,
        f"caption files ignored beside {name}": int((listing.beside & CAPTION_BITS > 0).sum()),
    }
    return {what: count for what, count in counts.items() if count}
