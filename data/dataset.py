"""All images of a run in their buckets, and the sample at each position: what plan, cache, preview and loader share.

A sample is a pure function of (seed, position): which image, cut where, mirrored or not, with which words. With
`variants: K` its cut and its words are one of K that belong to the image itself, so that they can be computed ahead.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from ..configs.data_sections import DataSection, ImageSection, Source
from ..configs.errors import TrainingError
from ..configs.machine import cache_folder
from ..images.decoding import BadImage, PixelRules, decode, decode_mask
from .buckets import BucketRules, Size, buckets_of, default_step, why_too_long
from .captions import final_caption, is_dropped, is_random
from .draws import Stream
from .findings import doubt, sha256
from .keys import content_key
from .order import Order
from .sample import Sample
from .scan import Scan
from .source import ImageSource, Problems
from .transforms import Geometry, crop, place

CENTER = (0.5, 0.5)
WIDER = 2**31  # than any image
PROFILES = "profiles"
"""In the fingerprint of a source: how many images a colour profile changes; not there where none does."""


@dataclass(frozen=True, slots=True)
class Images:
    """The sound images of one source."""

    section: Source
    source: ImageSource
    kept: np.ndarray  # (n,) numbers of the images in the source
    sizes: np.ndarray  # (n, 2) width and height as shown
    digests: np.ndarray | None  # (n,) SHA-256 of the files in hex; None where nobody has read them yet
    mask_digests: np.ndarray | None = None  # (n,) of the mask files; b"" where there is none
    converted: np.ndarray | None = None  # (n,) whether a colour profile changes the pixels

    @classmethod
    def scanned(cls, section: Source, source: ImageSource, scan: Scan, kept: np.ndarray) -> "Images":
        """What a scan has left."""
        columns = (scan.sizes, scan.digests, scan.mask_digests, scan.converted)
        return cls(section, source, kept, *(column[kept] for column in columns))

    @classmethod
    def declared(cls, section: Source, source: ImageSource) -> "Images":
        """With the sizes that the metadata gives; no file has been looked at."""
        assert source.declared_sizes is not None
        return cls(section, source, np.arange(len(source)), source.declared_sizes, None)

    @property
    def mask(self) -> str:
        """Where masks come from: "none", "alpha" or "file"."""
        return self.section.mask if isinstance(self.section, ImageSection) else "none"

    def captions(self, row: int) -> list[str]:
        """Captions of an image before any rule."""
        return self.source.captions(int(self.kept[row]))

    def fingerprint(self) -> str:
        """SHA-256 in hex of the images, their masks and their captions, wherever they lie."""
        columns = (self.digests, self.mask_digests if self.mask == "file" else None)
        found = hashlib.sha256(b"".join(column.tobytes() for column in columns if column is not None))
        for row in range(len(self.kept)):
            found.update(repr(self.captions(row)).encode())
        return found.hexdigest()


def bucket_rules(data: DataSection, multiple: int) -> list[BucketRules]:
    """Rules of each resolution, for a family whose images have sides of this `multiple`."""
    buckets = data.buckets
    return [
        BucketRules(
            resolution,
            buckets.step or default_step(resolution, multiple),
            buckets.max_upscale,
            buckets.max_aspect,
            buckets.enabled,
        )
        for resolution in data.resolutions
    ]


class Dataset:
    """All images of a run. `multiple` is the family's: sides of buckets are multiples of it, in pixels."""

    def __init__(self, data: DataSection, images: Sequence[Images], multiple: int, seed: int):
        self.data, self.images, self.seed = data, list(images), seed
        self.names = _names(images)
        self.rules = [data.rules(source.section) for source in images]
        levels = [[buckets_of(source.sizes, rules) for rules in bucket_rules(data, multiple)] for source in self.images]
        self.unusable = [np.flatnonzero(~np.any([level.any(axis=1) for level in found], axis=0)) for found in levels]
        items = [_items(found) for found in levels]
        self.item_images = [numbers for numbers, _ in items]  # of each source: (m,) rows of its `Images`
        self.item_sizes = [sizes for _, sizes in items]  # (m, 2) width and height of their buckets
        codes = [sizes[:, 0].astype(np.int64) * WIDER + sizes[:, 1] for sizes in self.item_sizes]
        unique = np.unique(np.concatenate([np.unique(found) for found in codes]))
        self.buckets: list[Size] = [divmod(code, WIDER) for code in unique.tolist()]
        self.item_buckets = [np.searchsorted(unique, found).astype(np.int32) for found in codes]  # (m,) in `buckets`

    def problems(self, source: int) -> list[str]:
        """Images of a source that are too long or too small for any bucket."""
        problems = Problems(self.names[source])
        problems.add_rows(
            "images that fit no bucket",
            self.unusable[source],
            lambda row: f"{self.location(source, row)}: {self._why_unusable(source, row)}",
        )
        return problems.lines()

    def _why_unusable(self, source: int, row: int) -> str:
        buckets = self.data.buckets
        width, height = self.images[source].sizes[row].tolist()
        if reason := why_too_long(width, height, buckets.max_aspect):
            return reason
        limit = f"{buckets.max_upscale:g} times; take a larger one, or allow more by `data.buckets.max_upscale`"
        return f"{width} x {height} pixels would have to be enlarged more than {limit}"

    def fingerprint(self, group: int) -> dict[str, Any]:
        """What decides which sample stands where: a resumed run must find the same.

        `group` counts only where there are several buckets; with one, samples stand at the same positions anyway.
        """
        sources = []
        for name, images in zip(self.names, self.images, strict=True):
            found = {"name": name, "images": len(images.kept), "sha256": images.fingerprint()}
            converted = 0 if images.converted is None else int(images.converted.sum())
            sources.append(found | ({PROFILES: converted} if converted else {}))
        return {"sources": sources, "micro_batch": group if len(self.buckets) > 1 else None}

    def order(self, steps: int, batch_size: int, group: int) -> Order:
        """Which item stands where, in micro-batches of `group` samples."""
        sections = [images.section for images in self.images]
        shares = [section.share for section in sections if section.share is not None]
        ends = [None if s.end_step is None or s.end_step >= steps else s.end_step * batch_size for s in sections]
        spans = [(section.start_step * batch_size, end) for section, end in zip(sections, ends, strict=True)]
        repeats = [section.repeats for section in sections]
        return Order(self.seed, self.item_buckets, shares or None, repeats=repeats, group=group, spans=spans)

    # ------------------------------------------------------------------------ one sample

    def sample(self, position: int, source: int, item: int) -> Sample:
        """What stands at a position that an item of a source was given."""
        row = int(self.item_images[source][item])
        flip = self.data.flip > 0 and Stream(self.seed, "flip", position).uniform() < self.data.flip
        geometry = self._place(source, item, self._corner(source, row, position), flip)
        return Sample(position, source, row, geometry, self._caption_at(source, row, position))

    def _place(self, source: int, item: int, at: tuple[float, float], flip: bool) -> Geometry:
        width, height = self.images[source].sizes[self.item_images[source][item]].tolist()
        return place((width, height), self.buckets[self.item_buckets[source][item]], at, flip)

    def _corner(self, source: int, row: int, position: int) -> tuple[float, float]:
        if self.data.crop == "center":
            return CENTER
        if self.data.variants is None:
            return _anywhere(Stream(self.seed, "crop", position))
        variant = Stream(self.seed, "crop_variant", position).below(self.data.variants)
        return self._corner_variant(source, row, variant)

    def _corner_variant(self, source: int, row: int, variant: int) -> tuple[float, float]:
        return _anywhere(Stream(0, f"crop/{self._identity(source, row)}", variant))

    def _caption_at(self, source: int, row: int, position: int) -> str:
        rules = self.rules[source]
        if rules.dropout and is_dropped(rules, Stream(self.seed, "caption_dropout", position)):
            return ""
        if self.data.variants is None:
            return self._caption(source, row, Stream(self.seed, "caption", position))
        variant = Stream(self.seed, "caption_variant", position).below(self.data.variants)
        return self._caption_variant(source, row, variant)

    def _caption(self, source: int, row: int, draw: Stream) -> str:
        return final_caption(self.captions(source, row), self.rules[source], draw)

    def _caption_variant(self, source: int, row: int, variant: int) -> str:
        """The variants of an image go through its own captions in turn, so that none is left out."""
        captions = self.captions(source, row)
        draw = Stream(0, f"caption/{self._identity(source, row)}", variant)
        return final_caption([captions[variant % len(captions)]], self.rules[source], draw)

    def _identity(self, source: int, row: int) -> str:
        """Of an image, wherever it lies and whatever else is trained."""
        digests = self.images[source].digests
        return digests[row].decode() if digests is not None else self.location(source, row)

    def captions(self, source: int, row: int) -> list[str]:
        """Captions of an image before any rule."""
        return self.images[source].captions(row)

    def location(self, source: int, row: int) -> str:
        """What messages call an image."""
        images = self.images[source]
        return images.source.location(int(images.kept[row]))

    # ------------------------------------------------------------------------ what can be computed ahead

    def has_random_captions(self) -> bool:
        """Whether the caption of any image differs from draw to draw, not counting that it may be dropped."""
        return any(
            is_random(self.captions(source, row), rules)
            for source, (images, rules) in enumerate(zip(self.images, self.rules, strict=True))
            if rules.dropout < 1
            for row in range(len(images.kept))
        )

    @property
    def cuts_of_an_item(self) -> int:
        """How many cuts an image has in one bucket, at most."""
        return (self.data.variants or 1 if self.data.crop == "random" else 1) * (1 + (0 < self.data.flip < 1))

    def caption_variants(self, source: int, row: int) -> list[str]:
        """Every caption that a sample of an image can have, each once; TypeError where there is no end of them."""
        rules, captions = self.rules[source], self.captions(source, row)
        dropped = [""] if rules.dropout else []
        if rules.dropout == 1:
            return dropped
        if self.data.variants is None:
            if is_random(captions, rules):
                raise TypeError("random captions without `data.variants`")
            found = [self._caption(source, row, Stream(0, "caption"))]
        else:
            found = [self._caption_variant(source, row, variant) for variant in range(self.data.variants)]
        return list(dict.fromkeys(dropped + found))

    def geometries(self, source: int, item: int) -> list[Geometry]:
        """Every cut that a sample of an item can have, each once; TypeError where there is no end of them."""
        if self.data.has_endless_crops:
            raise TypeError("random crops without `data.variants`")
        row = int(self.item_images[source][item])
        corners = [CENTER]
        if self.data.crop == "random":
            corners = [self._corner_variant(source, row, variant) for variant in range(self.data.variants or 0)]
        flips = [flip for flip, chance in ((False, 1 - self.data.flip), (True, self.data.flip)) if chance > 0]
        return list(dict.fromkeys(self._place(source, item, at, flip) for at in corners for flip in flips))

    def latent_key(self, source: int, row: int, geometry: Geometry) -> str:
        """The hash of all that decides the pixels of a cut."""
        images = self.images[source]
        assert images.digests is not None
        mask = images.mask_digests[row] if images.mask == "file" and images.mask_digests is not None else b""
        cut = (*geometry.original, *geometry.scaled, *geometry.corner, *geometry.target, int(geometry.flip))
        known = (bytes(images.digests[row]), bytes(mask), images.mask, cut, self.data.background)
        converted = images.converted is not None and images.converted[row]
        return content_key(*known, "sRGB") if converted else content_key(*known)

    # ------------------------------------------------------------------------ pixels

    def pixels(self, source: int, row: int, geometry: Geometry) -> tuple[Image, Image | None]:
        """The cut of an image, RGB, and of its mask (mode L); TrainingError if the file is not what was scanned."""
        images = self.images[source]
        number, rules = int(images.kept[row]), self.pixel_rules(source)
        try:
            content = images.source.read(number)
            _check_unchanged("it", content, images.digests, row)
            image, mask = decode(content, rules, geometry.scaled)
            if images.mask == "file":
                encoded = images.source.read_mask(number)
                _check_unchanged("its mask", encoded, images.mask_digests, row)
                mask = None if encoded is None else decode_mask(encoded, geometry.scaled)
        except (OSError, BadImage) as error:
            doubt(images.source, number, rules, cache_folder(self.data.cache.dir))
            raise TrainingError(f"{self.location(source, row)}: can no longer be read: {error}") from error
        return crop(image, geometry), mask and crop(mask, geometry)

    def pixel_rules(self, source: int) -> PixelRules:
        """Rules of a source."""
        return PixelRules(self.data.background, self.data.animated, self.images[source].mask == "alpha")


def _names(images: Sequence[Images]) -> list[str]:
    """What curves and messages call each source, no two alike: "photos", "photos 2"."""
    names: list[str] = []
    taken = {found.section.name for found in images}
    for found in images:
        name, number = found.section.name or found.source.name, 1
        while found.section.name is None and (name in names or name in taken):
            number += 1
            name = f"{found.source.name} {number}"
        names.append(name)
    return names


def _check_unchanged(what: str, content: bytes | None, digests: np.ndarray | None, row: int) -> None:
    if digests is not None and sha256(content) != bytes(digests[row]):
        raise BadImage(f"{what} was changed since the run looked at it; start again, so that it is looked at anew")


def _anywhere(draw: Stream) -> tuple[float, float]:
    return draw.uniform(), draw.uniform()


def _items(levels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(m,) rows and (m, 2) buckets of all resolutions; an image that gets one bucket twice has one item for it."""
    rows = np.concatenate([np.flatnonzero(level.any(axis=1)) for level in levels])
    sizes = np.concatenate([level[level.any(axis=1)] for level in levels])
    if len(levels) == 1:
        return rows, sizes
    unique = np.unique(np.column_stack([rows, sizes]), axis=0)
    return unique[:, 0], unique[:, 1:]
