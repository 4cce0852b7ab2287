"""Adapters that PEFT injects: what LoRA, LoHa, LoKr and OFT have in common."""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..configs.choices import find
from ..configs.errors import UserError
from ..configs.machine import memory
from ..configs.schema import AdapterSection
from .adapter import Targets, check_state, seeded
from .artifact import DORA_OVER_INPUTS, AdapterArtifact, Key, Weights, canonical_path, copied, listed, module_path
from .sharded import spread_as
from .targets import by_pattern

if TYPE_CHECKING:
    from peft import PeftConfig

_WRAPPED = re.compile(r"(\.base_layer)+$")

_FACTORS = {"lora": 1, "loha": 2}
"""Pairs of factors of a module, of the methods whose size goes with the rank."""
NAME = "default"
"""Of the adapter that trains, in PEFT."""


@dataclass(frozen=True, slots=True)
class PeftAdapters:
    """An `AdapterSet` of tuner layers."""

    method: str  # file name in `methods/`
    carriers: dict[str, nn.Module]
    initial: dict[Key, Weights] = field(
        default_factory=dict
    )  # what was taken out of the base at the start, if anything

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {part: [*named.values()] for part, named in self.named_parameters().items()}

    def named_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        return {
            part: {name: p for name, p in module.named_parameters() if p.requires_grad and f".{NAME}" in name}
            for part, module in self.carriers.items()
        }

    def states(self) -> dict[str, dict[str, Tensor]]:
        from peft import get_peft_model_state_dict

        return {part: get_peft_model_state_dict(module, adapter_name=NAME) for part, module in self.carriers.items()}

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        held = self.states()[part]
        check_state(part, state, held)
        placed = {name: spread_as(tensor, held[name]) for name, tensor in state.items()}
        set_peft_model_state_dict(self.carriers[part], placed, adapter_name=NAME)

    @property
    def can_disable(self) -> bool:
        return not self.initial

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if not self.can_disable:
            raise UserError(f"{self.method} has changed the base in memory, so that the base alone is not at hand")
        layers = [layer for carrier in self.carriers.values() for _, layer in tuner_layers(carrier)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True  # `enable_adapters` would also change what requires a gradient
        try:
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer._disable_adapters = was

    def begin_with(self, artifact: AdapterArtifact) -> None:
        if self.initial:
            raise UserError("an adapter that begins with the base's singular values cannot begin with a file")
        layers = {
            (part, canonical_path(part, path)): layer
            for part, carrier in self.carriers.items()
            for path, layer in tuner_layers(carrier)
        }
        if strangers := artifact.modules.keys() - layers.keys():
            raise UserError(f"its modules {listed(sorted(strangers))} are not adapted here; see adapter.parts")
        for key, trained in artifact.modules.items():
            _begin_layer(key, layers[key], trained)

    def modules(self) -> list[Key]:
        return [
            (part, canonical_path(part, path))
            for part, carrier in self.carriers.items()
            for path, layer in tuner_layers(carrier)
            if NAME in carried(layer)
        ]

    def artifact(self) -> AdapterArtifact:
        modules = {k: w for part, carrier in self.carriers.items() for k, w in read_peft(part, carrier, NAME).items()}
        method = find("adapters.methods", self.method)
        return AdapterArtifact(
            {key: method.without(w, self.initial[key]) if key in self.initial else w for key, w in modules.items()}
        )


def _begin_layer(key: Key, layer: Any, trained: Weights) -> None:
    """The layer keeps its own scale, so that of the weights is folded in."""
    method = find("adapters.methods", _kind(layer))
    own = method.read(layer, NAME)
    shapes, wanted = ({n: tuple(t.shape) for n, t in each.tensors.items()} for each in (trained, own))
    if trained.method != own.method or shapes != wanted:
        raise UserError(
            f"{listed([key])} is {trained.method} with {shapes} in the file, {own.method} with {wanted} here: "
            "take the same method, options and ranks"
        )
    tensors = Weights(trained.method, trained.tensors, trained.scale / own.scale).folded().tensors
    device = layer.get_base_layer().weight.device
    method.write(layer, NAME, Weights(own.method, {n: t.to(device) for n, t in tensors.items()}, own.scale))


def inject_peft(
    method: str, parts: Mapping[str, Any], configs: "Mapping[str, PeftConfig]", targets: Targets, seed: int
) -> PeftAdapters:
    """Injects one PEFT config into each part. Adapter weights are fp32; the base below them is frozen."""
    from peft import inject_adapter_in_model

    if method in _FACTORS:
        _check_room(_FACTORS[method] * sum(_numbers(parts[part], config) for part, config in configs.items()))
    for number, part in enumerate(sorted(configs)):
        with seeded(seed + number):
            inject_adapter_in_model(configs[part], parts[part], adapter_name=NAME)
        injected = {name for name, _ in tuner_layers(parts[part])}
        assert injected == set(targets[part]), f"PEFT adapts other modules of {part}: {injected ^ set(targets[part])}"
        for parameter in parts[part].parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return PeftAdapters(method, {part: parts[part] for part in configs})


def _numbers(model: nn.Module, config: Any) -> int:
    """Of one pair of factors for each module: r (in * k * k + out)."""
    modules: dict[str, Any] = {name: model.get_submodule(name).weight for name in config.target_modules}
    ranks = {name: config.rank_pattern.get(re.escape(name), config.r) for name in modules}
    return sum(ranks[name] * (weight.shape[0] + weight[0].numel()) for name, weight in modules.items())


def _check_room(numbers: int) -> None:
    """UserError for more numbers than this machine has memory for, before the system ends the process."""
    needed, there = 4 * numbers, memory()
    if there and needed > there:
        raise UserError(
            f"adapter.rank: the weights of this adapter would take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{there / 2**30:,.0f}: give a smaller rank, or fewer parts"
        )


def peft_options(section: AdapterSection, targets: Targets) -> dict[str, dict[str, Any]]:
    """Arguments of PEFT's configs for each part: the modules, and the ranks and alphas that differ."""
    ranks = by_pattern("adapter.rank_pattern", targets, section.rank_pattern)
    alphas = by_pattern("adapter.alpha_pattern", targets, section.alpha_pattern)
    return {
        part: {
            "r": section.rank,
            "target_modules": list(names),
            # PEFT looks for these as regular expressions at the end of the module's name
            "rank_pattern": {re.escape(name): rank for name, rank in ranks[part].items()},
            "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas[part].items()},
        }
        for part, names in targets.items()
    }


def install(artifact: AdapterArtifact, parts: Mapping[str, Any], name: str, *, exact: bool = False) -> None:
    """Puts a trained adapter into the parts of a base under a name of PEFT's.

    Its weights get the type of the layers around them, or stay in float32, as they trained, where they are to be
    `exact`, and where they are DoRA: a length in half precision is off by more than it has moved.
    """
    from peft import inject_adapter_in_model

    from .weighed_dora import weigh

    for part in sorted({part for part, _ in artifact.modules}):
        model = parts[part]
        has = {path for path, _ in model.named_modules()}
        own = {module_path(part, path, has): w for (owner, path), w in artifact.modules.items() if owner == part}
        own = {path: w.folded() if w.is_dora and not w.scale else w for path, w in own.items()}
        for (method, _), several in _by_config(own).items():
            _tell_groups(model)
            with warnings.catch_warnings():  # of several adapters in one model, which is what they are for
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                inject_adapter_in_model(find("adapters.methods", method).config_of(several), model, adapter_name=name)
        for path, layer in tuner_layers(model):
            if path in own and name in carried(layer):
                if exact or own[path].is_dora:
                    _widen(layer, name)
                weigh(layer, name, over_inputs=own[path].kind == DORA_OVER_INPUTS)
                find("adapters.methods", own[path].method).write(layer, name, own[path])
        model._hf_peft_config_loaded = True  # diffusers and transformers ask for it before they switch adapters


def _tell_groups(model: nn.Module) -> None:
    """LoRA around a convolution asks what is there for it; PEFT's LoHa and LoKr around one do not answer."""
    for _, layer in tuner_layers(model):
        if isinstance(base := layer.get_base_layer(), nn.Conv2d) and not hasattr(layer, "groups"):
            layer.groups = base.groups


def _widen(layer: Any, name: str) -> None:
    """The weights of an adapter in float32."""
    for weight in own_weights(layer, name):
        weight.data = weight.data.float()


def own_weights(layer: Any, name: str) -> Iterator[Tensor]:
    """Those of one adapter in a layer, as they are."""
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, {})
        if name in held:  # a layer of its own, or a parameter
            yield from held[name].parameters() if isinstance(held[name], nn.Module) else [held[name]]


def read_peft(part: str, model: nn.Module, name: str) -> dict[Key, Weights]:
    """What PEFT holds under a name in this part: detached float32 copies on the CPU.

    UserError when there is no such adapter.
    """
    found = {}
    for path, layer in tuner_layers(model):
        if name in carried(layer):
            found[part, canonical_path(part, path)] = read_layer(layer, name)
    if not found:
        raise UserError(f"{part} carries no adapter named {name!r}")
    return found


def read_layer(layer: Any, name: str) -> Weights:
    """The same of one layer, whatever its method."""
    return find("adapters.methods", _kind(layer)).read(layer, name)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules of a model that carry an adapter, with the names that the base's modules have.

    Adapters of two methods in one module are two layers with one name, one around the other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return ((_WRAPPED.sub("", name), module) for name, module in found)


def without_adapters(model: nn.Module) -> nn.Module:
    """A model like this one without any adapter, on the same weights: what is done to one's weights is done to both."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for name, layer in [*tuner_layers(twin)]:
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer.get_base_layer())
    for trace in ("peft_config", "_hf_peft_config_loaded", "forward", "_original_forward"):  # PEFT's and accelerate's
        vars(twin).pop(trace, None)
    return twin


def carried(layer: Any) -> set[str]:
    """The names of the adapters in a layer."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}


def _kind(layer: Any) -> str:
    """The method of a tuner layer, which may be a subclass of ours; PEFT has a module for each."""
    own = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("peft.tuners."))
    return own.__module__.split(".")[2]


def _by_config(weights: Mapping[str, Weights]) -> dict[tuple[str, bool], dict[str, Weights]]:
    """The modules that one config of PEFT is for: of one method, with DoRA or without."""
    found: dict[tuple[str, bool], dict[str, Weights]] = {}
    for path, each in weights.items():
        found.setdefault((each.method, each.is_dora), {})[path] = each
    return found


def read_parameters(method: str, layer: Any, name: str) -> Weights:
    """Of a layer whose weights are plain parameters under the names of files."""
    tensors = {
        kind: copied(getattr(layer, kind)[name]) for kind in layer.adapter_layer_names if name in getattr(layer, kind)
    }
    return Weights(method, tensors, float(layer.scaling[name]))


def write_parameters(layer: Any, name: str, weights: Weights) -> None:
    """Puts weights of any rank and shape into such a layer."""
    device = layer.get_base_layer().weight.device
    for kind in layer.adapter_layer_names:
        held, wanted = getattr(layer, kind), weights.tensors.get(kind)
        if wanted is not None and name in held and held[name].shape == wanted.shape:
            held[name].data.copy_(wanted)  # it may be one that trains
            continue
        if name in held:
            del held[name]
        if wanted is not None:
            held[name] = nn.Parameter(wanted.to(device), requires_grad=False)
    if layer.scaling[name] == weights.scale:
        return
    layer.r[name], layer.alpha[name], layer.scaling[name] = 1, weights.scale, weights.scale
