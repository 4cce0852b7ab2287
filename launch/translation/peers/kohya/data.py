"""sd-scripts' data sets and their subsets, as sources of ours."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .....data.sources.folder import image_files
from ...launcher import processes
from ...peer import (
    NOTHING,
    Chosen,
    Outcome,
    Rule,
    Settings,
    Translation,
    lost,
    needless,
    own,
    same,
    with_others,
)
from ...values import flag, number, numbers, text, whole
from .run import Run, accumulated, count_of, is_class, repeats_of

SOURCE, CAPTIONS = "data.sources.*.", "data.captions."


def add_sources(translation: Translation, run: Run) -> None:
    """The sources, and what their subsets say of all data."""
    chosen = [dict(_chosen(subset)) for subset in run.subsets]
    several = _resolutions(chosen)
    if several:
        firsts = _first_of_each(chosen)
        kept = [subset for index, subset in enumerate(run.subsets) if index in firsts]
        run.data = [own for subsets in run.data if (own := [each for each in subsets if each in kept])]
        chosen = [chosen[index] for index in firsts]
    _set_common(translation, chosen)
    if several:
        sides = [found.value for found in several]
        translation.values["data.resolution"] = Chosen(sides, several[0].setting)
    captions = [_part(values, CAPTIONS) for values in chosen]
    alike = len({repr({key: each.value for key, each in rules.items()}) for rules in captions}) == 1
    if alike:
        translation.values |= {CAPTIONS + key: value for key, value in captions[0].items()}
    for subset, values, rules, share in zip(run.subsets, chosen, captions, _shares(run), strict=True):
        source = _part(values, SOURCE) | _weighted(subset, share)
        source |= {} if alike else {f"captions.{key}": value for key, value in rules.items()}
        if share is not None:
            source.pop("repeats", None)
        translation.sources.append(source)


def _identity(values: dict[str, Chosen]) -> str:
    """What two subsets have in common that hold the same images with the same captions."""
    return repr({key: found.value for key, found in values.items() if key.startswith((SOURCE, CAPTIONS))})


def _first_of_each(chosen: list[dict[str, Chosen]]) -> list[int]:
    """The places of subsets, without those that repeat another one at another resolution."""
    return list({_identity(values): index for index, values in reversed([*enumerate(chosen)])}.values())[::-1]


def _resolutions(chosen: list[dict[str, Chosen]]) -> list[Chosen]:
    """Those at which each subset is there, where that is more than one and the same ones for all."""
    by_images: dict[str, dict[int, Chosen]] = {}
    for values in chosen:
        if (found := values.get("data.resolution")) is not None:
            by_images.setdefault(_identity(values), {})[found.value] = found
    alike = len({frozenset(found) for found in by_images.values()}) == 1
    first = next(iter(by_images.values()), {})
    whole = len(chosen) == len(by_images) * len(first)
    return [*first.values()] if alike and whole and len(first) > 1 else []


def _chosen(subset: Settings) -> Iterator[tuple[str, Chosen]]:
    """Our keys and values of a subset, from its own settings and those around it."""
    for name, rule in RULES.items():
        if (setting := subset.find(name)) is not None:
            yield from ((key, Chosen(value, setting)) for key, value in rule(setting, subset).values.items())


def _part(values: dict[str, Chosen], beginning: str) -> dict[str, Chosen]:
    return {key.removeprefix(beginning): value for key, value in values.items() if key.startswith(beginning)}


def _set_common(translation: Translation, chosen: list[dict[str, Chosen]]) -> None:
    """What is one value for all data here: that of the first subset which has one."""
    common: dict[str, Chosen] = {}
    for values in chosen:
        for key, found in values.items():
            if not key.startswith((SOURCE, CAPTIONS)):
                if key not in chosen[0] or chosen[0][key].value != found.value:
                    translation.doubt(found.setting, f"{key} has one value for all data here")
                common.setdefault(key, found)
    translation.values |= common


def _weighted(subset: Settings, share: float | None) -> dict[str, Chosen]:
    """Share and weight, where there are class images."""
    if share is None:
        return {}
    because = subset.find("is_reg") or subset.find("image_dir")
    assert because
    weight = subset.value("prior_loss_weight", number, 1.0)
    values = {"share": Chosen(share, because)}
    if is_class(subset) and weight != 1 and (setting := subset.find("prior_loss_weight")):
        values["loss_weight"] = Chosen(weight, setting)
    return values


def _shares(run: Run) -> list[float | None]:
    """Of all samples, where there are class images: as many as the others, in each data set that has them."""
    if not any(map(is_class, run.subsets)):
        return [None] * len(run.subsets)
    known = all(count_of(subset) for subset in run.subsets)
    weights = []
    for subsets in run.data:
        sizes = [((count_of(subset) or 1) if known else 1) * repeats_of(subset) for subset in subsets]
        train = sum(size for subset, size in zip(subsets, sizes, strict=True) if not is_class(subset))
        reg = sum(sizes) - train
        weights += [
            size * train / reg if is_class(subset) else size for subset, size in zip(subsets, sizes, strict=True)
        ]
    shares = [round(weight / sum(weights), 6) for weight in weights]
    return [*shares[:-1], round(1 - sum(shares[:-1]), 6)]


def batch(value: int, settings: Settings) -> Outcome:
    """sd-scripts counts the samples of one forward pass of one process."""
    values = {"loop.batch_size": value * accumulated(settings) * processes(settings)}
    return Outcome(values | ({"loop.micro_batch": value} if accumulated(settings) > 1 else {}))


def usual_batch(value: int, settings: Settings) -> Outcome:
    return NOTHING if settings.find("batch_size") else batch(value, settings)


def folder_of_images(value: str, settings: Settings) -> Outcome:
    inside = Path(value).is_dir() and any(file.parent != Path(value) for file in image_files(Path(value)))
    return Outcome({SOURCE + "path": value}, "images in the folders inside are trained too" if inside else "")


def usual_repeats(value: int, settings: Settings) -> Outcome:
    return NOTHING if settings.find("num_repeats") else Outcome({SOURCE + "repeats": value})


def sides(value: list[float], settings: Settings) -> Outcome:
    width, height = (*value, *value)[:2]
    side = 8 * round(math.sqrt(width * height) / 8)
    if width == height:
        return Outcome({"data.resolution": int(width)})
    words = f"an area of {width:g} x {height:g}; here one of {side} x {side}"
    return Outcome({"data.resolution": side}, words + ("" if settings.asked("enable_bucket") else ", cut to squares"))


def longest(value: int, settings: Settings) -> Outcome:
    """The aspect of the longest bucket: sides from `min_bucket_reso` to `max_bucket_reso`, at most the area."""
    if not settings.asked("enable_bucket"):
        return NOTHING
    low, high = max(1, settings.value("min_bucket_reso", whole, 256)), settings.value("max_bucket_reso", whole, 1024)
    width, height = (*settings.value("resolution", numbers, [512.0]) * 2,)[:2]
    aspect = max(1.0, min(high, width * height / low) / low)
    return Outcome({"data.buckets.max_aspect": round(aspect, 2)}, LONGER)


def buckets(value: bool, settings: Settings) -> Outcome:
    words = UPSCALE if value and not settings.asked("bucket_no_upscale") else ""
    return Outcome({"data.buckets.enabled": value}, words)


def with_buckets(outcome: Outcome) -> Any:
    """What only means something where there are buckets."""
    return lambda value, settings: outcome if value and settings.asked("enable_bucket") else NOTHING


def step(value: int, settings: Settings) -> Outcome:
    return with_buckets(Outcome({"data.buckets.step": value}))(value, settings)


def affix(key: str, make: Any) -> Rule:
    def apply(value: str, settings: Settings) -> Outcome:
        moves = settings.asked("shuffle_caption") or settings.value("caption_tag_dropout_rate", number, 0.0) > 0
        return Outcome({key: make(value)}, AFFIX if moves else "")

    return own(text, apply, key, AFFIX)


def extension(value: str, settings: Settings) -> Outcome:
    if value in (".txt", ".caption"):
        return Outcome(differs=EXTENSION)
    return Outcome(lost="captions are read from .txt and .caption files, or metadata.jsonl: rename them")


def mask(value: bool, settings: Settings) -> Outcome:
    return Outcome({SOURCE + "mask": "alpha"}, MASK) if value else NOTHING


UPSCALE = "images are enlarged at most twice here (`data.buckets.max_upscale`), there without a limit"
LONGER = "longer images are refused here, there cut to the longest bucket"
AFFIX = "put on after tags are shuffled and dropped, there before it: then `keep_tokens` counts it"
EXTENSION = "both .txt and .caption are read here, and each line of one is a caption; there only its first"
MASK = "the loss is the mean over what is opaque here, there over the whole image"
MASKS = "masks are `mask: alpha`, or files beside the images by `mask: file`"
TAGS = "captions have no such part here"

RULES: dict[str, Rule] = {
    # of a folder
    "image_dir": own(text, folder_of_images, SOURCE + "path", "folders inside are trained too"),
    "num_repeats": same(SOURCE + "repeats", whole),
    "dataset_repeats": own(whole, usual_repeats, SOURCE + "repeats"),
    "class_tokens": same(SOURCE + "caption", text),
    "is_reg": with_others(SOURCE + "share", flag),
    "prior_loss_weight": with_others(SOURCE + "loss_weight", number),
    "conditioning_data_dir": lost(MASKS),
    "alpha_mask": own(flag, mask, SOURCE + "mask", MASK),
    "metadata_file": lost("captions of sd-scripts' JSON: write them as metadata.jsonl with `file_name` and `text`"),
    "caption_extension": own(text, extension, "data.sources", EXTENSION),
    "caption_extention": own(text, extension, "data.sources", EXTENSION),
    "cache_info": needless("sizes and captions are remembered anyway"),
    # captions
    "shuffle_caption": same(CAPTIONS + "shuffle", flag),
    "keep_tokens": same(CAPTIONS + "keep_tokens", whole),
    "caption_separator": same(CAPTIONS + "separator", text),
    "caption_prefix": affix(CAPTIONS + "prefix", lambda words: words + " "),
    "caption_suffix": affix(CAPTIONS + "suffix", lambda words: " " + words),
    "caption_dropout_rate": same(CAPTIONS + "dropout", number),
    "caption_tag_dropout_rate": same(CAPTIONS + "tag_dropout", number),
    "enable_wildcard": same(CAPTIONS + "wildcards", flag),
    "keep_tokens_separator": lost("`keep_tokens` counts the tags that stay; nothing marks them"),
    "secondary_separator": lost(TAGS),
    "caption_dropout_every_n_epochs": lost("captions are dropped by chance only: `data.captions.dropout`"),
    "token_warmup_min": lost(TAGS, 1),
    "token_warmup_step": lost("all tags take part from the first step on"),
    # pixels
    "resolution": own(numbers, sides, "data.resolution", "width and height become a square of the same area"),
    "flip_aug": same("data.flip", flag, lambda on: 0.5 if on else 0.0),
    "random_crop": same("data.crop", flag, lambda on: "random" if on else "center"),
    "color_aug": lost("colours are not changed"),
    "face_crop_aug_range": lost("images are not cut around faces"),
    "resize_interpolation": lost("images are scaled with Lanczos", "lanczos"),
    "custom_attributes": lost("nothing reads them"),
    "network_multiplier": lost("an adapter is trained at its full strength", 1, 1.0),
    # buckets and batches
    "enable_bucket": own(flag, buckets, "data.buckets.enabled", UPSCALE),
    "bucket_reso_steps": own(whole, step, "data.buckets.step"),
    "bucket_no_upscale": own(
        flag,
        with_buckets(Outcome({"data.buckets.max_upscale": 1.0}, "small images get smaller buckets")),
        "data.buckets.max_upscale",
        "small images get smaller buckets",
    ),
    "min_bucket_reso": own(whole, longest, "data.buckets.max_aspect", LONGER),
    "max_bucket_reso": own(whole, longest, "data.buckets.max_aspect", LONGER),
    "batch_size": own(whole, batch, "loop.batch_size"),
    "train_batch_size": own(whole, usual_batch, "loop.batch_size"),
    # held-out images
    "validation_split": lost("held-out images are `validation.sources`, in a folder of their own", 0.0),
    "validation_seed": lost("held-out images are `validation.sources`, with fixed noise"),
}
"""Settings of data sets and subsets, which the run has too."""
