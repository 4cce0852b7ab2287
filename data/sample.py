"""The nouns that the data floor hands on: one training sample, and a batch of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its caption."""

    image: Path
    caption: str
    loss_weight: float
    source: str  # name of the source, under which its losses are logged


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one forward pass."""

    pixels: "Tensor"  # (B, 3, H, W) in [-1, 1]
    captions: list[str]
    loss_weights: "Tensor"  # (B,)
    positions: list[int]  # place of each sample in the endless sequence of the run; the key of its random numbers
    sources: list[str]
    files: list[Path]
