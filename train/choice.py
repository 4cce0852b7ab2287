"""Which images a preview shows: evenly over buckets and sources, and class images only if they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..configs.data_sections import PriorSource
from ..data.dataset import Dataset

ON_A_SHEET = 48  # images

Place = tuple[int, int]  # source, item


@dataclass(frozen=True, slots=True)
class Planned:
    """Class images of one prompt that are not made yet."""

    prompt: str
    count: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What is shown of one bucket."""

    images: int  # that could be shown
    page: list[Place]
    sheet: list[Place]
    planned: list[Planned]


def choose(dataset: Dataset, num_images: int) -> list[Choice]:
    """For each bucket: `num_images` on all pages together, and the first images on its sheet."""
    made = [_made(dataset, source) for source in range(len(dataset.images))]
    groups = [
        [np.flatnonzero((ids == bucket) & there) for ids, there in zip(dataset.item_buckets, made, strict=True)]
        for bucket in range(len(dataset.buckets))
    ]
    shares = iter(fair_shares([len(items) for sources in groups for items in sources], num_images))
    choices = []
    for bucket, sources in enumerate(groups):
        on_sheet = fair_shares([len(items) for items in sources], ON_A_SHEET)
        choices.append(
            Choice(
                images=sum(map(len, sources)),
                page=_places([evenly(items.tolist(), next(shares)) for items in sources]),
                sheet=_places([items[:count].tolist() for items, count in zip(sources, on_sheet, strict=True)]),
                planned=_planned(dataset, bucket, made),
            )
        )
    return choices


def fair_shares(sizes: Sequence[int], total: int) -> list[int]:
    """How many to take of each group, `total` in all where there are as many: alike, and small groups whole."""
    taken = [0] * len(sizes)
    while left := min(total, sum(sizes)) - sum(taken):
        room = [group for group, size in enumerate(sizes) if taken[group] < size]
        for group in evenly(room, min(left, len(room))):
            taken[group] += 1
    return taken


def evenly(items: Sequence[int], count: int) -> list[int]:
    """So many of the items, from the middles of equally long stretches."""
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]


def _made(dataset: Dataset, source: int) -> np.ndarray:
    """(m,) whether the image of each item is there."""
    images, rows = dataset.images[source], dataset.item_images[source]
    if not isinstance(images.section, PriorSource):
        return np.ones(len(rows), dtype=bool)
    files = [images.source.path(int(images.kept[row])) for row in rows]
    return np.array([file is not None and file.is_file() for file in files])


def _places(items: Sequence[Sequence[int]]) -> list[Place]:
    return [(source, item) for source, chosen in enumerate(items) for item in chosen]


def _planned(dataset: Dataset, bucket: int, made: Sequence[np.ndarray]) -> list[Planned]:
    missing = [int(((ids == bucket) & ~there).sum()) for ids, there in zip(dataset.item_buckets, made, strict=True)]
    return [
        Planned(images.section.prior, count)
        for images, count in zip(dataset.images, missing, strict=True)
        if count and isinstance(images.section, PriorSource)
    ]
