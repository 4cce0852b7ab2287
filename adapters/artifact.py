"""A trained adapter in memory: which modules of the base it changes, and by how much. No files and no family here.

For each adapted module there are the tensors of its method, and a scale; the method knows the change that they make of
the weight. For a LoRA h = W x + scale * up (down x), so delta = scale * up @ down.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configs.choices import did_you_mean, find
from ..configs.errors import UserError
from .sharded import whole

Key = tuple[str, str]
"""(pipeline component, canonical module path), such as ("unet", "down_blocks.0.attentions.0.proj_in")."""

Tensors = dict[str, Tensor]

Base = Callable[[Key], Tensor]
"""Gives the base weight of a module."""

FOLDED = ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""Tensors that a change is linear in, one for each method."""

MAGNITUDES = ("magnitude", "input_magnitude")
"""Of DoRA: a length for each output of the weight, or for each input."""
DORA_OVER_INPUTS = "dora over inputs"
"""The kind of the second."""
DORA_IN_TEXT = "dora in a text encoder"
"""What a format holds or not beside the kinds of modules."""

_INSIDE = frozenset({"base_layer", "lora_A", "lora_B", "oft_R"})
_BLOCK = re.compile(r"(?:text_model\.)?(?:encoder\.)?((?:down_blocks|up_blocks|layers)\.\d+|\w+)")
_CLIP_CHILDREN = ("embeddings.", "encoder.layers.", "final_layer_norm")


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What was trained for one module. A plain LoRA has `down` (r, in) or (r, in, k, k) and `up` (out, r[, 1, 1]).

    DoRA also has `magnitude` (out,), or `input_magnitude` (in,).
    """

    method: str  # a file name in `methods/`
    tensors: Tensors  # under the method's own names
    scale: float = 1.0  # factor on the change of the weight: alpha / r, or alpha / sqrt(r)

    @property
    def kind(self) -> str:
        """The method, or "dora" for a LoRA with a magnitude: what a file format holds or does not."""
        if "input_magnitude" in self.tensors:
            return DORA_OVER_INPUTS
        return "dora" if "magnitude" in self.tensors else self.method

    @property
    def is_dora(self) -> bool:
        """Over its outputs or its inputs."""
        return self.kind in ("dora", DORA_OVER_INPUTS)

    @property
    def depends_on_base(self) -> bool:
        """Whether its change depends on the weight that it changes."""
        return self.is_dora or self.method == "oft"

    @property
    def rank(self) -> int:
        """Of a LoRA."""
        return self.tensors["down"].shape[0]

    def delta(self, base: Tensor | None = None) -> Tensor:
        """Change of the base weight, float32, computed in float64; some methods need that weight."""
        return find("adapters.methods", self.method).delta(self.tensors, self.scale, base)

    def folded(self) -> "Weights":
        """The same change with `scale` multiplied into one of the tensors; exact when it is a power of two."""
        if self.scale == 1.0:
            return self
        name = next(name for name in FOLDED if name in self.tensors)
        return Weights(self.method, self.tensors | {name: (self.tensors[name].double() * self.scale).float()})

    def padded(self, rank: int) -> "Weights":
        """Of a LoRA the same change at a larger rank: zero rows in `down`, zero columns in `up`."""
        down, up, missing = self.tensors["down"], self.tensors["up"], rank - self.rank
        if not missing:
            return self
        rows = down.new_zeros(missing, *down.shape[1:])
        columns = up.new_zeros(up.shape[0], missing, *up.shape[2:])
        filled = {"down": torch.cat([down, rows], 0), "up": torch.cat([up, columns], 1)}
        return replace(self, tensors=self.tensors | filled)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the weight that it changes: (out, in) or (out, in, k, k); None where that is not told by two tensors."""
        if self.method != "lora":
            return None
        return (self.tensors["up"].shape[0], *self.tensors["down"].shape[1:])

    @property
    def size(self) -> "tuple[int | None, int] | None":
        """Of the flattened weight that it changes (out, in * k * k); None for tensors that do not fit each other."""
        return find("adapters.methods", self.method).size(self.tensors)

    def agree(self) -> bool:
        """Whether there is every tensor of the method, and no other, in shapes that multiply."""
        return self.size is not None

    def finite(self) -> bool:
        return math.isfinite(self.scale) and all(map(_finite, self.tensors.values()))

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether its numbers are finite in a type too; lengths of DoRA stay in float32."""
        return all(_finite(t, None if name in MAGNITUDES else dtype) for name, t in self.tensors.items())

    def cast(self, dtype: torch.dtype) -> "Weights":
        """Tensors as `dtype`, contiguous on the CPU."""
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.tensors.items()}
        return Weights(self.method, tensors, self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterArtifact:
    """The whole trained adapter. Every writer starts from one and every reader ends in one.

    Raises UserError when it has no modules, or names those whose factors do not fit or hold NaN or Inf.
    """

    modules: dict[Key, Weights]
    metadata: dict[str, str] = field(default_factory=dict)
    """Header entries that travel with the weights into every file, such as `modelspec.title`."""
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Text encoder -> new word -> (vectors, width)."""

    def __post_init__(self) -> None:
        if not self.modules and not self.embeddings:
            raise UserError("the adapter has no modules")
        if broken := dict.fromkeys(token for token, rows in self._words() if not rows.isfinite().all()):
            raise UserError(f"the vectors of its words hold NaN or Inf: {', '.join(map(repr, broken))}")
        if misfits := [key for key, weights in self.modules.items() if not weights.agree()]:
            first = self.modules[misfits[0]].tensors
            shapes = " and ".join(f"{name} {tuple(first[name].shape)}" for name in sorted(first))
            raise UserError(f"{' and '.join(sorted(first))} do not fit in {listed(misfits)}; the first has {shapes}")
        if broken := [key for key, weights in self.modules.items() if not weights.finite()]:
            raise UserError(f"{len(broken)} of {len(self.modules)} modules hold NaN or Inf: {listed(broken)}")

    @property
    def method(self) -> str:
        """Of all modules, or "mixed"."""
        methods = {weights.method for weights in self.modules.values()}
        return methods.pop() if len(methods) == 1 else "mixed" if methods else "textual_inversion"

    def _words(self) -> Iterable[tuple[str, Tensor]]:
        return (pair for tokens in self.embeddings.values() for pair in tokens.items())

    def folded(self) -> "AdapterArtifact":
        """The same adapter with every scale multiplied into `up`."""
        return replace(self, modules={key: weights.folded() for key, weights in self.modules.items()})

    def check_fits(self, dtype: torch.dtype) -> None:
        """UserError that names the modules whose values are too large for a type, or are no numbers."""
        overflown = [key for key, weights in self.modules.items() if not weights.fits(dtype)]
        if overflown and (broken := [key for key in overflown if not self.modules[key].finite()]):
            raise UserError(f"{len(broken)} of {len(self.modules)} modules hold NaN or Inf: {listed(broken)}")
        for part, words in self.embeddings.items():
            if large := [word for word, rows in words.items() if not _finite(rows, dtype)]:
                raise UserError(f"values too large for {dtype} in the word {large[0]!r} of {part}; write fp32 or bf16")
        if overflown:
            raise UserError(f"values too large for {dtype} in {listed(overflown)}; write fp32 or bf16 instead")

    def cast(self, dtype: torch.dtype) -> "AdapterArtifact":
        """Factors as `dtype`, contiguous on the CPU; UserError names the modules whose values are too large for it."""
        self.check_fits(dtype)
        modules = {key: weights.cast(dtype) for key, weights in self.modules.items()}
        embeddings = {part: {t: rows.to(dtype) for t, rows in own.items()} for part, own in self.embeddings.items()}
        return replace(self, modules=modules, embeddings=embeddings)


def block_of(key: Key) -> str:
    """Where a module is: `down_blocks.1`, `mid_block`, `layers.3` of a text encoder, `conv_in`."""
    found = _BLOCK.match(key[1])
    return found[1] if found else key[1]


def listed(keys: Iterable[Key], most: int = 5) -> str:
    """The first few modules in words: "unet a.b, unet c.d and 12 more"."""
    words = [" ".join(key) for key in keys]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def largest_difference(a: AdapterArtifact, b: AdapterArtifact, base: Base | None = None) -> tuple[float, Key]:
    """The largest |delta_a - delta_b| over all weights of all modules, and the module that has it.

    `base` gives the weight of a module to the methods whose change depends on it.

    Raises UserError when the adapters change different modules, or differ in the shape of one.
    """
    problems = [
        f"{len(missing)} modules are missing from the {name} adapter: {listed(sorted(missing))}"
        for name, missing in (("second", a.modules.keys() - b.modules.keys()), ("first", b.modules.keys() - a.modules))
        if missing
    ]
    if problems:
        raise UserError(problems)
    words = [_word_difference(part, a.embeddings, b.embeddings) for part in a.embeddings.keys() | b.embeddings.keys()]
    return max([*((_difference(key, a.modules[key], b.modules[key], base), key) for key in a.modules), *words])


def _word_difference(
    part: str, a: Mapping[str, Mapping[str, Tensor]], b: Mapping[str, Mapping[str, Tensor]]
) -> tuple[float, Key]:
    one, other = a.get(part, {}), b.get(part, {})
    if odd := sorted(one.keys() ^ other.keys()):
        raise UserError(f"the word {odd[0]!r} of {part} is in one adapter only")
    differences = {token: (one[token].float() - other[token].float()).abs().max().item() for token in one}
    worst = max(differences, key=lambda token: differences[token])
    return differences[worst], (part, worst)


def _difference(key: Key, a: Weights, b: Weights, base: Base | None) -> float:
    weight = base(key) if base is not None else None
    delta_a, delta_b = (weights.delta(weight).flatten(1) for weights in (a, b))
    if delta_a.shape != delta_b.shape:
        raise UserError(
            f"{' '.join(key)} is {tuple(delta_a.shape)} in one adapter, {tuple(delta_b.shape)} in the other"
        )
    return _as_number((delta_a - delta_b).abs().max().item())


def _as_number(difference: float) -> float:
    """Infinity for a NaN, which the largest of several numbers would pass over."""
    return math.inf if math.isnan(difference) else difference


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


def base_modules(component: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical path -> shape of the weight, of all linear layers and convolutions; adapters in them do not count."""
    bases: list[tuple[str, Any]] = [
        (name, innermost(module))
        for name, module in model.named_modules()
        if _is_base(module) and not _is_inside_adapter(name)
    ]
    return {canonical_path(component, name): tuple(module.weight.shape) for name, module in bases}


def base_weights(parts: Mapping[str, Any]) -> Base:
    """Looks up the weights of a base's modules, whether or not they carry adapters."""

    models = {component: part for component, part in parts.items() if isinstance(part, nn.Module)}
    has = {component: {name for name, _ in model.named_modules()} for component, model in models.items()}

    def weight(key: Key) -> Tensor:
        component, path = key
        module = parts[component].get_submodule(module_path(component, path, has[component]))
        return innermost(module).weight.detach().float().cpu()

    return weight


def _is_base(module: nn.Module) -> bool:
    return isinstance(innermost(module), nn.Linear | nn.Conv2d)


def innermost(module: Any) -> Any:
    """The base's own layer, below the adapters around it."""
    while (below := getattr(module, "base_layer", None)) is not None:
        module = below
    return module


def _is_inside_adapter(name: str) -> bool:
    return any(part in _INSIDE for part in name.split("."))


def _finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Also in that type. In one pass: what is not a number goes through minimum and maximum."""
    return tensor.numel() == 0 or all(math.isfinite(end.to(dtype or end.dtype).item()) for end in tensor.aminmax())


def copied(tensor: Tensor) -> Tensor:
    """In float32, in memory of its own."""
    return whole(tensor.detach()).to("cpu", torch.float32, copy=True)


def rank_and_alpha(weights: Mapping[str, Weights]) -> dict[str, Any]:
    """Arguments of PEFT's LoRA config that give each module, by its name, the rank and the scale that it has."""
    ranks = {name: each.rank for name, each in weights.items()}
    alphas = {name: each.scale * each.rank for name, each in weights.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank,
        "alpha": alpha,
        "target_modules": list(weights),
        "rank_pattern": {re.escape(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(name): each for name, each in alphas.items() if each != alpha},
    }
