"""What an adapter method has to offer, and what it leaves behind: a set of trainable weights inside frozen parts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..configs.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..configs.schema import AdapterSection
    from .artifact import AdapterArtifact, Key, Tensors

Targets = Mapping[str, Sequence[str]]
"""Part -> names of the modules to adapt."""


class AdapterMethod(Protocol):
    """One file in `methods/`."""

    Options: "type[BaseModel]"
    """Its options, a section of the config."""
    FORMATS: Sequence[str]
    """What it is written as unless the config says something else."""
    SELECTION: str | None
    """What it trains of the denoiser unless `adapter.parts` says something else; None: it trains no layers."""
    CHANGES_BASE: bool
    """Whether it trains the base's own weights: `all` of a part can be selected, and a pipeline folder is written."""
    # KIND: str, where what it leaves are the weights of another method, such as `lora`, whose files can hold them

    def inject(self, parts: Mapping[str, Any], section: "AdapterSection", targets: Targets, seed: int) -> "AdapterSet":
        """Puts trainable weights into `parts`; the same seed gives the same weights."""
        ...

    def delta(self, tensors: "Tensors", scale: float, base: Tensor | None) -> Tensor:
        """Change of a base weight (out, in) or (out, in, k, k), in the same shape or flattened to (out, in * k * k)."""
        ...

    def size(self, tensors: "Tensors") -> tuple[int | None, int] | None:
        """Outputs (None: not told), and inputs times the kernel's pixels, of the weight that changes.

        None where a tensor is missing, is not one of the method's, or does not fit the others.
        """
        ...


class AdapterSet(Protocol):
    """Trainable weights in the parts that carry them."""

    @property
    def carriers(self) -> dict[str, nn.Module]:
        """Part -> the module that carries some of them."""
        ...

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters of each part, in the order of its modules."""
        ...

    def named_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """The same by their names."""
        ...

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The trained weights of each part, for a checkpoint; nothing of the frozen base."""
        ...

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Puts the weights of `states()[part]` back; every name must fit."""
        ...

    @property
    def can_disable(self) -> bool:
        """Whether the base without the adapter is at hand."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base as it is without the adapter, within. UserError where it is not at hand."""
        ...

    def begin_with(self, artifact: "AdapterArtifact") -> None:
        """Puts the weights of a trained adapter in place; UserError where they do not fit these modules and ranks."""
        ...

    def modules(self) -> "list[Key]":
        """The modules of the base that change."""
        ...

    def artifact(self) -> "AdapterArtifact | None":
        """What was trained beside the base, as copies in float32 on the CPU; None where there is nothing beside it."""
        ...


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator, from which PEFT initialises, with this seed inside and untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_state(part: str, state: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """UserError where the tensors of a saved state are not exactly those held, by name and shape."""
    shapes, expected = ({name: tensor.shape for name, tensor in each.items()} for each in (state, held))
    if odd := sorted({name for name, _ in shapes.items() ^ expected.items()}):
        raise UserError(f"adapter state of {part}: {len(odd)} tensors do not fit this adapter, first {odd[0]!r}")
