"""LoRA: h = W x + (alpha / r) B A x   (Hu et al. 2021, equation 3), and its variants as options."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ...configs.errors import UserError
from ...configs.schema import AdapterSection
from ...configs.section import Section

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from ..adapter import Targets
    from ..artifact import Tensors, Weights
    from ..peft_adapters import PeftAdapters

FORMATS = ("diffusers", "kohya")
SELECTION = "attention"
CHANGES_BASE = False


class Options(Section):
    """Options of LoRA."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of A during training."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA, Liu et al. 2024)."""
    rslora: bool = False
    """Scale alpha / sqrt(r) instead of alpha / r (rsLoRA, Kalajdzievski 2023)."""
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    """Start of A: noise, with B zero; or both from the largest singular values of W (PiSSA, Meng et al. 2024)."""

    @model_validator(mode="after")
    def _check_init(self) -> "Options":
        if self.dora and self.init == "pissa":
            raise ValueError("`dora` and `init: pissa` both take W apart, and no file holds what comes of it: give one")
        return self


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> "PeftAdapters":
    """Training begins at the base: B A is zero at first, or was taken out of W."""
    from peft import LoraConfig

    from ..peft_adapters import NAME, inject_peft, peft_options, read_peft

    options = Options.model_validate(section.options)
    if options.init == "pissa":
        _check_linear(parts, targets)
    configs = {
        part: LoraConfig(
            lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT's annotation says int, any number works
            lora_dropout=options.dropout,
            use_dora=options.dora,
            use_rslora=options.rslora,
            init_lora_weights=True if options.init == "kaiming" else options.init,
            **own,
        )
        for part, own in peft_options(section, targets).items()
    }
    adapters = inject_peft("lora", parts, configs, targets, seed)
    if options.init != "pissa":
        return adapters
    initial = {k: w for part, module in adapters.carriers.items() for k, w in read_peft(part, module, NAME).items()}
    return replace(adapters, initial=initial)


def _check_linear(parts: Mapping[str, Any], targets: "Targets") -> None:
    """UserError that names convolutions: PEFT's PiSSA takes matrices apart."""
    for part, names in targets.items():
        if kernels := [name for name in names if parts[part].get_submodule(name).weight.ndim > 2]:
            raise UserError(
                f"adapter.parts.{part}: {kernels[0]} is a convolution (one of {len(kernels)}), and `init: pissa` takes "
                "linear layers apart only: leave convolutions out, or take another init"
            )


def delta(tensors: "Tensors", scale: float, base: "Tensor | None") -> "Tensor":
    """scale * up @ down; with a magnitude m, m * V / |V| - W for V = W + scale * up @ down, by outputs or by inputs."""
    down, up = tensors["down"], tensors["up"]
    change = (scale * (up.double().flatten(1) @ down.double().flatten(1))).reshape(-1, *down.shape[1:])
    over_inputs = "input_magnitude" in tensors
    if not over_inputs and "magnitude" not in tensors:
        return change.float()
    assert base is not None, "the change of DoRA depends on the base"
    moved = base.double() + change
    lengths = (moved.transpose(0, 1) if over_inputs else moved).flatten(1).norm(dim=1)
    magnitude = tensors["input_magnitude" if over_inputs else "magnitude"].double().flatten()
    factors = (magnitude / lengths).reshape(*((1, -1) if over_inputs else (-1, 1)), *[1] * (moved.ndim - 2))
    return (factors * moved - base.double()).float()


def size(tensors: "Tensors") -> tuple[int | None, int] | None:
    """See `AdapterMethod`."""
    beside = tensors.keys() - {"down", "up"}
    if len(beside) != len(tensors) - 2 or beside not in (set(), {"magnitude"}, {"input_magnitude"}):
        return None
    down, up = tensors["down"], tensors["up"]
    if (down.ndim, up.ndim) not in ((2, 2), (4, 4)) or not up.shape[1] == down.shape[0] > 0:
        return None
    sides = {"magnitude": up.shape[0], "input_magnitude": down.shape[1]}
    if up.shape[2:].numel() != 1 or any(tensors[name].numel() != sides[name] for name in beside):
        return None
    return up.shape[0], down.shape[1:].numel()


def without(trained: "Weights", initial: "Weights") -> "Weights":
    """The difference of two LoRAs as one of twice the rank, (B, -B0) (A; A0), by factors of the difference's own size:
    those of PiSSA are large, and half precision would round them by more than they have moved."""
    import torch

    from ..algebra import balanced
    from ..artifact import Weights

    assert trained.scale == initial.scale
    down = torch.cat([trained.tensors["down"], initial.tensors["down"]], 0)
    up = torch.cat([trained.tensors["up"], -initial.tensors["up"]], 1)
    return balanced(Weights("lora", {"down": down, "up": up}, trained.scale))


def read(layer: Any, name: str) -> "Weights":
    """From a layer of PEFT."""
    from ..artifact import Weights, copied
    from ..weighed_dora import is_over_inputs, own_scale

    if layer.lora_B[name].bias is not None:
        raise UserError("a LoRA with a bias of its own cannot be exported: no file format holds it")
    tensors = {"down": copied(layer.lora_A[name].weight), "up": copied(layer.lora_B[name].weight)}
    if name in layer.lora_magnitude_vector:
        kind = "input_magnitude" if is_over_inputs(layer, name) else "magnitude"
        tensors[kind] = copied(layer.lora_magnitude_vector[name].weight).flatten()
    return Weights("lora", tensors, own_scale(layer, name))


def write(layer: Any, name: str, weights: "Weights") -> None:
    """Into a layer of PEFT that `config_of` has made."""
    layer.lora_A[name].weight.data.copy_(weights.tensors["down"])
    layer.lora_B[name].weight.data.copy_(weights.tensors["up"])
    if "magnitude" in weights.tensors:
        vector = layer.lora_magnitude_vector[name].weight
        vector.data.copy_(weights.tensors["magnitude"].reshape(vector.shape))
    elif "input_magnitude" in weights.tensors:
        vector = layer.lora_magnitude_vector[name].weight
        vector.data = weights.tensors["input_magnitude"].to(vector)


def config_of(weights: "Mapping[str, Weights]") -> "LoraConfig":
    """PEFT's config for trained weights, by module names."""
    from peft import LoraConfig

    from ..artifact import rank_and_alpha

    dora = {each.is_dora for each in weights.values()}
    assert len(dora) == 1, "a config of PEFT is for modules that all have a magnitude, or none"
    common = rank_and_alpha(weights)
    alpha = common.pop("alpha")
    return LoraConfig(lora_alpha=alpha, use_dora=dora.pop(), init_lora_weights=False, **common)
