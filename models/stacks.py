"""Batches of embeddings that come again and again: one caption for all images."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .family import Conditioning

if TYPE_CHECKING:
    from torch import Tensor

MOST_STACKS = 2
"""Batches of words that are kept: a caption, and that of class images."""


class Stacks:
    """Batches of the tensors of single samples, given again where the rows are the same objects as before."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[Sequence[Any], Conditioning]] = {}  # the rows stay, so their ids hold

    def of(self, rows: "Sequence[Mapping[str, Tensor]]", device: Any) -> Conditioning:
        """As `Conditioning.stack`."""
        key = tuple(map(id, rows))
        if key not in self._known:
            if len(self._known) == MOST_STACKS:
                del self._known[next(iter(self._known))]
            self._known[key] = rows, Conditioning.stack(rows, device)
        return self._known[key][1]
