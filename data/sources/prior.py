"""Class images, which the run makes for itself before it trains: one prompt is the caption of all of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...configs.data_sections import PriorSource
from ..source import read_picture


class PriorImages:
    """An `ImageSource` of files that were made for this section."""

    declared_sizes: np.ndarray | None = None

    def __init__(self, section: PriorSource, files: Sequence[Path]):
        self.name = "prior"
        self._files, self._prompt = list(files), section.prior
        self.counts = {"class images": len(self._files)}
        self.problems: list[str] = []
        self.notes: list[str] = []
        if len(self._files) < section.count:
            found = f"{len(self._files)} class images, `count` wants {section.count}"
            self.problems = [f"prior {section.prior!r}: {found}; make the others or ask for fewer"]

    def __len__(self) -> int:
        return len(self._files)

    def location(self, index: int) -> str:
        return str(self._files[index])

    def path(self, index: int) -> Path:
        return self._files[index]

    def read(self, index: int) -> bytes:
        return read_picture(self._files[index])

    def read_mask(self, index: int) -> bytes | None:
        return None

    def captions(self, index: int) -> list[str]:
        return [self._prompt]
