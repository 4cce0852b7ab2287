"""The settings of images and captions: sources, rules, buckets, caches."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .section import Denoising, Guidance, PathText, Revision, Section

Side = Annotated[int, Field(ge=16, le=16_384)]
Sides = Annotated[
    Annotated[Side, Tag("<one>")] | Annotated[list[Side], Field(min_length=1), Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, list | tuple) else "<one>"),
]
Shade = Annotated[int, Field(ge=0, le=255)]


class CaptionRules(Section):
    """From the captions of an image to the words that are trained on; chances are drawn anew for each sample."""

    trigger: str | None = Field(default=None, min_length=1)
    """Word of the subject or style; put first where a caption lacks it. `[trigger]` in a caption stands for it."""
    class_token: str | None = Field(default=None, min_length=1)
    """Noun of the subject's class, such as "dog". `[class]` in a caption stands for it."""
    template: str | None = Field(default=None, min_length=1)
    """Sentence around every caption, made of `[trigger]`, `[class]` and `[caption]`: "a [trigger] [class]"."""
    prefix: str = ""
    """Put before every caption, as it is."""
    suffix: str = ""
    """Put after every caption, as it is."""
    lines: Literal["one_of", "whole", "first"] = "one_of"
    """What the lines of a caption file are: captions of which one is drawn, one text, or a caption and notes on it."""
    separator: str = Field(default=",", min_length=1)
    """What stands between the tags of a caption."""
    shuffle: bool = False
    """Tags in another order each time."""
    keep_tokens: int = Field(default=0, ge=0)
    """So many tags at the begin are neither shuffled nor dropped."""
    tag_dropout: float = Field(default=0.0, ge=0, le=1)
    """Chance of each tag to be left out."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Chance of the whole caption to be empty, which keeps classifier-free guidance alive."""
    wildcards: bool = False
    """Whether `{red|blue}` in a caption stands for one of these, drawn each time."""


class SourceSection(Section):
    """What every kind of source has."""

    name: str | None = Field(default=None, min_length=1)
    """What curves and messages call it; the name of its folder or dataset when not given, "prior" for class images."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Fraction of all training samples; give it to every source or to none (then each image counts the same)."""
    repeats: int = Field(default=1, ge=1, le=10**6)
    """How often each image counts in an epoch; for sources without `share`."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Factor on the loss of these samples."""
    target: Literal["image", "base"] = "image"
    """What is learnt: the image, or what the base says of it without the adapter, so that nothing changes there."""
    start_step: int = Field(default=0, ge=0)
    """First optimiser step, counted from 0, that takes samples from this source."""
    end_step: int | None = Field(default=None, ge=1)
    """First optimiser step that no longer does; none: to the end."""
    captions: CaptionRules | None = None
    """Caption rules of this source, instead of `data.captions`."""

    @model_validator(mode="after")
    def _check_steps(self) -> "SourceSection":
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(f"`end_step` {self.end_step} is not after `start_step` {self.start_step}")
        if self.share is not None and self.repeats != 1:
            raise ValueError("`repeats` counts within an epoch, `share` is of all samples: give one of them")
        return self


class ImageSection(SourceSection):
    """What every kind of source with images of the user has."""

    caption: str | None = None
    """Caption of images that have none of their own, such as "a sks dog", or "" for none; else that is an error."""
    empty_captions: Literal["error", "keep"] = "error"
    """An empty caption file or field: refused, or trained as an empty caption."""
    mask: Literal["none", "alpha", "file"] = "none"
    """Where to look in each image: everywhere, where it is opaque, or where `<name>.mask.png` beside it is white."""


class FolderSource(ImageSection):
    """Images of a folder and the folders in it, with `.txt`/`.caption` files or `metadata.jsonl|csv|parquet`."""

    path: PathText = Field(default=..., min_length=1)
    """Folder with images. A caption file may hold several captions, one on each line."""
    image_column: str = Field(default="file_name", min_length=1)
    """Column of the metadata with paths from the folder."""
    caption_column: str = Field(default="text", min_length=1)
    """Column of the metadata with the caption, or a list of captions."""


class DatasetSource(ImageSection):
    """Whatever `datasets` opens: a hub dataset, a folder that it has saved, or one of its file formats."""

    dataset: PathText = Field(default=..., min_length=1)
    """Hub id, a folder of `save_to_disk`, or a folder that `load_dataset` reads."""
    subset: str | None = None
    """Configuration of a dataset that has several."""
    split: str = Field(default="train", min_length=1)
    """Split, also as a slice: `train[:500]`."""
    revision: Revision | None = None
    """Commit of a hub dataset."""
    image_column: str = Field(default="image", min_length=1)
    """Column with images."""
    caption_column: str = Field(default="text", min_length=1)
    """Column with the caption, or a list of captions."""


class ShardSource(ImageSection):
    """WebDataset shards on local disk; members with one stem make one sample (`0001.jpg`, `0001.txt`)."""

    shards: PathText = Field(default=..., min_length=1)
    """Tar files, as a path or pattern: `photos/*.tar`. Indexed once by offset and read at random."""


class GivenSource(ImageSection):
    """Images that a Python program hands over: `build_trainer(config, given={"photos": images})`."""

    given: str = Field(default=..., min_length=1)
    """The name under which it hands them over: a list of images with captions, or a `datasets.Dataset`."""
    image_column: str = Field(default="image", min_length=1)
    """Column of a dataset with images."""
    caption_column: str = Field(default="text", min_length=1)
    """Column of a dataset with the caption, or a list of captions."""


class PriorSource(SourceSection):
    """Class images for DreamBooth's prior preservation, made with the base before training."""

    prior: str = Field(default=..., min_length=1)
    """Prompt and caption of the class images, such as "a dog". A share of 0.5 and a `loss_weight` of the paper's
    lambda is what the paper does."""
    count: int = Field(default=100, ge=1, le=100_000)
    """How many class images."""
    generate: bool = True
    """Make those that are missing; otherwise too few of them are an error."""
    steps: Denoising = 20
    """Denoising steps of each class image."""
    guidance: Guidance = 4.0
    """Classifier-free guidance scale of the class images."""


SOURCE_KINDS = {"path": "folder", "dataset": "dataset", "shards": "shards", "given": "given", "prior": "prior"}
"""The key that only this kind of source has, and the file in `data/sources/` that reads it."""


def source_kind(value: Any) -> str:
    """Which kind of source a section, or what stands in the file for one, is."""
    has = value.__contains__ if isinstance(value, dict) else lambda key: hasattr(value, key)
    return next((kind for key, kind in SOURCE_KINDS.items() if has(key)), "folder")


Source = Annotated[
    Annotated[FolderSource, Tag("folder")]
    | Annotated[DatasetSource, Tag("dataset")]
    | Annotated[ShardSource, Tag("shards")]
    | Annotated[GivenSource, Tag("given")]
    | Annotated[PriorSource, Tag("prior")],
    Discriminator(source_kind),
]


class BucketSection(Section):
    """Aspect-ratio buckets: images of similar shape are trained together instead of cropped to a square."""

    enabled: bool = True
    """Without buckets every image is cropped to a square."""
    step: int | None = Field(default=None, ge=1, le=16_384)
    """Sides of buckets are multiples of this many pixels; an eighth of the resolution when not given."""
    max_aspect: float = Field(default=4.0, ge=1, le=1000)
    """Longer images, as long side to short side, are refused."""
    max_upscale: float = Field(default=2.0, ge=1, le=1000)
    """Small images are enlarged by at most this factor; beyond it they get a smaller bucket."""


Cached = Literal["auto", True, False]


class CacheSection(Section):
    """Latents and prompt embeddings, computed once and kept on disk under the hash of all that decides them."""

    latents: Cached = "auto"
    """Keep what the VAE makes of images; auto: where crops are fixed or `data.variants` says how many there are."""
    prompts: Cached = "auto"
    """Keep embeddings of captions; auto: where no text encoder trains and captions are fixed or have `variants`."""
    latent_draw: Literal["each", "once"] = "each"
    """A new draw from the VAE's posterior each time (mean and variance are kept), or one for each image."""
    dir: PathText | None = None
    """Folder; `$LORALOOM_CACHE` or `~/.cache/loraloom` when not given, where all runs share it."""
    keep_vae: bool = False
    """Keep the VAE in memory between validations instead of loading it each time."""


class DataSection(Section):
    """What is trained on."""

    resolution: Sides = 512
    """Side in pixels of a square of the trained area; several: every image is trained at each of them."""
    sources: list[Source] = Field(default=..., min_length=1)
    """Image folders (`path`), datasets (`dataset`), tar shards (`shards`), a program's own (`given`) and class images
    (`prior`)."""
    captions: CaptionRules = CaptionRules()
    """Caption rules of all sources that have none of their own."""
    token_windows: int = Field(default=1, ge=1, le=8)
    """Windows of the text encoder that a caption may fill: 1 is 75 tokens, 3 is 225; what is longer is cut."""
    long_captions: Literal["cut", "error"] = "cut"
    """Captions that fill more than their windows: cut with a warning, or refused."""
    buckets: BucketSection = BucketSection()
    """Aspect-ratio buckets."""
    crop: Literal["center", "random"] = "center"
    """Where an image is cut to its bucket."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Chance of an image to be mirrored left to right."""
    variants: int | None = Field(default=None, ge=1, le=1000)
    """Random crops and captions are drawn from this many of each image instead of anew, so that they can be cached."""
    background: tuple[Shade, Shade, Shade] = (255, 255, 255)
    """Colour (red, green, blue) behind transparent pixels."""
    animated: Literal["error", "first"] = "error"
    """Animations and files of several pages: refused, or their first frame."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be read or used: refused, or dropped, counted and listed."""
    max_skipped: float = Field(default=0.1, ge=0, le=1)
    """Largest fraction of a source's images that `on_bad_image: skip` may drop."""
    cache: CacheSection = CacheSection()
    """Latents and prompt embeddings on disk."""
    workers: int = Field(default=0, ge=0, le=256)
    """Processes that read and crop images beside the training, where latents are not cached."""

    @property
    def resolutions(self) -> list[int]:
        """All of them, as a list."""
        return self.resolution if isinstance(self.resolution, list) else [self.resolution]

    @property
    def has_endless_crops(self) -> bool:
        """Whether each sample has a cut of its own, so that none can be computed ahead."""
        return self.crop == "random" and self.variants is None

    def rules(self, source: SourceSection) -> CaptionRules:
        """Caption rules of a source; `captions` of the whole section are for images, not for class images."""
        return source.captions or (self.captions if isinstance(source, ImageSection) else CaptionRules())

    @model_validator(mode="after")
    def _check_shares(self) -> "DataSection":
        shares = [source.share for source in self.sources]
        given = [share for share in shares if share is not None]
        if given and len(given) < len(shares):
            raise ValueError("`share` is given for some sources only: give it to all or to none")
        if given and abs(sum(given) - 1) > 1e-6:
            raise ValueError(f"the shares of the sources add up to {sum(given):g}, not to 1")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "DataSection":
        names = [source.name for source in self.sources if source.name]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"two sources have the `name` {twice!r}: give each another, as their losses are logged by it"
            )
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> "DataSection":
        if self.cache.latents is True and self.has_endless_crops:
            raise ValueError("`crop: random` has no end of crops to cache: say how many with `variants: 8`")
        random = [r for r in map(self.rules, self.sources) if r.shuffle or r.tag_dropout or r.wildcards]
        if self.cache.prompts is True and random and self.variants is None:
            raise ValueError("random captions have no end of prompts to cache: say how many with `variants: 8`")
        return self
