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

ALIGNMENT = 64  # bytes, of all that torch allocates on a CPU


class Base:
    """A base that is on disk: `folder`, `family`, and its parts by `load`."""

    def __init__(self, model: ModelSection, device: torch.device | str = "cpu"):
        self.folder, self.dtype, self.device = locate_base(model.base, model.revision), model.dtype, device
        self.family = _family_of(self.folder, model)
        if problems := self.family.problems(PipelineFiles(self.folder)):
            raise UserError([f"base {model.base!r}: {problem}" for problem in problems])

    def load(self, only: Collection[str] | None = None) -> Parts:
        """All parts or some, frozen, in evaluation mode, on the device, with weights in memory of torch's own."""
        parts = self.family.load(self.folder, torch_dtype(self.dtype), only)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                align(part)
                part.to(self.device)
        return parts


def _family_of(folder: Path, model: ModelSection) -> ModelFamily:
    """The family is detected when the config names none, and checked when it does."""
    detected = detect_family(folder)
    if model.family is not None and model.family != detected:
        find("models.families", model.family)  # answers with the names that exist
        raise UserError(f"base {model.base!r} is a {detected} model, the config says family {model.family!r}")
    return find("models.families", detected).FAMILY


def align(module: torch.nn.Module) -> None:
    """Copies weights that do not begin where torch's own would.

    Weights that are mapped from a file begin wherever its header ends, and CPU kernels round by where their operands
    begin: the same numbers from two files, or from a file and from another process, would give other bits.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
