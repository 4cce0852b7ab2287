"""An average of the trained weights over the steps, which is less noisy than the last of them.

s <- d s + (1 - d) w after step n, with d = min(decay, (1 + n) / (10 + n)), so that the start is forgotten.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..adapters.sharded import is_sharded, spread_as
from ..configs.errors import UserError

Named = Mapping[str, Mapping[str, nn.Parameter]]
"""Part -> name -> parameter."""


class Ema:
    """The averages of all trained weights, by part and name."""

    def __init__(self, parameters: Named, decay: float):
        self.decay = decay
        self.averages = {
            part: {name: parameter.detach().clone() for name, parameter in named.items()}
            for part, named in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Named, step: int) -> None:
        """After optimiser step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for part, averages in self.averages.items():
            for name, average in averages.items():
                average.lerp_(parameters[part][name].detach(), 1 - decay)

    @contextmanager
    def swapped(self, parameters: Named) -> Iterator[None]:
        """The averages in the place of the weights, within."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    def _swap(self, parameters: Named) -> None:
        for part, averages in self.averages.items():
            for name, average in averages.items():
                parameter = parameters[part][name]
                if is_sharded(parameter):  # FSDP2 keeps views of its memory
                    weights = parameter.detach().clone()
                    parameter.data.copy_(average)
                    average.copy_(weights)
                else:
                    parameter.data, averages[name] = average, parameter.data

    def load(self, part: str, state: Mapping[str, Tensor]) -> None:
        """Puts averages back."""
        if odd := sorted(state.keys() ^ self.averages[part].keys()):
            raise UserError(f"averages of {part}: {len(odd)} tensors do not fit this adapter, first {odd[0]!r}")
        for name, average in self.averages[part].items():
            average.copy_(spread_as(state[name], average))
