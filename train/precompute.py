"""Latents and prompt embeddings computed before training: which a run needs, which are there, and the rest made."""

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..configs.data_sections import ImageSection
from ..configs.errors import UserError
from ..configs.machine import cache_folder
from ..configs.plain import plain
from ..configs.schema import RunConfig
from ..data.buckets import Size
from ..data.cache import Store
from ..data.dataset import Dataset
from ..data.draws import keyed_generator
from ..data.keys import content_key, weights_hash
from ..data.loader import Cached
from ..data.transforms import Geometry, mask_to_tensor, to_tensor
from ..models.base import merged_key
from ..models.encode import IMAGE_DTYPE, PROBE_PROMPT, draw_latents, encode_caption, encode_image, pool_masks
from ..models.family import ModelFamily, Parts, PromptOptions
from .captions import prompt_options
from .fits import trained_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

Load = Callable[..., Parts]  # some parts of the base, in its type or in another
COUNTED_CAPTIONS = 100_000  # of more, the plan says how many there are at most


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run needs of its caches."""

    latents: Store | None
    cuts: dict[str, tuple[int, int, int]]  # key -> source, item, which of its geometries
    prompts: Store | None
    captions: dict[str, str]  # key -> caption
    options: PromptOptions

    def prompt_key(self, caption: str) -> str:
        """Key of a caption."""
        return prompt_key(caption, self.options)

    @property
    def cached(self) -> Cached:
        """For the loader."""
        return Cached(self.latents, self.prompts, self.prompt_key)

    def only(self, cuts: Collection[str], captions: Collection[str]) -> "Wanted":
        """What these keys need of it."""
        kept = {key: cut for key, cut in self.cuts.items() if key in cuts}
        return replace(self, cuts=kept, captions={k: text for k, text in self.captions.items() if k in captions})

    def missing(self) -> tuple[list[str], list[str]]:
        """Keys of latents and of prompts that have to be computed."""
        latents = self.latents.missing(self.cuts) if self.latents is not None else []
        return latents, self.prompts.missing(self.captions) if self.prompts is not None else []


def want(
    config: RunConfig, family: ModelFamily, folder: Path, dataset: Dataset, held_out: Sequence[str] = ()
) -> Wanted:
    """The caches of a run and all keys that it will read; UserError where one is asked for that cannot be.

    `held_out` are the captions of held-out images.
    """
    cached = why_no_latents(config) is None
    latents = latent_store(config, family, folder) if cached else None
    prompts, captions = want_prompts(config, family, folder, dataset, held_out)
    return Wanted(latents, _cuts(dataset) if cached else {}, prompts, captions, prompt_options(config))


def want_prompts(
    config: RunConfig, family: ModelFamily, folder: Path, dataset: Dataset, held_out: Sequence[str] = ()
) -> tuple[Store | None, dict[str, str]]:
    """The cache of embeddings, if there is one, and the captions that the run will read from it, by their keys."""
    if why_no_prompts(config, family, dataset):
        return None, {}
    spoken = [*_captions(dataset), *held_out, *config.validation.texts, "", PROBE_PROMPT]
    options = prompt_options(config)
    return prompt_store(config, family, folder), {prompt_key(caption, options): caption for caption in spoken}


def prompt_key(caption: str, options: PromptOptions) -> str:
    """Key of a caption's embeddings."""
    return content_key("prompt", caption, options.windows, options.clip_skip)


def latent_store(config: RunConfig, family: ModelFamily, folder: Path) -> Store:
    """Where the latents of this VAE lie."""
    return _store("latents", config, folder, family.image_encoders, "fp32", config.data.cache.latent_draw)


def prompt_store(config: RunConfig, family: ModelFamily, folder: Path) -> Store:
    """Where the embeddings of these text encoders lie."""
    options = astuple(prompt_options(config))
    return _store("prompts", config, folder, family.prompt_encoders, config.model.dtype, *options)


def why_no_latents(config: RunConfig) -> str | None:
    """Why latents are not cached, or None."""
    if not config.data.cache.latents:
        return "data.cache.latents is false"
    if config.data.has_endless_crops:
        return "crops are random; `data.variants: 8` would give each image eight"
    return None


def why_no_prompts(config: RunConfig, family: ModelFamily, dataset: Dataset) -> str | None:
    """Why embeddings are not cached, or None; UserError where they were asked for and cannot be."""
    data, reason = config.data, None
    if not data.cache.prompts:
        return "data.cache.prompts is false"
    if trained := [part for part in trained_parts(config, family) if part in family.text_encoders]:
        reason = f"{' and '.join(trained)} trains, so embeddings change"
    elif data.variants is None and dataset.has_random_captions():
        reason = "captions are random; `data.variants: 8` would give each image eight"
    if reason and data.cache.prompts is True:
        raise UserError(f"data.cache.prompts: {reason}")
    return reason


@dataclass(frozen=True, slots=True)
class CacheOutlook:
    """What a cache holds of a run already."""

    name: str
    entries: int = 0  # that the run reads
    present: int = 0
    missing: dict[Size, int] = field(default_factory=dict)  # size of the picture -> entries; of prompts: (0, 0)
    note: str = ""  # why there is none, or what could not be counted
    bytes_to_write: int = 0

    def describe(self) -> str:
        """One line."""
        if not self.entries:
            return f"{self.name} are not cached: {self.note}"
        there = f"{self.present:,} of {self.entries:,} are there, {self.bytes_to_write / 2**20:,.1f} MiB to write"
        return f"{self.name}: {there}{self.note and f' ({self.note})'}"


def count_latents(config: RunConfig, family: ModelFamily, folder: Path, dataset: Dataset) -> CacheOutlook:
    """What the cache of latents has and lacks; nothing is loaded."""
    if reason := why_no_latents(config):
        return CacheOutlook("latents", note=reason)
    store, present, missing = latent_store(config, family, folder), 0, np.zeros(len(dataset.buckets), dtype=int)
    for source, images in enumerate(dataset.images):
        if images.digests is None:  # class images that are not made, or files that nobody has opened
            missing += np.bincount(dataset.item_buckets[source], minlength=len(missing)) * dataset.cuts_of_an_item
            continue
        for item, row in enumerate(dataset.item_images[source]):
            keys = {dataset.latent_key(source, int(row), cut) for cut in dataset.geometries(source, item)}
            absent = len(store.missing(keys))
            missing[dataset.item_buckets[source][item]] += absent
            present += len(keys) - absent
    unread = any(images.digests is None for images in dataset.images)
    sizes = {size: count for size, count in zip(dataset.buckets, missing.tolist(), strict=True) if count}
    note = "images that were not opened count as new" if unread else ""
    return CacheOutlook("latents", present + int(missing.sum()), present, sizes, note)


def count_prompts(config: RunConfig, family: ModelFamily, folder: Path, dataset: Dataset) -> CacheOutlook:
    """What the cache of embeddings has and lacks; nothing is loaded."""
    if reason := why_no_prompts(config, family, dataset):
        return CacheOutlook("prompt embeddings", note=reason)
    if (images := sum(len(found.kept) for found in dataset.images)) > COUNTED_CAPTIONS:
        entries = images * (config.data.variants or 1)
        return CacheOutlook("prompt embeddings", entries, 0, {(0, 0): entries}, "at most: equal captions count once")
    store, captions = want_prompts(config, family, folder, dataset)
    missing = 0 if store is None else len(store.missing(captions))
    by_size = {(0, 0): missing} if missing else {}
    return CacheOutlook("prompt embeddings", len(captions), len(captions) - missing, by_size)


def weigh(found: CacheOutlook, config: RunConfig, family: ModelFamily, load: Load) -> CacheOutlook:
    """With the bytes that are to be written, for which the encoders are loaded."""
    if not found.missing:
        return found
    if found.name == "latents":
        parts = load(family.image_encoders)
        sizes = {size: latent_bytes(config, family, parts, size) for size in found.missing}
    else:
        sizes = {(0, 0): prompt_bytes(config, family, load(family.prompt_encoders))}
    return replace(found, bytes_to_write=sum(sizes[size] * count for size, count in found.missing.items()))


def latent_bytes(config: RunConfig, family: ModelFamily, parts: Parts, size: Size) -> int:
    """What a picture of this size takes in the cache, with the mask that it may have."""
    channels, height, width = family.latent_shape(parts, *size)
    moments = 1 if config.data.cache.latent_draw == "once" else 2
    masked = any(isinstance(source, ImageSection) and source.mask != "none" for source in config.data.sources)
    return 4 * (moments * channels + masked) * height * width


def prompt_bytes(config: RunConfig, family: ModelFamily, parts: Parts) -> int:
    """What a caption takes in the cache."""
    row = encode_caption(family, parts, "", prompt_options(config))
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())


def fill(
    config: RunConfig, wanted: Wanted, dataset: Dataset, family: ModelFamily, load: Load, accelerator: "Accelerator"
) -> None:
    """Computes what is missing, each process its part; the encoders are loaded for it and let go."""
    rank, world = accelerator.process_index, accelerator.num_processes
    for store, keys in ((wanted.latents, wanted.cuts), (wanted.prompts, wanted.captions)):
        if store is not None:
            store.check(keys)
    latents, prompts = wanted.missing()
    for store in (wanted.latents, wanted.prompts):
        for problem in store.problems if store is not None else ():
            accelerator.print(f"warning: {plain(problem)}", file=sys.stderr)
    if wanted.latents is not None and latents:
        parts = load(family.image_encoders, IMAGE_DTYPE)
        once = dataset.data.cache.latent_draw == "once"
        title = "latents" if accelerator.is_main_process else None

        def latents_of(key: str) -> dict[str, torch.Tensor]:
            source, item, number = wanted.cuts[key]
            cut = dataset.geometries(source, item)[number]
            return _latents(dataset, family, parts, source, item, cut, key if once else None)

        size = max(latent_bytes(config, family, parts, bucket) for bucket in dataset.buckets)
        wanted.latents.check_room(len(latents) * size)
        wanted.latents.fill(list(wanted.cuts), latents_of, entry_bytes=size, rank=rank, world=world, progress=title)
        del parts
    if wanted.prompts is not None and prompts:
        parts = load(family.prompt_encoders)
        title = "prompt embeddings" if accelerator.is_main_process else None

        def prompts_of(key: str) -> dict[str, torch.Tensor]:
            return _embeddings(family, parts, wanted.captions[key], wanted.options)

        size = prompt_bytes(config, family, parts)
        wanted.prompts.check_room(len(prompts) * size)
        wanted.prompts.fill(list(wanted.captions), prompts_of, entry_bytes=size, rank=rank, world=world, progress=title)
        del parts
    accelerator.wait_for_everyone()
    for store, keys in ((wanted.latents, wanted.cuts), (wanted.prompts, wanted.captions)):
        if store is not None:
            store.refresh()
            store.require(keys)


def _latents(
    dataset: Dataset, family: ModelFamily, parts: Parts, source: int, item: int, cut: Geometry, draw: str | None
) -> dict[str, torch.Tensor]:
    row = int(dataset.item_images[source][item])
    picture, mask = dataset.pixels(source, row, cut)
    moments = encode_image(family, parts, to_tensor(picture)).cpu()
    if not moments.isfinite().all():
        raise UserError(
            f"{dataset.location(source, row)}: the VAE makes numbers of it that are not finite, in float32: "
            "its weights are damaged, or it is not the VAE of this base"
        )
    if draw is not None:
        noise = torch.randn(moments.shape[1:], generator=keyed_generator(0, f"latents/{draw}"))
        moments = draw_latents(moments[None], noise[None])
    entry = {"moments": moments}
    if mask is not None:
        entry["mask"] = pool_masks(mask_to_tensor(mask), moments)
    return entry


def _embeddings(family: ModelFamily, parts: Parts, caption: str, options: PromptOptions) -> dict[str, torch.Tensor]:
    entry = dict(encode_caption(family, parts, caption, options))
    if not all(tensor.isfinite().all() for tensor in entry.values()):
        raise UserError(
            f"{caption!r}: the text encoders make numbers of it that are not finite; "
            "their weights may not bear model.dtype fp16: try bf16 or fp32"
        )
    return entry


def _store(name: str, config: RunConfig, folder: Path, parts: Sequence[str], dtype: str, *rest: str | int) -> Store:
    """The store whose name is a hash of the encoder's files, their precision and how they are used."""
    root = cache_folder(config.data.cache.dir)
    hashes = tuple(weights_hash(folder / part, root) for part in parts)
    return Store(root / name / content_key(hashes, dtype, rest, merged_key(config.model)))


def _cuts(dataset: Dataset) -> dict[str, tuple[int, int, int]]:
    return {
        dataset.latent_key(source, int(row), geometry): (source, item, number)
        for source, rows in enumerate(dataset.item_images)
        for item, row in enumerate(rows)
        for number, geometry in enumerate(dataset.geometries(source, item))
    }


def _captions(dataset: Dataset) -> Iterable[str]:
    for source, images in enumerate(dataset.images):
        for row in range(len(images.kept)):
            yield from dataset.caption_variants(source, row)
