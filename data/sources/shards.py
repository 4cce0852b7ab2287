"""WebDataset shards: uncompressed tar files that are read at random."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...configs.bounded import PICTURE, open_regular
from ...configs.data_sections import ShardSource
from ...configs.errors import UserError
from ...configs.paths import looked_in
from ...configs.words import agreeing
from ...images.endings import HEIF, SUFFIXES
from ..listing import CAPTION_FILES
from ..source import Captions, Problems, check_masks, one_text_note
from ..tar_index import ONE_TEXT, load_index


class ShardImages:
    """An `ImageSource` that opens a tar file for each image: no file stays open between two reads."""

    declared_sizes: np.ndarray | None = None

    def __init__(
        self,
        section: ShardSource,
        shards: Sequence[str],
        rows: pa.Table,
        captions: Captions,
        problems: list[str],
        notes: list[str],
        counts: dict[str, int],
    ):
        self.name, self.problems, self.notes, self.counts = Path(section.shards).name, problems, notes, counts
        self._has_masks = section.mask == "file"
        self._shards, self._captions, self._names = list(shards), captions, rows["image"]
        self._shard = rows["shard"].to_numpy()
        self._images = np.stack([rows["offset"].to_numpy(), rows["size"].to_numpy()], axis=1)
        self._masks = np.stack([rows["mask_offset"].to_numpy(), rows["mask_size"].to_numpy()], axis=1)

    def __len__(self) -> int:
        return len(self._shard)

    def location(self, index: int) -> str:
        return f"{self.path(index)}:{self._names[index].as_py()}"

    def path(self, index: int) -> Path:
        return Path(self._shards[self._shard[index]])

    def read(self, index: int) -> bytes:
        return self._read(index, *self._images[index].tolist())

    def read_mask(self, index: int) -> bytes | None:
        offset, size = self._masks[index].tolist()
        return None if size < 0 or not self._has_masks else self._read(index, offset, size)

    def captions(self, index: int) -> list[str]:
        return self._captions[index]

    def _read(self, index: int, offset: int, size: int) -> bytes:
        if size > PICTURE:
            raise OSError(f"it has {size:,} bytes, more than the {PICTURE:,} of an image")
        try:
            with open_regular(self.path(index)) as shard:
                shard.seek(offset)
                content = shard.read(size)
        except UserError as error:
            raise OSError(str(error)) from error
        if len(content) < size:
            raise OSError("the tar file is shorter than it was when it was opened")
        return content


def open_source(section: ShardSource, cache: Path | None = None, lines: str | None = None) -> ShardImages:
    """The images of all shards. The index is kept in the folder `cache`, if given, until a shard changes."""
    shards = _find_shards(section.shards)
    problems = Problems(section.shards)
    index = load_index(shards, cache, problems, lines)
    if not len(index.rows) and not problems.lines():
        kinds, there = " ".join(sorted(SUFFIXES)), _left_over(index.counts)
        there = f"; there are {there}" if there else ""
        raise UserError(f"{section.shards}: the shards hold no images (looked for {kinds}){there}")
    names, numbers = index.rows["image"], index.rows["shard"].to_numpy()

    def location(row: int) -> str:
        return f"{shards[numbers[row]]}:{names[row].as_py()}"

    captions = Captions(index.rows["captions"], section, index.unreadable)
    captions.check(problems, location, lambda row: "put .txt files with their stems into the tar file")
    masks = check_masks(section, index.rows["mask_size"].to_numpy() >= 0, problems, location)
    counts = captions.counts(index.own) | masks | index.counts
    return ShardImages(section, shards, index.rows, captions, problems.lines(), _notes(section, index.counts), counts)


def _left_over(counts: Mapping[str, int]) -> str:
    """Members that are nothing to us, in words."""
    kinds = [kind for kind in counts if kind.startswith("ignored .")]
    return ", ".join(agreeing(counts[kind], kind.removeprefix("ignored ")) for kind in sorted(kinds))


def _notes(section: ShardSource, counts: Mapping[str, int]) -> list[str]:
    """What the shards hold and is not trained, where somebody may have meant it to be."""
    endings = {kind.removesuffix(" members").rpartition(".")[2] for kind in counts if kind.startswith("ignored .")}
    surprising = any(f".{ending}" in (*SUFFIXES, *HEIF, *CAPTION_FILES) for ending in endings)
    notes = []
    if surprising:
        notes.append(
            f"{section.shards}: {_left_over(counts)} left out: the name of a sample ends at its first dot, and "
            "beside an image with a plain ending those with longer ones are something else"
        )
    if counts.get("samples without an image"):
        count = counts["samples without an image"]
        notes.append(f"{section.shards}: {agreeing(count, 'samples with captions and without an image')}")
    if counts.get(ONE_TEXT):
        notes.append(one_text_note(section.shards, counts[ONE_TEXT]))
    return notes


def _find_shards(pattern: str) -> list[str]:
    found = (
        [pattern] if os.path.isfile(pattern) else _matching(pattern) or _matching(_with_folders_as_they_are(pattern))
    )
    if not found:
        reason = f"there is no such tar file{looked_in(pattern)}"
        if os.path.isdir(pattern):
            reason = f"is a folder; write {pattern.rstrip('/')}/*.tar"
        elif "[" in pattern:
            reason = (
                "there is no such tar file; [ is part of a pattern, and [[] stands for it where no folder is called so"
            )
        elif "{" in pattern:
            reason = "there is no such tar file; a pattern is written with * and ?, not with {…}"
        raise UserError(f"{pattern}: {reason}")
    return found


def _matching(pattern: str) -> list[str]:
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def _with_folders_as_they_are(pattern: str) -> str:
    """A pattern whose begin is a folder that is really called so, as `photos [2024]/*.tar`."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder) if os.path.dirname(folder) != folder else ""
    return glob.escape(folder) + pattern[len(folder) :]
