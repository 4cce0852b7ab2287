"""Weights of the base that train themselves: nothing stands beside the base, so nothing can be switched off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..configs.errors import UserError
from .adapter import check_state
from .artifact import AdapterArtifact, Key, canonical_path
from .sharded import spread_as


@dataclass(frozen=True, slots=True)
class TrainedBase:
    """An `AdapterSet` of parameters that the base has."""

    carriers: dict[str, nn.Module]
    names: dict[str, list[str]]  # part -> the parameters that train

    can_disable = False

    def named_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        return {
            part: {name: self.carriers[part].get_parameter(name) for name in names}
            for part, names in self.names.items()
        }

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {part: [*named.values()] for part, named in self.named_parameters().items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {part: {n: p.detach() for n, p in named.items()} for part, named in self.named_parameters().items()}

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        named = self.named_parameters()[part]
        check_state(part, state, named)
        for name, parameter in named.items():
            parameter.data.copy_(spread_as(state[name], parameter.data))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        raise UserError("full fine-tuning changes the base in memory, so that the base alone is not at hand")
        yield

    def begin_with(self, artifact: AdapterArtifact) -> None:
        if artifact.modules:
            raise UserError("full fine-tuning begins with the base: give the trained one as model.base")

    def modules(self) -> list[Key]:
        owners = {(part, name.rpartition(".")[0]): None for part, names in self.names.items() for name in names}
        return [(part, canonical_path(part, path)) for part, path in owners]

    def artifact(self) -> None:
        return None
