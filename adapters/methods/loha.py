"""LoHa: dW = (alpha / r) (B1 A1) * (B2 A2), the product by elements   (Hyeon-Woo et al. 2022, proposition 1)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.schema import AdapterSection
from ...configs.section import Section
from ..factors import product_size

if TYPE_CHECKING:
    from peft import LoHaConfig
    from torch import Tensor

    from ..adapter import Targets
    from ..artifact import Tensors, Weights
    from ..peft_adapters import PeftAdapters

FORMATS = ("kohya",)
SELECTION = "attention"
CHANGES_BASE = False


class Options(Section):
    """Options of LoHa."""

    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an output of a module's change during training."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of leaving out a module's change during training."""


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> "PeftAdapters":
    """One of the four factors is zero at first, so that training begins at the base."""
    from peft import LoHaConfig

    from ..peft_adapters import inject_peft, peft_options

    options = Options.model_validate(section.options).model_dump()
    configs = {
        part: LoHaConfig(alpha=section.alpha, **options, **own)  # type: ignore[arg-type]  # any number works
        for part, own in peft_options(section, targets).items()
    }
    return inject_peft("loha", parts, configs, targets, seed)


def delta(tensors: "Tensors", scale: float, base: "Tensor | None") -> "Tensor":
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), (out, in * k * k); with a core t, w = a^T t b over its two ranks."""
    one, two = (_product(tensors, number) for number in (1, 2))
    return (scale * one * two).flatten(1).float()


def size(tensors: "Tensors") -> tuple[int | None, int] | None:
    """See `AdapterMethod`. Both products have one size: nothing is repeated to fit."""
    factors = {f"hada_w{number}_{side}" for number in "12" for side in "ab"}
    if tensors.keys() not in (factors, factors | {"hada_t1", "hada_t2"}):
        return None
    one, two = (
        product_size(tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"], tensors.get(f"hada_t{number}"))
        for number in (1, 2)
    )
    return one if one == two else None


def _product(tensors: "Tensors", number: int) -> "Tensor":
    import torch

    a, b = (tensors[f"hada_w{number}_{side}"].double() for side in "ab")
    if (core := tensors.get(f"hada_t{number}")) is None:
        return a @ b
    return torch.einsum("ijkl,jr,ip->prkl", core.double(), b, a)


def read(layer: Any, name: str) -> "Weights":
    """From a layer of PEFT."""
    from ..peft_adapters import read_parameters

    return read_parameters("loha", layer, name)


def write(layer: Any, name: str, weights: "Weights") -> None:
    """Into a layer of PEFT that `config_of` has made."""
    from ..peft_adapters import write_parameters

    write_parameters(layer, name, weights)


def config_of(weights: "Mapping[str, Weights]") -> "LoHaConfig":
    """PEFT's config for trained weights, by module names; `write` brings the ranks."""
    from peft import LoHaConfig

    return LoHaConfig(r=1, alpha=1, init_weights=False, target_modules=list(weights))
