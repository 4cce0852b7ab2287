"""WebDataset shards: uncompressed tar files that are read at random."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...configs.data_sections import ShardSource
from ...configs.errors import UserError
from ...configs.paths import looked_in
from ...images.endings import SUFFIXES
from ..source import Captions, Problems, check_masks
from ..tar_index import load_index


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
        counts: dict[str, int],
    ):
        self.name, self.problems, self.counts = Path(section.shards).name, problems, counts
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
        with self.path(index).open("rb") as shard:
            shard.seek(offset)
            content = shard.read(size)
        if len(content) < size:
            raise OSError("the tar file is shorter than it was when it was opened")
        return content


def open_source(section: ShardSource, cache: Path | None = None) -> ShardImages:
    """The images of all shards. The index is kept in the folder `cache`, if given, until a shard changes."""
    shards = _find_shards(section.shards)
    problems = Problems(section.shards)
    index = load_index(shards, cache, problems)
    if not len(index.rows) and not problems.lines():
        kinds = " ".join(sorted(SUFFIXES))
        raise UserError(f"{section.shards}: the shards hold no images (looked for {kinds})")
    names, numbers = index.rows["image"], index.rows["shard"].to_numpy()

    def location(row: int) -> str:
        return f"{shards[numbers[row]]}:{names[row].as_py()}"

    captions = Captions(index.rows["captions"], section, index.unreadable)
    captions.check(problems, location, lambda row: "put a .txt with its stem into the tar file")
    masks = check_masks(section, index.rows["mask_size"].to_numpy() >= 0, problems, location)
    counts = captions.counts(index.own) | masks | index.counts
    return ShardImages(section, shards, index.rows, captions, problems.lines(), counts)


def _find_shards(pattern: str) -> list[str]:
    found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not found:
        reason = f"there is no such tar file{looked_in(pattern)}"
        if os.path.isdir(pattern):
            reason = f"is a folder; write {pattern.rstrip('/')}/*.tar"
        elif "{" in pattern:
            reason = "there is no such tar file; a pattern is written with * and ?, not with {…}"
        raise UserError(f"{pattern}: {reason}")
    return found
