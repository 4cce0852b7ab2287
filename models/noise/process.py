"""The contract of a noise process, and the noun that it makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class KeyedDraws(Protocol):
    """Random numbers of one batch, keyed by sample (`data.draws.Draws`)."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor: ...
    def integers(self, purpose: str, low: int, high: int) -> Tensor: ...
    def uniform(self, purpose: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Noised:
    """What the denoiser is given and should answer."""

    latents: Tensor  # (B, C, h, w), noisy
    timesteps: Tensor  # (B,), whole numbers of the training schedule
    target: Tensor  # (B, C, h, w)
    weight: Tensor  # (B,), factor on each sample's loss
    snr: Tensor  # (B,), signal-to-noise ratio


class NoiseProcess(Protocol):
    """From clean latents (B, C, h, w) to a Noised."""

    def sample(self, latents: Tensor, draws: KeyedDraws) -> Noised:
        """As training has it: all random numbers from the draws."""
        ...

    def grid(self, count: int) -> Tensor:
        """(count,) timesteps, spread evenly over those that are trained."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """With a given noise, at given timesteps."""
        ...
