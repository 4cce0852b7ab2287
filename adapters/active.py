"""Which adapters of a model are active and how strongly: the switches of PEFT's layers, whatever their method."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .artifact import Key, Weights, canonical_path
from .peft_adapters import carried, read_layer, tuner_layers
from .weighed_dora import strength, weigh


class Switch(NamedTuple):
    """How a layer is set: what counts in it, whether that is off, and the scale of every adapter."""

    layer: Any
    active: list[str]
    disabled: bool
    scaling: dict[str, float]


def adapter_names(model: nn.Module) -> list[str]:
    """All adapters that some layer of the model carries, in the order in which they came."""
    found = {name for _, layer in tuner_layers(model) for name in carried(layer)}
    return [name for name in getattr(model, "peft_config", found) if name in found]


def active_names(model: nn.Module) -> list[str]:
    """Those of them that count at the moment."""
    layers = [layer for _, layer in tuner_layers(model) if not layer.disable_adapters]
    found = {name for layer in layers for name in layer.active_adapters if name in carried(layer)}
    return [name for name in adapter_names(model) if name in found]


def keys_of(part: str, model: nn.Module, name: str) -> list[Key]:
    """The modules that an adapter changes in this part."""
    return [(part, canonical_path(part, path)) for path, layer in tuner_layers(model) if name in carried(layer)]


def rotated_keys(part: str, model: nn.Module, name: str) -> list[Key]:
    """Those of them that it rotates."""
    layers = [(path, layer) for path, layer in tuner_layers(model) if is_rotation(layer)]
    return [(part, canonical_path(part, path)) for path, layer in layers if name in carried(layer)]


def activate(part: str, model: nn.Module, weights: Mapping[str, Mapping[Key, float]]) -> None:
    """These adapters alone count, each with its weight in every module."""
    for path, layer in tuner_layers(model):
        layer.set_adapter([name for name in weights if name in carried(layer)], inference_mode=True)
        layer._disable_adapters = False
        for name, own in weights.items():
            if name in carried(layer):
                set_scale(layer, name, own[part, canonical_path(part, path)])


def add(part: str, model: nn.Module, name: str, weights: Mapping[Key, float]) -> None:
    """One more counts, beside those that do; what was switched off as a whole is on again."""
    for path, layer in tuner_layers(model):
        layer._disable_adapters = False
        if name in carried(layer):
            before = [each for each in layer.active_adapters if each in carried(layer) and each != name]
            layer.set_adapter([*before, name], inference_mode=True)
            set_scale(layer, name, weights[part, canonical_path(part, path)])


def set_scale(layer: Any, name: str, weight: float) -> None:
    """In place where the scale is a tensor, as it is where adapters are swapped without compiling again."""
    if layer.scaling.get(name) is None or is_rotation(layer):
        return
    weigh(layer, name)  # a DoRA that the pipeline has loaded itself
    held = layer.scaling[name]
    layer.set_scale(name, weight)
    if isinstance(held, torch.Tensor):
        layer.scaling[name] = held.fill_(layer.scaling[name])


def is_rotation(layer: Any) -> bool:
    """Whether its adapters have no weight: a rotation (OFT) is there or not."""
    return type(layer).__module__.startswith("peft.tuners.oft")


def changes(part: str, model: nn.Module, name: str) -> dict[Key, tuple[Weights, float]]:
    """What an adapter changes, and the weight that is not in its scale: that of DoRA."""
    layers = [(path, layer) for path, layer in tuner_layers(model) if name in carried(layer)]
    return {
        (part, canonical_path(part, path)): (read_layer(layer, name), strength(layer, name)) for path, layer in layers
    }


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Whether the active adapters count; which they are, and how strongly, stays."""
    for _, layer in tuner_layers(model):
        layer._disable_adapters = not enabled


@contextmanager
def as_before(models: Collection[nn.Module]) -> Iterator[None]:
    """When the block ends, the adapters that were active before are so again, with their weights."""
    held = switches(models)
    try:
        yield
    finally:
        switch(held)


def switches(models: Collection[nn.Module]) -> list[Switch]:
    """How the layers of some models are set at the moment."""
    layers = [layer for model in models for _, layer in tuner_layers(model)]
    return [Switch(each, list(each.active_adapters), each.disable_adapters, _numbers(each.scaling)) for each in layers]


def switch(held: Collection[Switch]) -> None:
    """Sets layers as they were when `switches` looked at them."""
    for layer, active, disabled, scaling in held:
        layer._active_adapter, layer._disable_adapters = list(active), disabled
        for name, value in scaling.items():
            if isinstance(layer.scaling.get(name), torch.Tensor):
                layer.scaling[name].fill_(value)
            elif name in layer.scaling:
                layer.scaling[name] = value


def _numbers(scaling: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scaling.items() if value is not None}


def remove(model: nn.Module, names: Collection[str]) -> None:
    """Takes adapters out of a model; a layer that carries none any more is the base's own again."""
    held: Any = model
    for path, layer in reversed([*tuner_layers(model)]):
        for name in carried(layer) & set(names):
            layer.delete_adapter(name)
        if not carried(layer):
            unwrap(model, path, layer)
    for name in names:
        held.peft_config.pop(name, None)
    if not held.peft_config:
        del held.peft_config
        held._hf_peft_config_loaded = False


def unwrap(model: nn.Module, path: str, layer: Any) -> None:
    """Puts what a tuner layer wraps into its place; another one may be around it."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    above = getattr(parent, name)
    while above is not layer and getattr(above, "base_layer", None) is not layer:
        above = above.base_layer
    if above is layer:
        setattr(parent, name, layer.base_layer)
    else:
        above.base_layer = layer.base_layer
