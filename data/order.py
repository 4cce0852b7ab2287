"""Which sample stands at which position of the endless sequence: a pure function of (seed, sizes, shares)."""

from collections.abc import Sequence

import torch

from .draws import keyed_generator


class Order:
    """Sources interleaved by their shares; each source goes through its own shuffled epochs.

    With shares of 0.5 and 0.5 any even number of neighbours holds as many samples of one source as of the
    other. Epoch e of source s is the permutation with the key (seed, "order/<s>", e).
    """

    def __init__(self, seed: int, sizes: Sequence[int], shares: Sequence[float] | None = None):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every source needs at least one sample, the sizes are {list(sizes)}")
        self.seed, self.sizes = seed, list(sizes)
        self.shares = list(shares) if shares is not None else [size / sum(sizes) for size in sizes]
        self._taken = [0] * len(self.sizes)
        self._epochs: list[list[int]] = [[] for _ in self.sizes]  # of each source, the one that it is in
        self._sequence: list[tuple[int, int]] = []

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, index within the source) at a position, counted from 0."""
        while len(self._sequence) <= position:
            self._sequence.append(self._next())
        return self._sequence[position]

    def _next(self) -> tuple[int, int]:
        length = len(self._sequence) + 1
        lacking = [share * length - taken for share, taken in zip(self.shares, self._taken, strict=True)]
        source = lacking.index(max(lacking))
        epoch, place = divmod(self._taken[source], self.sizes[source])
        self._taken[source] += 1
        if place == 0:
            self._epochs[source] = self._permutation(source, epoch)
        return source, self._epochs[source][place]

    def _permutation(self, source: int, epoch: int) -> list[int]:
        generator = keyed_generator(self.seed, f"order/{source}", epoch)
        return torch.randperm(self.sizes[source], generator=generator).tolist()


def micro_batch_positions(step: int, index: int, rank: int, world: int, batch_size: int, micro_batch: int) -> range:
    """Positions of one forward pass: the micro-batches of a step are dealt to the processes in turn.

    `index` counts the micro-batches of this process within the step. One process with two micro-batches
    therefore sees what two processes with one each see.
    """
    first = step * batch_size + (index * world + rank) * micro_batch
    return range(first, first + micro_batch)
