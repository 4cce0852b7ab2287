"""A base with adapters merged into it in memory: W + sum of weight * delta-W. Its files stay as they are."""

from collections import defaultdict
from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor

from ..adapters import algebra
from ..adapters.artifact import AdapterArtifact, module_path
from ..adapters.format import FormatNames, read
from ..configs.schema import ModelSection
from ..models.family import Parts
from ..models.load import Base
from .adapter_file import format_names
from .weighted_file import AdapterFile


class MergedBase(Base):
    """A `Base` whose parts come with `model.adapters` in them."""

    def __init__(self, model: ModelSection, device: torch.device | str = "cpu"):
        super().__init__(model, device)
        self.adapters = [AdapterFile.parse(text) for text in model.adapters]

    @cached_property
    def names(self) -> FormatNames:
        """What the file formats have to know of this base, for which the parts that carry adapters are loaded."""
        return format_names(self.family, super().load([*self.family.kohya_prefixes, "scheduler"]))

    @cached_property
    def merged(self) -> list[tuple[AdapterArtifact, float]]:
        """The adapters with their weights. UserError for a file that does not fit the base."""
        return [(read(adapter.file, self.names), adapter.weight) for adapter in self.adapters]

    def load(self, only: Collection[str] | None = None, dtype: torch.dtype | None = None) -> Parts:
        parts = super().load(only, dtype)
        if self.adapters:
            for part in parts.keys() & self.family.kohya_prefixes.keys():
                self._merge(part, parts[part])
        return parts

    def changed(self) -> dict[str, dict[str, Tensor]]:
        """Part -> parameter -> its value with the adapters in it, of all that they change."""
        parts = super().load({part for artifact, _ in self.merged for part, _ in artifact.modules})
        return {part: self._merge(part, m) for part, m in parts.items() if isinstance(m, torch.nn.Module)}

    @torch.no_grad()
    def _merge(self, part: str, model: torch.nn.Module) -> dict[str, Tensor]:
        """The weights that changed. Every change is that of the base as it was, whatever comes before it."""
        has, changes = {name for name, _ in model.named_modules()}, defaultdict(list)
        for artifact, weight in self.merged:
            for (owner, path), weights in artifact.modules.items():
                if owner == part:
                    changes[module_path(part, path, has)].append((weights, weight))
        found = {f"{name}.weight": several for name, several in changes.items()}
        for name, several in found.items():
            parameter = model.get_parameter(name)
            parameter.data = algebra.merged(parameter, several, f"{part} {name}").to(parameter.device)
        return {name: model.get_parameter(name).detach() for name in found}
