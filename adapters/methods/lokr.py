"""LoKr: dW = (alpha / r) W1 (x) W2, the Kronecker product   (Edalati et al. 2022; Yeh et al. 2024, section 3.2)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import AdapterSection
from ...configs.section import Section
from ..factors import product_size

if TYPE_CHECKING:
    from peft import LoKrConfig
    from torch import Tensor

    from ..adapter import Targets
    from ..artifact import Tensors, Weights
    from ..peft_adapters import PeftAdapters

FORMATS = ("kohya",)
SELECTION = "attention"
CHANGES_BASE = False


class Options(Section):
    """Options of LoKr."""

    factor: int = Field(default=-1, ge=-1, le=16_384)
    """Sides of W1 (as far as it divides the layer's); -1 for a W1 about as large as W2."""
    decompose_both: bool = False
    """Whether W1 is a product of two factors of the rank too, not W2 alone."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an output of a module's change during training."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of leaving out a module's change during training."""


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> "PeftAdapters":
    """W1 is zero at first, so that training begins at the base."""
    from peft import LoKrConfig

    from ..peft_adapters import inject_peft, peft_options

    options = Options.model_validate(section.options).model_dump()
    options["decompose_factor"] = options.pop("factor")
    configs = {
        part: LoKrConfig(alpha=section.alpha, **options, **own)  # type: ignore[arg-type]  # any number works
        for part, own in peft_options(section, targets).items()
    }
    return inject_peft("lokr", parts, configs, targets, seed)


def delta(tensors: "Tensors", scale: float, base: "Tensor | None") -> "Tensor":
    """scale * w1 (x) w2, (out, in * k * k); each is whole, or a product a @ b, or a^T t b with a core t."""
    import torch

    one, two = _factor(tensors, 1), _factor(tensors, 2)
    if base is not None and base.ndim == 4 and two.ndim == 2:
        two = two.reshape(two.shape[0], -1, *base.shape[2:])  # flattened over the kernel
    one = one.reshape(*one.shape, *[1] * (two.ndim - 2))
    return (scale * torch.kron(one, two.contiguous())).flatten(1).float()


def size(tensors: "Tensors") -> tuple[int | None, int] | None:
    """See `AdapterMethod`."""
    one, two = _size(tensors, 1), _size(tensors, 2)
    if one is None or two is None or not all(name.startswith("lokr_") for name in tensors):
        return None
    return one[0] * two[0], one[1] * two[1]


def _size(tensors: "Tensors", number: int) -> tuple[int, int] | None:
    """Of a factor, whole or a product; the second one may have a kernel."""
    start = f"lokr_w{number}"
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
    core = tensors.get("lokr_t2") if number == 2 else None
    if own.keys() == {f"{start}_a", f"{start}_b"}:
        return product_size(own[f"{start}_a"], own[f"{start}_b"], core)
    if own.keys() != {start} or core is not None:
        return None
    whole = own[start]
    if 0 in whole.shape or (whole.ndim != 2 and (whole.ndim, number) != (4, 2)):
        return None
    return whole.shape[0], whole.shape[1:].numel()


def _factor(tensors: "Tensors", number: int) -> "Tensor":
    import torch

    if (whole := tensors.get(f"lokr_w{number}")) is not None:
        return whole.double()
    a, b = (tensors[f"lokr_w{number}_{side}"].double() for side in "ab")
    core = tensors.get("lokr_t2") if number == 2 else None
    return a @ b if core is None else torch.einsum("ijkl,ip,jr->prkl", core.double(), a, b)


def read(layer: Any, name: str) -> "Weights":
    """From a layer of PEFT."""
    from ..peft_adapters import read_parameters

    return read_parameters("lokr", layer, name)


def write(layer: Any, name: str, weights: "Weights") -> None:
    """Into a layer of PEFT that `config_of` has made."""
    from ..peft_adapters import write_parameters

    write_parameters(layer, name, weights)


def config_of(weights: "Mapping[str, Weights]") -> "LoKrConfig":
    """PEFT's config for trained weights, by module names; `write` brings ranks and shapes."""
    from peft import LoKrConfig

    return LoKrConfig(r=1, alpha=1, init_weights=False, target_modules=list(weights))
