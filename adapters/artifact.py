"""A trained LoRA in memory: which modules of the base it changes, and by how much. No files and no model family here.

For each adapted module `h = W x + scale * up (down x)`; the change of the weight is `delta = scale * up @ down`.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..configs.choices import did_you_mean
from ..configs.errors import UserError

Key = tuple[str, str]
"""(pipeline component, canonical module path), such as ("unet", "down_blocks.0.attentions.0.proj_in")."""

_CLIP_CHILDREN = ("embeddings.", "encoder.layers.", "final_layer_norm")


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """The two factors of one module's change."""

    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    scale: float  # alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Change of the base weight, (out, in) or (out, in, k, k), float32, computed in float64."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (self.scale * product).float().reshape(-1, *self.down.shape[1:])

    def folded(self) -> "LoraWeights":
        """The same change with `scale` multiplied into `up`; exact when the scale is a power of two."""
        if self.scale == 1.0:
            return self
        return LoraWeights(self.down, (self.up.double() * self.scale).float(), 1.0)

    def agree(self) -> bool:
        """Whether the two factors have shapes that multiply."""
        shapes = (self.down.ndim, self.up.ndim) in ((2, 2), (4, 4)) and self.up.shape[1] == self.rank > 0
        return shapes and self.up.shape[2:].numel() == 1

    def finite(self) -> bool:
        tensors_finite = torch.isfinite(self.down).all() and torch.isfinite(self.up).all()
        return bool(tensors_finite) and math.isfinite(self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterArtifact:
    """The whole trained adapter. Every writer starts from one and every reader ends in one.

    Raises UserError when it has no modules, or names those whose factors do not fit or hold NaN or Inf.
    """

    modules: dict[Key, LoraWeights]
    method: str = "lora"
    metadata: dict[str, str] = field(default_factory=dict)
    """Header entries that travel with the weights into every file, such as `modelspec.title`."""

    def __post_init__(self) -> None:
        if not self.modules:
            raise UserError("the adapter has no modules")
        if misfits := [key for key, weights in self.modules.items() if not weights.agree()]:
            down, up = (tuple(tensor.shape) for tensor in (self.modules[misfits[0]].down, self.modules[misfits[0]].up))
            raise UserError(f"down and up do not fit in {listed(misfits)}; the first has shapes {down} and {up}")
        if broken := [key for key, weights in self.modules.items() if not weights.finite()]:
            raise UserError(f"{len(broken)} of {len(self.modules)} modules hold NaN or Inf: {listed(broken)}")

    def folded(self) -> "AdapterArtifact":
        """The same adapter with every scale multiplied into `up`."""
        return replace(self, modules={key: weights.folded() for key, weights in self.modules.items()})

    def cast(self, dtype: torch.dtype) -> "AdapterArtifact":
        """Factors as `dtype`, contiguous on the CPU; UserError names the modules whose values are too large for it."""
        modules = {key: _cast(weights, dtype) for key, weights in self.modules.items()}
        overflown = [key for key in modules if self.modules[key].finite() and not modules[key].finite()]
        if overflown:
            raise UserError(f"values too large for {dtype} in {listed(overflown)}; write fp32 or bf16 instead")
        return replace(self, modules=modules)


def _cast(weights: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    down, up = (tensor.detach().to("cpu", dtype).contiguous() for tensor in (weights.down, weights.up))
    return LoraWeights(down, up, weights.scale)


def listed(keys: Iterable[Key], most: int = 5) -> str:
    """The first few modules in words: "unet a.b, unet c.d and 12 more"."""
    words = [" ".join(key) for key in keys]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def largest_difference(a: AdapterArtifact, b: AdapterArtifact) -> tuple[float, Key]:
    """The largest |delta_a - delta_b| over all weights of all modules, and the module that has it.

    Raises UserError when the adapters change different modules, or differ in the shape of one.
    """
    problems = [
        f"{len(missing)} modules are missing from the {name} adapter: {listed(sorted(missing))}"
        for name, missing in (("second", a.modules.keys() - b.modules.keys()), ("first", b.modules.keys() - a.modules))
        if missing
    ]
    if problems:
        raise UserError(problems)
    return max((_difference(key, a.modules[key], b.modules[key]), key) for key in a.modules)


def _difference(key: Key, a: LoraWeights, b: LoraWeights) -> float:
    delta_a, delta_b = a.delta(), b.delta()
    if delta_a.shape != delta_b.shape:
        raise UserError(
            f"{' '.join(key)} is {tuple(delta_a.shape)} in one adapter, {tuple(delta_b.shape)} in the other"
        )
    return (delta_a - delta_b).abs().max().item()


def canonical_path(component: str, module_path: str) -> str:
    """A module's path as files spell it: a CLIP text encoder's begins with `text_model.`.

    transformers 5.6 took that level out of CLIPTextModel, and no other tool knows the flat names. Paths that are
    canonical already, and those of other models (T5 has `encoder.block`), come back as they are.
    """
    is_flat_clip = component.startswith("text_encoder") and module_path.startswith(_CLIP_CHILDREN)
    return f"text_model.{module_path}" if is_flat_clip else module_path


def module_path(component: str, canonical: str, model_has: Collection[str]) -> str:
    """The path in a real model, whose module names are `model_has`, of a module with this canonical path.

    Raises UserError with the nearest name when the model has it neither with nor without `text_model.`.
    """
    for path in (canonical, canonical.removeprefix("text_model.")):
        if path in model_has and canonical_path(component, path) == canonical:
            return path
    raise UserError(f"{component} has no module {canonical}{did_you_mean(canonical, model_has)}")


def base_modules(component: str, model: nn.Module) -> frozenset[str]:
    """Canonical paths of all linear and convolution layers of a model, whether or not it carries adapters."""
    bases = {name for name, module in model.named_modules() if _is_base(module) and not _is_inside_adapter(name)}
    return frozenset(canonical_path(component, name) for name in bases)


def _is_base(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv2d)


def _is_inside_adapter(name: str) -> bool:
    return any(part in ("base_layer", "lora_A", "lora_B") for part in name.split("."))


def from_peft(component: str, model: nn.Module, adapter_name: str) -> dict[Key, LoraWeights]:
    """What PEFT trained under `adapter_name` in this component: detached float32 copies on the CPU.

    Raises UserError when there is no such adapter, or when it is more than a plain LoRA (DoRA, a bias).
    """
    layers = {name: module for name, module in model.named_modules() if adapter_name in getattr(module, "lora_A", {})}
    if not layers:
        raise UserError(f"{component} carries no LoRA named {adapter_name!r}")
    if special := [(component, name) for name, layer in layers.items() if _is_more_than_lora(layer, adapter_name)]:
        raise UserError(f"only plain LoRA can be exported; DoRA or a LoRA bias is in {listed(special)}")
    return {(component, canonical_path(component, name)): _weights(layers[name], adapter_name) for name in layers}


def _is_more_than_lora(layer: nn.Module, adapter_name: str) -> bool:
    has_magnitude = adapter_name in getattr(layer, "lora_magnitude_vector", {})
    return has_magnitude or _factor(layer, "lora_B", adapter_name).bias is not None


def _weights(layer: nn.Module, adapter_name: str) -> LoraWeights:
    down, up = (_factor(layer, name, adapter_name).weight.detach() for name in ("lora_A", "lora_B"))
    scale = float(getattr(layer, "scaling")[adapter_name])  # noqa: B009 - a plain attribute is a Tensor to pyright
    return LoraWeights(_copied(down), _copied(up), scale)


def _factor(layer: nn.Module, name: str, adapter_name: str) -> nn.Linear | nn.Conv2d:
    return getattr(layer, name)[adapter_name]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32, copy=True)
