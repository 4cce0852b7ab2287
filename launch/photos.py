"""A folder of photos as sources: captions beside them, and folders of sd-scripts such as `10_sks dog`."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UserError
from ..configs.loader import inline_yaml
from ..configs.words import counted

NUMBERED = re.compile(r"(?P<repeats>\d+)_(?P<words>.*)")
UNREAD = {
    **dict.fromkeys((".heic", ".heif"), "save them as JPEG (on an iPhone: Settings, Camera, Formats, Most Compatible)"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".raw"), "develop them as JPEG"),
    **dict.fromkeys((".psd", ".xcf", ".svg", ".jxl", ".jp2"), "save them as PNG"),
    **dict.fromkeys((".mov", ".mp4", ".avi", ".mkv", ".webm"), "videos are not read: save frames as PNG"),
}
"""Endings of pictures that are not read, and what to do with them."""


class Folder(NamedTuple):
    """Images that are one source."""

    path: Path
    caption: str
    repeats: int
    images: int
    is_class: bool


class Found(NamedTuple):
    """What will be trained on."""

    folders: list[Folder]
    trigger: str  # as it stands in prompts
    prior: str | None  # class images that the base has to make
    words: list[str]  # lines for people


def look(data: Path, class_prompt: str | None, trigger: str | None) -> Found:
    """The sources of a folder. UserError where no image is in it."""
    images = images_in(data)
    class_prompt = (class_prompt or "").strip() or None
    numbered = _numbered(data, class_prompt)
    left = _left_out(data)
    if not any(not folder.is_class for folder in numbered):
        trigger = trigger or default_trigger(class_prompt)
        words = f"{counted(len(images), 'image')} of {data} as {trigger!r}{_own_captions(images)}"
        return Found([Folder(data, trigger, 1, len(images), False)], trigger, class_prompt, [words, *left])
    own = [folder for folder in numbered if not folder.is_class]
    if trigger and len(own) == 1:
        numbered = [folder if folder.is_class else folder._replace(caption=trigger) for folder in numbered]
    first = next(folder for folder in numbered if not folder.is_class)
    has_class = any(folder.is_class for folder in numbered)
    words = [f"{counted(len(numbered), 'folder')} of {data} as in sd-scripts:"]
    for folder in numbered:
        what = f"{counted(folder.images, 'image')} as {folder.caption!r}{_own_captions(images_in(folder.path))}"
        kind = "class images" if folder.is_class else f"{counted(folder.repeats, 'time')} each"
        words.append(f"  {folder.path.name}: {what}; {kind}")
    outside = len(images) - sum(folder.images for folder in numbered)
    if outside:
        words.append(f"  {counted(outside, 'image')} outside of these folders are left out")
    return Found(numbered, first.caption, None if has_class else class_prompt, [*words, *left])


def sources_text(found: Found, class_images: int) -> str:
    """The entries of `data.sources`."""
    shares = _shares(found)
    lines = []
    for folder, share in zip(found.folders, shares, strict=True):
        caption = "" if len(lines) else "  # of images without one of their own: a rare word and what your subject is"
        lines += [
            f"    - path: {inline_yaml(str(folder.path))}",
            f"      caption: {inline_yaml(folder.caption)}{caption}",
        ]
        if share is not None:
            lines.append(f"      share: {share:g}  # of all samples{'; class images' * folder.is_class}")
        elif folder.repeats > 1:
            lines.append(f"      repeats: {folder.repeats}")
    if found.prior is not None:
        lines += [
            f"    - prior: {inline_yaml(found.prior)}  # class images, made by the base: it must not forget the others",
            f"      count: {class_images}",
            "      share: 0.5  # of all samples",
        ]
    return "\n".join(lines) + "\n"


def _shares(found: Found) -> list[float | None]:
    """Half for class images where there are any; within each half by images and repeats."""
    if found.prior is None and not any(folder.is_class for folder in found.folders):
        return [None] * len(found.folders)
    sizes = [folder.images * max(1, folder.repeats) for folder in found.folders]
    of_kind = {
        kind: sum(s for s, f in zip(sizes, found.folders, strict=True) if f.is_class == kind) for kind in (True, False)
    }
    shares = [round(0.5 * size / of_kind[f.is_class], 4) for size, f in zip(sizes, found.folders, strict=True)]
    rest = (0.5 if found.prior is not None else 1.0) - sum(shares)
    return [round(shares[0] + rest, 4), *shares[1:]]


def _numbered(data: Path, class_prompt: str | None) -> list[Folder]:
    """Folders `10_sks dog` in it, or in `img` and `reg` in it; a class is what the words of another one end with."""
    inside = {root: _folders(data / root) for root in ("", "img", "image", "images", "reg")}
    found = inside[""] or inside["img"] or inside["image"] or inside["images"]
    ours = {words for _, _, words in found}
    asked = without_article(class_prompt or "").lower()

    def is_class(words: str) -> bool:
        longer = [other for other in ours if other != words and other.lower().endswith(f" {words.lower()}")]
        return bool(longer) or words.lower() == asked

    rows = [(path, repeats, words, is_class(words)) for path, repeats, words in found]
    rows += [(path, repeats, words, True) for path, repeats, words in inside["reg"]]
    counts = {path: _count(path) for path, *_ in rows}
    return [Folder(path, words, repeats, counts[path], kind) for path, repeats, words, kind in rows if counts[path]]


def _folders(root: Path) -> list[tuple[Path, int, str]]:
    inside = sorted(root.iterdir()) if root.is_dir() else []
    found = [(each, NUMBERED.fullmatch(each.name)) for each in inside if each.is_dir()]
    return [(each, int(match["repeats"]), match["words"].strip() or each.name) for each, match in found if match]


def _count(path: Path) -> int:
    from ..data.sources.folder import image_files

    return len(image_files(path))


def images_in(folder: Path) -> list[Path]:
    """Images in a folder and the folders in it, by their endings. UserError if there are none."""
    from ..data.sources.folder import image_files
    from ..images.endings import SUFFIXES

    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; --data is a folder")
    found = image_files(folder)
    if not found:
        left = _left_out(folder)
        there = f" but {left[0]}" if left else f"; the endings are: {' '.join(sorted(SUFFIXES))}"
        raise UserError(f"{folder}: no images in it{there}")
    return found


def _left_out(folder: Path) -> list[str]:
    """Photos that are not read."""
    from ..data.listing import walk
    from ..images.endings import SUFFIXES

    endings = Counter(Path(name).suffix.lower() for _, _, others in walk(folder, {}) for name in others)
    unread = {ending: count for ending, count in endings.items() if ending in UNREAD and ending not in SUFFIXES}
    return [
        f"{counted(count, f'{ending} file')} left out: {UNREAD[ending]}" for ending, count in sorted(unread.items())
    ]


def _own_captions(images: list[Path]) -> str:
    """How many have captions beside them, which count before the one in the config."""
    from ..data.listing import CAPTION_FILES

    beside = {(file.parent, file.stem) for file in images}
    folders = {file.parent for file in images}
    texts = {
        (file.parent, file.stem)
        for folder in folders
        for file in folder.iterdir()
        if file.suffix.lower() in CAPTION_FILES
    }
    count = len(beside & texts)
    all_of_them = "; each has a caption of its own"
    some = f"; {count} of them {'has a caption of its' if count == 1 else 'have captions of their'} own"
    return "" if not count else all_of_them if count == len(images) else some


def without_article(words: str) -> str:
    """'dog' of 'a dog'."""
    first, *rest = words.split() or [""]
    return " ".join(rest if first.lower() in {"a", "an", "the"} else [first, *rest])


def default_trigger(class_prompt: str | None) -> str:
    """'a sks dog' for 'a dog'."""
    return f"a sks {without_article(class_prompt or 'a subject')}"
