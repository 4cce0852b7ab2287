"""Adapters added to the weights of a model in memory, and the weights of before put back bit for bit.

W + B A - B A is not W in floating point, so nothing is subtracted: the base's weights are kept, or read again.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import active
from ..adapters.algebra import merged
from ..adapters.artifact import Base, Key, Weights, canonical_path
from ..adapters.peft_adapters import tuner_layers
from ..configs.errors import UserError


class Fused:
    """What was fused into some models, and what it takes to undo that."""

    def __init__(self, models: Mapping[str, nn.Module], names: Sequence[str], base_weights: Base | None = None):
        self.adapter_names, self._base = list(names), base_weights
        self.carried = {part: active.adapter_names(model) for part, model in models.items()}
        """Component -> all adapters that it carried."""
        self._wrappers: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, what was there
        self._kept: dict[Key, tuple[Any, Tensor | None]] = {}  # the layer of the base, and its weight of before
        changes = {part: _changes(part, model) for part, model in models.items()}
        for part, model in models.items():
            self._fuse(part, model, changes[part])

    @torch.no_grad()
    def _fuse(self, part: str, model: nn.Module, changes: Mapping[Key, Sequence[tuple[Weights, float]]]) -> None:
        for path, layer in _outermost(model).items():
            base, key = layer.get_base_layer(), (part, canonical_path(part, path))
            if key in changes:
                weight = base.weight.data
                self._kept[key] = (base, None if self._base else weight)
                base.weight.data = merged(weight, changes[key], f"{part} {path}").to(weight.device)
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            self._wrappers.append((parent, name, layer))
            setattr(parent, name, base)

    @torch.no_grad()
    def undo(self) -> None:
        """Puts the weights and the layers that carry the adapters back."""
        for key, (base, kept) in self._kept.items():
            if kept is None:
                assert self._base is not None
                kept = self._base(key).to(base.weight.device, base.weight.dtype)
            base.weight.data = kept
        for parent, name, layer in self._wrappers:
            setattr(parent, name, layer)


def _changes(part: str, model: nn.Module) -> dict[Key, list[tuple[Weights, float]]]:
    """Module -> the changes of all active adapters. UserError for a rotation that does not stand alone."""
    changes: dict[Key, list[tuple[Weights, float]]] = defaultdict(list)
    for name in active.active_names(model):
        for key, change in active.changes(part, model, name).items():
            changes[key].append(change)
    for key, several in changes.items():
        if len(several) > 1 and any(weights.method == "oft" for weights, _ in several):
            raise UserError(
                f"{' '.join(key)} is turned by an OFT adapter and changed by another: fuse one of them only"
            )
    return changes


def _outermost(model: nn.Module) -> dict[str, Any]:
    """Path -> the layer that stands there; adapters of two methods are layers around each other."""
    found: dict[str, Any] = {}
    for path, layer in tuner_layers(model):
        found.setdefault(path, layer)
    return found
