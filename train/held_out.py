"""Images that are not trained on, encoded once: crops are in the middle, and nothing is dropped or drawn."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.transforms import to_tensor
from ..models.encode import draw_latents, encode_image
from ..models.family import ModelFamily, Parts

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..data.sample import Sample


@dataclass(frozen=True, slots=True)
class HeldOutImage:
    """One image, encoded."""

    source: str
    sample: "Sample"
    latents: Tensor  # (C, h, w), the mean


def samples_of(dataset: "Dataset") -> list["Sample"]:
    """Each image in each of its buckets once."""
    items = [(source, item) for source, rows in enumerate(dataset.item_images) for item in range(len(rows))]
    return [dataset.sample(position, source, item) for position, (source, item) in enumerate(items)]


def encode_held_out(dataset: "Dataset", family: ModelFamily, parts: Parts) -> list[HeldOutImage]:
    """The images as latents, kept in memory."""
    images = []
    for sample in samples_of(dataset):
        pixels, _ = dataset.pixels(sample.source, sample.image, sample.geometry)
        moments = encode_image(family, parts, to_tensor(pixels))
        mean = draw_latents(moments[None], torch.zeros_like(moments[:1]))[0].cpu()
        images.append(HeldOutImage(dataset.names[sample.source], sample, mean))
    return images
