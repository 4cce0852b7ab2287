"""Loads a base: its family first, its parts when they are asked for."""

from collections.abc import Collection
from pathlib import Path

import torch

from ..configs.choices import find
from ..configs.dtypes import torch_dtype
from ..configs.errors import UserError
from ..configs.schema import ModelSection
from .base import PipelineFiles, detect_family, locate_base
from .family import ModelFamily, Parts


class Base:
    """A base that is on disk: `folder`, `family`, and its parts by `load`."""

    def __init__(self, model: ModelSection, device: torch.device | str = "cpu"):
        self.folder, self.dtype, self.device = locate_base(model.base, model.revision), model.dtype, device
        self.family = _family_of(self.folder, model)
        if problems := self.family.problems(PipelineFiles(self.folder)):
            raise UserError([f"base {model.base!r}: {problem}" for problem in problems])

    def load(self, only: Collection[str] | None = None, dtype: torch.dtype | None = None) -> Parts:
        """All parts or some, frozen, in evaluation mode, on the device; in the base's type unless another is given."""
        parts = self.family.load(self.folder, dtype or torch_dtype(self.dtype), only)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.to(self.device)
        return parts


def _family_of(folder: Path, model: ModelSection) -> ModelFamily:
    """The family is detected when the config names none, and checked when it does."""
    detected = detect_family(folder)
    if model.family is not None and model.family != detected:
        find("models.families", model.family)  # answers with the names that exist
        raise UserError(f"base {model.base!r} is a {detected} model, the config says family {model.family!r}")
    return find("models.families", detected).FAMILY
