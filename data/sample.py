"""The nouns that the data floor hands on: one training sample, and a batch of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .transforms import Geometry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """What stands at one position of the run: an image, how it is cut, and its words."""

    position: int  # in the endless sequence of the run; the key of the sample's random numbers
    source: int  # number of the source in the config
    image: int  # number of the image in the source
    geometry: Geometry
    caption: str  # final, after all rules and draws


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one forward pass. Latents and embeddings are None where they are not cached."""

    samples: list[Sample]
    pixels: "Tensor | None"  # (B, 3, H, W) in [-1, 1], where `moments` is None
    moments: "Tensor | None"  # (B, 2, C, h, w) mean and standard deviation, or (B, 1, C, h, w) drawn once
    prompts: "list[dict[str, Tensor]] | None"  # tensors of a Conditioning for each sample
    masks: "Tensor | None"  # (B, 1, height, width) in [0, 1], of the pixels' or the latents' size
    loss_weights: "Tensor"  # (B,)
    keeps_base: list[bool]  # whether what the base says is the target, of each sample
    sources: list[str]  # names under which losses are logged
    files: list[str]  # what messages call the images

    @property
    def positions(self) -> list[int]:
        """Of each sample."""
        return [sample.position for sample in self.samples]

    @property
    def captions(self) -> list[str]:
        """Of each sample."""
        return [sample.caption for sample in self.samples]
