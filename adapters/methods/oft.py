"""OFT: W' = W R^T with an orthogonal R of blocks, R = (I - Q)(I + Q)^-1, Q = -Q^T   (Qiu et al. 2023, section 3)."""

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...configs.errors import UserError
from ...configs.schema import AdapterSection
from ...configs.section import Section

if TYPE_CHECKING:
    from peft import OFTConfig
    from torch import Tensor

    from ..adapter import Targets
    from ..artifact import Tensors, Weights
    from ..peft_adapters import PeftAdapters

FORMATS = ("loraloom",)
SELECTION = "attention"
CHANGES_BASE = False


class Options(Section):
    """Options of OFT, which has neither rank nor alpha."""

    block_size: int = Field(default=32, ge=2, le=16_384)
    """Inputs that are rotated together; it must divide those of every adapted layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Part of the blocks that are left as they are in a step of training."""


def inject(parts: Mapping[str, Any], section: AdapterSection, targets: "Targets", seed: int) -> "PeftAdapters":
    """Q is zero at first, so that training begins at the base. UserError for layers that cannot be rotated."""
    from peft import OFTConfig

    from ..peft_adapters import inject_peft

    options = Options.model_validate(section.options)
    if section.rank_pattern or section.alpha_pattern:
        raise UserError("adapter.rank_pattern, adapter.alpha_pattern: OFT has neither rank nor alpha")
    _check(parts, targets, options.block_size)
    configs = {
        part: OFTConfig(
            oft_block_size=options.block_size,
            module_dropout=options.dropout,
            use_cayley_neumann=False,  # the series is not quite orthogonal, and no two tools stop at the same term
            target_modules=list(names),
        )
        for part, names in targets.items()
    }
    return inject_peft("oft", parts, configs, targets, seed)


def _check(parts: Mapping[str, Any], targets: "Targets", block_size: int) -> None:
    problems = []
    for part, names in targets.items():
        layers = dict(parts[part].named_modules())
        for name in names:
            weight = layers[name].weight
            if weight.ndim == 4:
                problems.append(f"adapter.parts.{part}: {name} is a convolution, and OFT rotates linear layers only")
            elif weight.shape[1] % block_size:
                inputs = f"{name} has {weight.shape[1]} inputs"
                problems.append(f"adapter.options.block_size: {part}.{inputs}, no multiple of {block_size}")
    if problems:
        raise UserError(problems[:10])


def delta(tensors: "Tensors", scale: float, base: "Tensor | None") -> "Tensor":
    """W R^T - W, with the upper triangles of the blocks of Q in `oft_R` (blocks, b (b - 1) / 2)."""
    import torch

    assert base is not None, "the change of OFT depends on the base"
    values = tensors["oft_R"].double()
    size = _block_size(values)
    rows, columns = torch.triu_indices(size, size, 1)
    skew = values.new_zeros(len(values), size, size)
    skew[:, rows, columns] = values
    skew = skew - skew.transpose(1, 2)
    identity = torch.eye(size, dtype=skew.dtype)
    rotations = torch.linalg.solve(identity + skew, identity - skew, left=False)
    weight = base.double().flatten(1)
    turned = torch.einsum("ork,rck->orc", weight.unflatten(1, (-1, size)), rotations).flatten(1)
    return (turned - weight).float()


def size(tensors: "Tensors") -> tuple[int | None, int] | None:
    """See `AdapterMethod`. A rotation of the inputs knows nothing of the outputs."""
    if tensors.keys() != {"oft_R"} or (values := tensors["oft_R"]).ndim != 2 or not values.numel():
        return None
    block = _block_size(values)
    return (None, len(values) * block) if block * (block - 1) // 2 == values.shape[1] else None


def _block_size(values: "Tensor") -> int:
    """b of b (b - 1) / 2 values."""
    return (1 + isqrt(1 + 8 * values.shape[1])) // 2


def read(layer: Any, name: str) -> "Weights":
    """From a layer of PEFT."""
    from ..artifact import Weights, copied

    return Weights("oft", {"oft_R": copied(layer.oft_R[name].weight)})


def write(layer: Any, name: str, weights: "Weights") -> None:
    """Into a layer of PEFT that `config_of` has made."""
    layer.oft_R[name].weight.data.copy_(weights.tensors["oft_R"])
    layer.scaling = {}  # PEFT asks for it when adapters are switched, and OFT has none


def config_of(weights: "Mapping[str, Weights]") -> "OFTConfig":
    """PEFT's config for trained weights, by module names."""
    from peft import OFTConfig

    sizes = {_block_size(each.tensors["oft_R"]) for each in weights.values()}
    if len(sizes) > 1:
        raise UserError(f"an OFT adapter with blocks of several sizes ({sorted(sizes)}) cannot be loaded")
    return OFTConfig(oft_block_size=sizes.pop(), use_cayley_neumann=False, target_modules=list(weights))
