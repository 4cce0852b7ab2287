"""The tree of settings of one run. Every field has a docstring, which is its help text and its entry in the schema."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

DType = Literal["fp32", "bf16", "fp16"]
Side = Annotated[int, Field(ge=16)]
Sides = Annotated[
    Annotated[Side, Tag("<one>")] | Annotated[list[Side], Field(min_length=1), Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, list | tuple) else "<one>"),
]
Shade = Annotated[int, Field(ge=0, le=255)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, the values cannot be changed afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )


class ModelSection(Section):
    """The base model that stays frozen."""

    base: str = Field(default=..., min_length=1)
    """`pocket` (the embedded model), a diffusers pipeline folder, or a hub id."""
    family: str | None = None
    """Model family, such as `sd1`; found from the base's files when not given."""
    revision: str | None = None
    """Commit hash of a hub id; recorded in the run."""
    dtype: DType = "fp32"
    """Type of the frozen weights. Adapter weights always train in fp32."""
    adapters: list[str] = []
    """Adapter files that are merged into the base in memory and stay frozen, each as FILE or FILE:WEIGHT."""
    clip_skip: int = Field(default=0, ge=0, le=11)
    """Layers at the text encoder's end that are left out, counted as diffusers does; web UIs call 1 "clip skip 2"."""


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
    repeats: int = Field(default=1, ge=1)
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

    path: str = Field(default=..., min_length=1)
    """Folder with images. A caption file may hold several captions, one on each line."""
    image_column: str = Field(default="file_name", min_length=1)
    """Column of the metadata with paths from the folder."""
    caption_column: str = Field(default="text", min_length=1)
    """Column of the metadata with the caption, or a list of captions."""


class DatasetSource(ImageSection):
    """Whatever `datasets` opens: a hub dataset, a folder that it has saved, or one of its file formats."""

    dataset: str = Field(default=..., min_length=1)
    """Hub id, a folder of `save_to_disk`, or a folder that `load_dataset` reads."""
    subset: str | None = None
    """Configuration of a dataset that has several."""
    split: str = Field(default="train", min_length=1)
    """Split, also as a slice: `train[:500]`."""
    revision: str | None = None
    """Commit of a hub dataset."""
    image_column: str = Field(default="image", min_length=1)
    """Column with images."""
    caption_column: str = Field(default="text", min_length=1)
    """Column with the caption, or a list of captions."""


class ShardSource(ImageSection):
    """WebDataset shards on local disk; members with one stem make one sample (`0001.jpg`, `0001.txt`)."""

    shards: str = Field(default=..., min_length=1)
    """Tar files, as a path or pattern: `photos/*.tar`. Indexed once by offset and read at random."""


class PriorSource(SourceSection):
    """Class images for DreamBooth's prior preservation, made with the base before training."""

    prior: str = Field(default=..., min_length=1)
    """Prompt and caption of the class images, such as "a dog". A share of 0.5 and a `loss_weight` of the paper's
    lambda is what the paper does."""
    count: int = Field(default=100, ge=1)
    """How many class images."""
    generate: bool = True
    """Make those that are missing; otherwise too few of them are an error."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps of each class image."""
    guidance: float = Field(default=4.0, ge=0)
    """Classifier-free guidance scale of the class images."""


SOURCE_KINDS = {"path": "folder", "dataset": "dataset", "shards": "shards", "prior": "prior"}
"""The key that only this kind of source has, and the file in `data/sources/` that reads it."""


def source_kind(value: Any) -> str:
    """Which kind of source a section, or what stands in the file for one, is."""
    has = value.__contains__ if isinstance(value, dict) else lambda key: hasattr(value, key)
    return next((kind for key, kind in SOURCE_KINDS.items() if has(key)), "folder")


Source = Annotated[
    Annotated[FolderSource, Tag("folder")]
    | Annotated[DatasetSource, Tag("dataset")]
    | Annotated[ShardSource, Tag("shards")]
    | Annotated[PriorSource, Tag("prior")],
    Discriminator(source_kind),
]


class BucketSection(Section):
    """Aspect-ratio buckets: images of similar shape are trained together instead of cropped to a square."""

    enabled: bool = True
    """Without buckets every image is cropped to a square."""
    step: int | None = Field(default=None, ge=1)
    """Sides of buckets are multiples of this many pixels; an eighth of the resolution when not given."""
    max_aspect: float = Field(default=4.0, ge=1)
    """Longer images, as long side to short side, are refused."""
    max_upscale: float = Field(default=2.0, ge=1)
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
    dir: str | None = None
    """Folder; `$LORALOOM_CACHE` or `~/.cache/loraloom` when not given, where all runs share it."""
    keep_vae: bool = False
    """Keep the VAE in memory between validations instead of loading it each time."""


class DataSection(Section):
    """What is trained on."""

    resolution: Sides = 512
    """Side in pixels of a square of the trained area; several: every image is trained at each of them."""
    sources: list[Source] = Field(default=..., min_length=1)
    """Image folders (`path`), datasets (`dataset`), tar shards (`shards`) and class images (`prior`)."""
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
    variants: int | None = Field(default=None, ge=1)
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
    workers: int = Field(default=0, ge=0)
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


class TokenSection(Section):
    """A new word for the text encoders."""

    token: str = Field(default=..., pattern=r"^\S+$")
    """How it is written in captions and prompts, such as `<sks>`."""
    init: str | None = Field(default=None, min_length=1)
    """Words whose vectors it begins with; random ones when not given."""
    vectors: int = Field(default=1, ge=1, le=64)
    """How many tokens of a caption it takes."""


class AdapterSection(Section):
    """What is trained."""

    method: str = "lora"
    """Adapter method: a file name in `adapters/methods/`."""
    rank: int = Field(default=8, ge=1)
    """Rank of each adapted module."""
    alpha: float = Field(default=8.0, gt=0)
    """Scale numerator: the update of a weight is alpha / rank * B A."""
    parts: dict[str, str | list[str]] | None = Field(default=None, min_length=1)
    """Model part to target modules: presets joined by `+` (`attention+ff+conv`, `all-linear`; `all` for `full`), or a
    list of presets and of `re:` with a regular expression for module names. When not given: the denoiser's attention,
    or all of it for `full`."""
    tokens: list[TokenSection] = []
    """New words that are learnt: alone by `method: textual_inversion`, or beside an adapter (pivotal tuning)."""
    start_from: str | None = None
    """Adapter file of the same method, ranks and base, from whose weights training begins."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Another rank for modules in whose name (`unet.mid_block…`) the first matching regular expression is found."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Another alpha for modules, in the same way."""
    options: dict[str, Any] = {}
    """Options of the method."""

    @model_validator(mode="after")
    def _check_tokens(self) -> "AdapterSection":
        words = [section.token for section in self.tokens]
        if twice := next((word for word in words if words.count(word) > 1), None):
            raise ValueError(f"`tokens` has {twice!r} twice")
        return self


class NoiseSection(Section):
    """Noise and the weight of each noise level."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts, if you want to be sure of it: refused where its scheduler says something else."""
    zero_terminal_snr: bool = False
    """Noise schedule that ends in pure noise (Lin et al. 2023), for bases that predict v."""
    min_timestep: int = Field(default=0, ge=0)
    """First timestep that is trained; 0 is the least noise."""
    max_timestep: int | None = Field(default=None, ge=0)
    """Last timestep that is trained; the schedule's last one when not given (999)."""
    density: Literal["uniform", "logit_normal", "cosmap"] = "uniform"
    """How often each timestep is trained: all alike, or the middle ones more often (Esser et al. 2024)."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weight losses by min(SNR, gamma) / SNR (Hang et al. 2023); 5 is usual."""
    debiased: bool = False
    """Weight losses by 1 / sqrt(SNR) (Yu et al. 2023): more for high noise, where colours and layout are decided."""
    offset: float = Field(default=0.0, ge=0)
    """Strength of one extra noise value for each channel of an image; 0.1 is usual where it is used."""
    multires_octaves: int = Field(default=0, ge=0, le=10)
    """Octaves of coarser noise that are added (multi-resolution or pyramid noise); 6 is usual where it is used."""
    multires_discount: float = Field(default=0.3, gt=0, lt=1)
    """Strength of each octave as part of the finer one."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Extra noise that enters the model and is not in the target (Ning et al. 2023); 0.1 is usual where it is used."""

    @model_validator(mode="after")
    def _check_weights(self) -> "NoiseSection":
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("`min_snr_gamma` and `debiased` are two weights of the same thing: give one of them")
        return self


class LossSection(Section):
    """How far a prediction is from its target."""

    kind: Literal["mse", "huber", "smooth_l1"] = "mse"
    """Squared error, or one that grows more slowly for outliers: 2 d (sqrt(e^2 + d^2) - d), or that divided by d."""
    delta: float = Field(default=0.1, gt=0)
    """Error d from which on `huber` and `smooth_l1` grow more slowly."""
    delta_schedule: Literal["constant", "snr"] = "constant"
    """The same d at each noise level, or from 1 for clean images to `delta` for noise."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of what a mask leaves out, beside 1 for what it shows."""
    unmasked_probability: float = Field(default=0.0, ge=0, le=1)
    """Chance of a sample to be trained without its mask, so that the surroundings are not forgotten."""


class PartSection(Section):
    """How one part trains, where that is not as the others."""

    learning_rate: float | None = Field(default=None, ge=0)
    """Highest learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay."""
    stop_after: int | None = Field(default=None, ge=0)
    """Steps after which the part no longer trains; text encoders overfit before denoisers."""


class OptimizerSection(Section):
    """Optimiser and learning-rate schedule."""

    name: str = "adamw"
    """Optimiser: a file name in `train/optimizers/`, or the import path of a class, such as `torch.optim.RAdam`."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Highest learning rate."""
    parts: dict[str, PartSection] = {}
    """What is not the same for a part, such as `text_encoder: {learning_rate: 5.0e-5, stop_after: 500}`."""
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Learning rate of a LoRA's B as a multiple of A's (LoRA+); 16 is usual where it is used."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"] = (
        "constant"
    )
    """Learning rate over the steps, after the warm-up."""
    schedule_cycles: int = Field(default=1, ge=1)
    """Times that `cosine_with_restarts` falls."""
    schedule_power: float = Field(default=1.0, gt=0)
    """Exponent of `polynomial`."""
    schedule_rules: str = Field(default="1", pattern=r"^(\d*\.?\d+:\d+,)*\d*\.?\d+$")
    """Factors of `piecewise_constant` with the steps at which they end: `1:500,0.1:800,0.01`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Average the weights over the steps with this memory, and sample and export the average; 0.999 is usual."""
    options: dict[str, Any] = {}
    """Options of the optimiser."""


class LoopSection(Section):
    """The training loop."""

    steps: int = Field(default=..., ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=1, ge=1)
    """Samples of one optimiser step in the whole run (all processes together)."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples of one forward pass of one process; all of its share at once when not given."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward pass."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random number in the run."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; cores / local processes when not given. Other numbers of threads give other bits."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    deterministic: bool = True
    """Ask torch for deterministic kernels, so that a run can be repeated to the bit."""

    def samples_at_once(self, processes: int = 1) -> int:
        """Samples of one forward pass."""
        return self.micro_batch or max(1, self.batch_size // processes)


class GuardSection(Section):
    """What becomes of steps whose loss or gradients are not finite; they are never applied."""

    on_fault: Literal["stop", "skip"] = "stop"
    """End the run with exit code 3, or leave the step out and write its images to `quarantine.jsonl`."""
    max_skips: int = Field(default=10, ge=0)
    """Steps that may be left out in a run."""
    every: int | None = Field(default=None, ge=1)
    """Steps after which losses are read from the device, and faults seen; 1 on a CPU, 10 elsewhere when not given."""


class CheckpointSection(Section):
    """Saving the state of the run."""

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes after which a checkpoint is saved even if so many steps have not passed."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints stay on disk."""


class PromptSection(Section):
    """A validation prompt with settings of its own."""

    prompt: str
    """Prompt."""
    negative_prompt: str = ""
    """What the images should not show."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps; those of `validation` when not given."""
    guidance: float | None = Field(default=None, ge=0)
    """Classifier-free guidance scale; that of `validation` when not given."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the first image; that of `validation` when not given."""


Prompt = Annotated[
    Annotated[str, Tag("<words>")] | Annotated[PromptSection, Tag("<section>")],
    Discriminator(lambda value: "<section>" if isinstance(value, dict | PromptSection) else "<words>"),
]


class ValidationSection(Section):
    """Images sampled during training, by the engine that `loraloom sample` uses, and the loss on held-out images."""

    every: int = Field(default=100, ge=1)
    """Steps between validations; there is always one at the end."""
    at_start: bool = True
    """Also before the first step, by the base without the adapter, to compare with."""
    prompts: list[Prompt] = []
    """Prompts, or sections with `prompt` and settings of its own; none means no validation images."""
    num_images: int = Field(default=4, ge=1)
    """Images of each prompt."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps."""
    guidance: float = Field(default=4.0, ge=0)
    """Classifier-free guidance scale."""
    seed: int = Field(default=0, ge=0)
    """Image k of a prompt has the seed `seed + k`."""
    sources: list[Source] = []
    """Images that are not trained on, as in `data.sources`: their loss, with fixed noise, is logged each time."""
    timesteps: int = Field(default=8, ge=1)
    """Timesteps at which each of them is looked at."""
    patience: int | None = Field(default=None, ge=1)
    """Validations without a better held-out loss after which the run ends."""

    @property
    def sections(self) -> list[PromptSection]:
        """Prompts with all of their settings."""
        given = [PromptSection(prompt=each) if isinstance(each, str) else each for each in self.prompts]
        return [
            each.model_copy(
                update={
                    "steps": self.steps if each.steps is None else each.steps,
                    "guidance": self.guidance if each.guidance is None else each.guidance,
                    "seed": self.seed if each.seed is None else each.seed,
                }
            )
            for each in given
        ]

    @property
    def texts(self) -> list[str]:
        """All words that are encoded for the images."""
        return [text for each in self.sections for text in (each.prompt, each.negative_prompt)]

    @model_validator(mode="after")
    def _check_held_out(self) -> "ValidationSection":
        if self.patience is not None and not self.sources:
            raise ValueError("`patience` looks at the held-out loss: give held-out images as `sources`")
        if any(isinstance(source, PriorSource) for source in self.sources):
            raise ValueError("`sources` of held-out images cannot be class images, which the base makes itself")
        return self


class OutputSection(Section):
    """Where results go."""

    dir: str = Field(default=..., min_length=1)
    """Run folder."""
    name: str = Field(default="adapter", pattern=r"^[\w.-]+$")
    """File name of the adapter, without ending."""
    formats: list[str] = []
    """File formats: file names in `adapters/formats/`; those that suit the method when not given."""
    dtype: DType = "fp32"
    """Type of the saved tensors."""
    weights: Literal["last", "best"] = "last"
    """Those of the last step, or of the validation with the best held-out loss."""
    metadata: Literal["minimal", "full"] = "minimal"
    """What the results tell of the data: `minimal` names no prompt, caption, trigger word or folder; `full` tells
    validation prompts and trigger words too."""
    push_to: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """Repository on the Hugging Face hub (OWNER/NAME) that files and model card go to at the end; made, and private,
    if there is none."""


class RunConfig(Section):
    """One training run."""

    model: ModelSection
    """The base model that stays frozen."""
    data: DataSection
    """What is trained on."""
    adapter: AdapterSection = AdapterSection()
    """What is trained."""
    noise: NoiseSection = NoiseSection()
    """Noise and the weight of each noise level."""
    loss: LossSection = LossSection()
    """How far a prediction is from its target."""
    optimizer: OptimizerSection = OptimizerSection()
    """Optimiser and learning-rate schedule."""
    loop: LoopSection
    """The training loop."""
    guard: GuardSection = GuardSection()
    """What becomes of steps whose loss or gradients are not finite."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving the state of the run."""
    validation: ValidationSection = ValidationSection()
    """Images sampled during training."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where curves are logged, besides the run folder."""
    output: OutputSection
    """Where results go."""

    @model_validator(mode="after")
    def _check_best(self) -> "RunConfig":
        if self.output.weights == "best" and not self.validation.sources:
            raise ValueError("`output.weights: best` looks at the held-out loss: give images as `validation.sources`")
        return self
