"""Every random number of a sample, keyed by (seed, purpose, position): nothing to save, any step can be replayed.

Counter-based randomness as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"),
with a hash of the key as the seed of torch's own generator.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def key_seed(seed: int, purpose: str, position: int = 0) -> int:
    """A 63-bit seed from the key."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, position: int = 0) -> torch.Generator:
    """A CPU generator for this key: the same numbers whatever device the model is on."""
    return torch.Generator().manual_seed(key_seed(seed, purpose, position))


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one batch: row i belongs to the sample at `positions[i]`, whoever its neighbours are."""

    seed: int
    positions: Sequence[int]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) of standard normal numbers, fp32 on the CPU."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self._generators(purpose)])

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """(B,) of whole numbers in [low, high)."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._generators(purpose)])

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [keyed_generator(self.seed, purpose, position) for position in self.positions]
