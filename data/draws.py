"""Every random number of a sample, keyed by (seed, purpose, position): nothing to save, any step can be replayed.

Counter-based randomness as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"),
with a hash of the key as the seed of torch's own generator, or of a `Stream` where there is no torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


def key_seed(seed: int, purpose: str, position: int = 0) -> int:
    """A 63-bit seed from the key. torch's CPU generator takes its lower 32 bits alone: of 200,000 positions some few
    pairs share their noise, at positions that nothing connects."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, position: int = 0) -> "torch.Generator":
    """A CPU generator for this key: the same numbers whatever device the model is on. One of 2^32 sequences."""
    import torch

    return torch.Generator().manual_seed(key_seed(seed, purpose, position))


class Stream:
    """Numbers in a row for one key, without torch: number i is the hash of (key, i), the same on every machine."""

    def __init__(self, seed: int, purpose: str, position: int = 0):
        self.seed, self.purpose, self.position = seed, purpose, position
        self._key = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode()).digest()
        self._taken = 0

    def fork(self, name: str) -> "Stream":
        """The stream of a purpose within this one; whatever either of them has given, the other gives the same."""
        return Stream(self.seed, f"{self.purpose}/{name}", self.position)

    def uniform(self) -> float:
        """A number in [0, 1), a multiple of 2^-53."""
        return (self._word() >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        """A whole number in [0, n), each as likely as another up to n / 2^64."""
        assert n > 0, n
        return self._word() * n >> 64

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in another order (Fisher-Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def _word(self) -> int:
        """64 bits."""
        digest = hashlib.blake2b(self._taken.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
        self._taken += 1
        return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one batch: row i belongs to the sample at `positions[i]`, whoever its neighbours are."""

    seed: int
    positions: Sequence[int]

    def normal(self, purpose: str, shape: Sequence[int]) -> "Tensor":
        """(B, *shape) of standard normal numbers, fp32 on the CPU."""
        import torch

        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self._generators(purpose)])

    def integers(self, purpose: str, low: int, high: int) -> "Tensor":
        """(B,) of whole numbers in [low, high)."""
        import torch

        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._generators(purpose)])

    def uniform(self, purpose: str) -> "Tensor":
        """(B,) of numbers in [0, 1)."""
        import torch

        return torch.cat([torch.rand(1, generator=generator) for generator in self._generators(purpose)])

    def _generators(self, purpose: str) -> list["torch.Generator"]:
        return [keyed_generator(self.seed, purpose, position) for position in self.positions]
