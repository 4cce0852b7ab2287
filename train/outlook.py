"""What a run will take from its data, counted ahead by the same functions that the run uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..configs.data_sections import PriorSource
from ..configs.imports import importing
from ..configs.schema import RunConfig
from ..data.dataset import Dataset, Images
from ..data.sources.prior import PriorImages
from ..models.base import find_base
from .gather import Say, class_images, make_dataset, warn
from .prior import class_image_paths

if TYPE_CHECKING:
    from ..models.load import Base

WORST = 10  # images that are named
MISSED = 0.1  # of a share: as much more or less is worth a word
UNKNOWN_MULTIPLE = 8  # of a base that is not here yet: buckets are shown as for the common families


@dataclass(frozen=True, slots=True)
class SourceOutlook:
    """One source in the run."""

    name: str
    kind: str
    images: int
    counts: dict[str, int]  # where captions come from, what was ignored
    samples: int  # of the whole run
    share: float  # of all samples
    asked: float | None  # the share that its section gives, over the steps in which it takes part
    passes: float  # how often each image is seen, on average
    loss_weight: float
    first_step: int
    end_step: int


@dataclass(frozen=True, slots=True)
class BucketOutlook:
    """One bucket in the run."""

    width: int
    height: int
    images: dict[str, int]  # source -> images
    samples: int


@dataclass(frozen=True, slots=True)
class Changed:
    """An image that is cut or enlarged much."""

    image: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    cropped: float  # fraction of its pixels that is cut away
    scale: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """All of it."""

    sources: list[SourceOutlook]
    buckets: list[BucketOutlook]
    steps: int
    samples: int
    steps_per_epoch: float
    most_cropped: list[Changed]
    most_enlarged: list[Changed]


def with_class_images(config: RunConfig, images: Sequence[Images | None], say: Say) -> list[Images]:
    """Class images too: as they are, or as large as they will be where they are not made yet."""
    found: list[Images] = []
    for section, known in zip(config.data.sources, images, strict=True):
        if known is None:
            assert isinstance(section, PriorSource)
            known = _class_images(config, section, say)
        found.append(known)
    return found


def _class_images(config: RunConfig, section: PriorSource, say: Say) -> Images:
    files = class_image_paths(section, config)
    if all(file.is_file() for file in files):
        return class_images(config.data, section, files, say)
    sizes = np.full((section.count, 2), max(config.data.resolutions), dtype=np.int32)
    return Images(section, PriorImages(section, files), np.arange(section.count), sizes, None)


def dataset_ahead(config: RunConfig, images: Sequence[Images | None], say: Say = warn) -> "tuple[Dataset, Base | None]":
    """The dataset that a run would have, and its base unless that is still to be downloaded; no weights are loaded.

    UserError where base, buckets and adapter do not fit together.
    """
    found = with_class_images(config, images, say)
    if find_base(config.model.base, config.model.revision) is None:
        return make_dataset(config.data, found, UNKNOWN_MULTIPLE, config.loop.seed, say), None
    with importing():
        from ..models.load import Base
        from .fits import check_base_fits

    base = Base(config.model)
    check_base_fits(config, base.family)
    return make_dataset(config.data, found, base.family.size_multiple, config.loop.seed, say), base


def look_ahead(config: RunConfig, dataset: Dataset, processes: int = 1) -> Outlook:
    """Counts what the run will do with so many processes."""
    loop = config.loop
    total = loop.steps * loop.batch_size
    order = dataset.order(loop.steps, loop.batch_size, loop.samples_at_once(processes))
    counts = order.counts(total)
    cropped, scale = _changes(dataset)
    images = sum(
        len(items) * found.section.repeats for items, found in zip(dataset.item_images, dataset.images, strict=True)
    )
    return Outlook(
        sources=[_source(config, dataset, number, counts, total) for number in range(len(dataset.images))],
        buckets=_buckets(dataset, counts),
        steps=loop.steps,
        samples=total,
        steps_per_epoch=images / loop.batch_size,
        most_cropped=_worst(dataset, cropped, scale, cropped, above=0.05),
        most_enlarged=_worst(dataset, cropped, scale, scale, above=1.0),
    )


def _source(
    config: RunConfig, dataset: Dataset, number: int, counts: dict[tuple[int, int], int], total: int
) -> SourceOutlook:
    found = dataset.images[number]
    section, samples = found.section, sum(n for (source, _), n in counts.items() if source == number)
    return SourceOutlook(
        name=dataset.names[number],
        kind=type(section).__name__.removesuffix("Source").lower(),
        images=len(found.kept),
        counts=found.source.counts,
        samples=samples,
        share=samples / total,
        asked=_asked(config, number),
        passes=samples / len(found.kept),
        loss_weight=section.loss_weight,
        first_step=section.start_step,
        end_step=min(section.end_step or config.loop.steps, config.loop.steps),
    )


def _asked(config: RunConfig, number: int) -> float | None:
    """The part of all samples that a section's share makes: shares are of the sources that take part at a step."""
    steps, sections = config.loop.steps, config.data.sources
    if sections[number].share is None:
        return None
    spans = [(section.start_step, min(section.end_step or steps, steps)) for section in sections]
    edges, total = sorted({edge for span in spans for edge in span}), 0.0
    for first, until in pairwise(edges):
        there = [begin <= first < end for begin, end in spans]
        if there[number]:
            shares = sum(section.share or 0.0 for section, here in zip(sections, there, strict=True) if here)
            total += (sections[number].share or 0.0) / shares * (until - first) / steps
    return total


def missed_shares(outlook: Outlook) -> list[str]:
    """Sources whose part of the samples is not what was asked for: the run is too short for its buckets."""
    return [
        f"{source.name}: {source.samples:,} of {outlook.samples:,} samples are {source.share:.0%}, its share is "
        f"{source.asked:.0%}; each bucket comes early in a run, and this one has {len(outlook.buckets)} of them in "
        f"{outlook.steps:,} steps: more steps or fewer buckets bring it nearer"
        for source in outlook.sources
        if source.asked is not None and abs(source.share - source.asked) > MISSED * source.asked
    ]


def _buckets(dataset: Dataset, counts: dict[tuple[int, int], int]) -> list[BucketOutlook]:
    outlooks = []
    for bucket, (width, height) in enumerate(dataset.buckets):
        images: dict[str, int] = {}
        for number in range(len(dataset.images)):
            if count := int((dataset.item_buckets[number] == bucket).sum()):
                images[dataset.names[number]] = count
        samples = sum(n for (_, at), n in counts.items() if at == bucket)
        outlooks.append(BucketOutlook(width, height, images, samples))
    return outlooks


def changes(sizes: np.ndarray, buckets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m,) fractions that are cut away and (m,) scales, of images of (m, 2) sizes in buckets of (m, 2) sizes."""
    scale = (buckets / sizes).max(axis=1)
    return 1 - buckets.prod(axis=1) / (sizes * scale[:, None]).prod(axis=1), scale


def _changes(dataset: Dataset) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each item of each source: the fraction that is cut away, and the scale."""
    rows_of = zip(dataset.images, dataset.item_images, dataset.item_sizes, strict=True)
    found = [changes(images.sizes[rows], buckets) for images, rows, buckets in rows_of]
    return [cropped for cropped, _ in found], [scale for _, scale in found]


def _worst(
    dataset: Dataset, cropped: list[np.ndarray], scales: list[np.ndarray], by: list[np.ndarray], above: float
) -> list[Changed]:
    """The items with the largest numbers in `by`."""
    places: list[tuple[float, int, int]] = []
    for number, values in enumerate(by):
        largest = np.argsort(-values, kind="stable")[:WORST]
        places += [(float(values[item]), number, int(item)) for item in largest if values[item] > above]
    return [
        _changed(dataset, number, item, cropped, scales)
        for _, number, item in sorted(places, key=lambda place: (-place[0], place[1:]))[:WORST]
    ]


def _changed(dataset: Dataset, number: int, item: int, cropped: list[np.ndarray], scales: list[np.ndarray]) -> Changed:
    row = int(dataset.item_images[number][item])
    width, height = dataset.images[number].sizes[row].tolist()
    return Changed(
        image=dataset.location(number, row),
        size=(width, height),
        bucket=dataset.buckets[dataset.item_buckets[number][item]],
        cropped=round(float(cropped[number][item]), 4),
        scale=round(float(scales[number][item]), 4),
    )
