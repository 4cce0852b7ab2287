"""From positions to batches: reading and collating."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from .order import Order, micro_batch_positions
from .sample import Batch, Sample
from .transforms import load_pixels


class Samples(Dataset):
    """The endless sequence of samples; an item is asked for by its position."""

    def __init__(self, sources: Sequence[Sequence[Sample]], order: Order, resolution: int):
        self.sources, self.order, self.resolution = sources, order, resolution

    def __getitem__(self, position: int) -> tuple[int, Sample, torch.Tensor]:
        source, index = self.order[position]
        sample = self.sources[source][index]
        return position, sample, load_pixels(sample.image, self.resolution)


def collate(items: Sequence[tuple[int, Sample, torch.Tensor]]) -> Batch:
    """A Batch from the items of one micro-batch."""
    positions, samples, pixels = zip(*items, strict=True)
    return Batch(
        pixels=torch.stack(pixels),
        captions=[sample.caption for sample in samples],
        loss_weights=torch.tensor([sample.loss_weight for sample in samples]),
        positions=list(positions),
        sources=[sample.source for sample in samples],
        files=[sample.image for sample in samples],
    )


def micro_batches(
    samples: Samples, *, first_step: int, steps: int, batch_size: int, micro_batch: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The micro-batches of one process from `first_step` to `steps`, in order."""
    per_step = batch_size // (micro_batch * world)
    positions = [
        list(micro_batch_positions(step, index, rank, world, batch_size, micro_batch))
        for step in range(first_step, steps)
        for index in range(per_step)
    ]
    return iter(DataLoader(samples, batch_sampler=positions, collate_fn=collate))
