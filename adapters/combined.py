"""Several adapter sets that train together, such as a LoRA and new words (pivotal tuning)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .adapter import AdapterSet
from .artifact import AdapterArtifact, Key


@dataclass(frozen=True, slots=True)
class Combined:
    """An `AdapterSet` of others, whose parameters and states have names of their own."""

    sets: Sequence[AdapterSet]

    @property
    def carriers(self) -> dict[str, nn.Module]:
        return {part: module for each in self.sets for part, module in each.carriers.items()}

    @property
    def can_disable(self) -> bool:
        return all(each.can_disable for each in self.sets)

    def named_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        return {part: named for each in self.sets for part, named in each.named_parameters().items()}

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {part: found for each in self.sets for part, found in each.parameters().items()}

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {part: state for each in self.sets for part, state in each.states().items()}

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        next(each for each in self.sets if part in each.states()).load(part, state)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for each in self.sets:
                stack.enter_context(each.disabled())
            yield

    def begin_with(self, artifact: AdapterArtifact) -> None:
        for each in self.sets:
            each.begin_with(artifact)

    def modules(self) -> list[Key]:
        return [key for each in self.sets for key in each.modules()]

    def artifact(self) -> AdapterArtifact | None:
        found = [artifact for each in self.sets if (artifact := each.artifact()) is not None]
        if not found:
            return None
        modules = {key: weights for artifact in found for key, weights in artifact.modules.items()}
        embeddings = {part: tokens for artifact in found for part, tokens in artifact.embeddings.items()}
        return replace(found[0], modules=modules, embeddings=embeddings)
