"""What an adapter method has to offer, and what it leaves behind: a set of trainable weights inside frozen parts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..configs.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from pydantic import BaseModel

    from ..configs.schema import AdapterSection

ADAPTER_NAME = "default"
Targets = Mapping[str, Sequence[str]]  # part -> endings of the names of its modules


class AdapterMethod(Protocol):
    """One file in `methods/`: a class `Options` (pydantic) and a function `inject`."""

    Options: "type[BaseModel]"

    def inject(self, parts: Mapping[str, Any], section: "AdapterSection", targets: Targets, seed: int) -> "AdapterSet":
        """Puts trainable weights into `parts`; the same seed gives the same weights."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The parts that carry an adapter, with their PEFT configs."""

    carriers: dict[str, nn.Module]
    configs: "dict[str, PeftConfig]"

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters of each part, in the order of its modules."""
        return {
            part: [parameter for parameter in module.parameters() if parameter.requires_grad]
            for part, module in self.carriers.items()
        }

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The adapter weights of each part under PEFT's names; nothing of the base."""
        from peft import get_peft_model_state_dict

        return {
            part: get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME) for part, module in self.carriers.items()
        }

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Puts the weights of `states()[part]` back; every name must fit."""
        from peft import set_peft_model_state_dict

        shapes, expected = ({name: t.shape for name, t in s.items()} for s in (state, self.states()[part]))
        if odd := sorted({name for name, _ in shapes.items() ^ expected.items()}):
            raise UserError(f"adapter state of {part}: {len(odd)} tensors do not fit this adapter, first {odd[0]!r}")
        set_peft_model_state_dict(self.carriers[part], dict(state), adapter_name=ADAPTER_NAME)


def inject_peft(
    parts: Mapping[str, Any], configs: "Mapping[str, PeftConfig]", targets: Targets, seeds: Mapping[str, int]
) -> AdapterSet:
    """Injects one PEFT config into each part. Adapter weights are fp32; the base below them is frozen.

    PEFT is silent about one of several targets that matches nothing, so each is looked for here.
    """
    from peft import inject_adapter_in_model

    for part in configs:
        _check_targets(part, parts[part], targets[part])
    for part, config in configs.items():
        with seeded(seeds[part]):
            inject_adapter_in_model(config, parts[part], adapter_name=ADAPTER_NAME)
        for parameter in parts[part].parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return AdapterSet({part: parts[part] for part in configs}, dict(configs))


def _check_targets(part: str, module: nn.Module, endings: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules()]
    for ending in endings:
        if not any(name == ending or name.endswith("." + ending) for name in names):
            raise UserError(f"adapter target {ending!r} matches no module of {part}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator, from which PEFT initialises, with this seed inside and untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
