"""The loss on images that are not trained on, with the same noise at the same timesteps each time.

It is the mean over images and K timesteps, spread evenly over those that are trained, of the squared error. The noise
is keyed by image and timestep, crops are in the middle, and nothing is dropped: two values of a run, or of two runs
with the same images, differ by the weights alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.draws import Draws
from ..data.transforms import to_tensor
from ..models.encode import draw_latents, encode_image
from ..models.family import Conditioning, ModelFamily, Parts
from .objective import size_conditions

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..data.sample import Sample
    from ..models.noise.process import NoiseProcess
    from .run import Run

SEED = 0  # of the noise: the same in every run


@dataclass(frozen=True, slots=True)
class HeldOutImage:
    """One image, encoded."""

    source: str
    sample: "Sample"
    latents: Tensor  # (C, h, w), the mean


@dataclass(frozen=True, slots=True)
class HeldOut:
    """All of them, with the noise that they get."""

    images: Sequence[HeldOutImage]
    noise: "NoiseProcess"
    timesteps: int  # how many
    at_once: int  # forward passes of so many samples

    @torch.no_grad()
    def losses(self, run: "Run") -> dict[str, float]:
        """Mean of each source, and of all images as "".

        With several processes each takes as many images; what is left over is looked at twice and counted once.
        """
        rank, world, count = run.accelerator.process_index, run.accelerator.num_processes, len(self.images)
        with run.exported(), run.accelerator.autocast():
            mine = [(k, self._loss(run, k % count)) for k in range(rank, -(-count // world) * world, world)]
        if world > 1:
            from accelerate.utils import gather_object

            mine = gather_object(mine)
        by_source: dict[str, list[float]] = defaultdict(list)
        for number, loss in sorted(mine)[:count]:  # in one order: the sum is the same on any number of processes
            by_source[self.images[number].source].append(loss)
        everything = [loss for losses in by_source.values() for loss in losses]
        return {source: sum(losses) / len(losses) for source, losses in ({"": everything} | by_source).items()}

    def _loss(self, run: "Run", number: int) -> float:
        """Mean over the timesteps for one image."""
        image, device = self.images[number], run.accelerator.device
        parts = run.parts | run.adapters.carriers  # not wrapped: nothing waits for others
        grid = self.noise.grid(self.timesteps).to(device)
        draws = Draws(SEED, range(number * len(grid), (number + 1) * len(grid)))
        noise = draws.normal("held out", image.latents.shape).to(device)
        embeddings = run.encode([image.sample.caption]).row(0)
        errors: list[float] = []
        for first in range(0, len(grid), self.at_once):
            timesteps = grid[first : first + self.at_once]
            count = len(timesteps)
            latents = image.latents.to(device).expand(count, *image.latents.shape)
            noised = self.noise.noised(latents, noise[first : first + count], timesteps)
            geometry = size_conditions([image.sample] * count).to(device)
            predicted = run.family.predict(parts, noised, Conditioning.stack([embeddings] * count, device), geometry)
            errors += (predicted.float() - noised.target.float()).square().mean((1, 2, 3)).tolist()
        return sum(errors) / len(errors)


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
