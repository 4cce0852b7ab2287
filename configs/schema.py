"""The tree of settings of one run. Every field has a docstring, which is its help text and its entry in the schema."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

DType = Literal["fp32", "bf16", "fp16"]


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


class FolderSource(Section):
    """Images of one folder (and the folders in it), all with one caption."""

    path: str = Field(default=..., min_length=1)
    """Folder with images."""
    caption: str = Field(default=..., min_length=1)
    """Caption of every image, such as "a sks dog"."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Fraction of all training samples; give it to every source or to none (then each image counts the same)."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Factor on the loss of these samples."""


class PriorSource(Section):
    """Class images for DreamBooth's prior preservation, made with the base before training."""

    prior: str = Field(default=..., min_length=1)
    """Prompt and caption of the class images, such as "a dog"."""
    count: int = Field(default=100, ge=1)
    """How many class images."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Fraction of all training samples; 0.5 is the paper's one class image for each instance image."""
    loss_weight: float = Field(default=1.0, ge=0)
    """The paper's lambda: factor on the loss of the class images."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps of each class image."""
    guidance: float = Field(default=4.0, ge=0)
    """Classifier-free guidance scale of the class images."""


def _source_kind(value: Any) -> str:
    has_prior = "prior" in value if isinstance(value, dict) else hasattr(value, "prior")
    return "prior" if has_prior else "folder"


Source = Annotated[
    Annotated[FolderSource, Tag("folder")] | Annotated[PriorSource, Tag("prior")], Discriminator(_source_kind)
]


class DataSection(Section):
    """What is trained on."""

    resolution: int = Field(default=512, ge=16)
    """Height and width in pixels; images are scaled to cover it and cropped in the middle."""
    sources: list[Source] = Field(default=..., min_length=1)
    """Image folders (`path`, `caption`) and class images (`prior`, `count`)."""

    @model_validator(mode="after")
    def _check_shares(self) -> "DataSection":
        shares = [source.share for source in self.sources]
        given = [share for share in shares if share is not None]
        if given and len(given) < len(shares):
            raise ValueError("`share` is given for some sources only: give it to all or to none")
        if given and abs(sum(given) - 1) > 1e-6:
            raise ValueError(f"the shares of the sources add up to {sum(given):g}, not to 1")
        return self


class AdapterSection(Section):
    """What is trained."""

    method: str = "lora"
    """Adapter method: a file name in `adapters/methods/`."""
    rank: int = Field(default=8, ge=1)
    """Rank of each adapted module."""
    alpha: float = Field(default=8.0, gt=0)
    """Scale numerator: the update of a weight is alpha / rank * B A."""
    parts: dict[str, str] = Field(default={"unet": "attention"}, min_length=1)
    """Model part to preset of target modules, such as `unet: attention, text_encoder: attention`."""
    options: dict[str, Any] = {}
    """Options of the method."""


class NoiseSection(Section):
    """Noise and the weight of each noise level."""

    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weight losses by min(SNR, gamma) / SNR (Hang et al. 2023); 5 is usual."""
    debiased: bool = False
    """Weight losses by 1 / sqrt(SNR) (Yu et al. 2023): more for high noise, where colours and layout are decided."""
    offset: float = Field(default=0.0, ge=0)
    """Strength of one extra noise value for each channel of an image; 0.1 is usual where it is used."""

    @model_validator(mode="after")
    def _check_weights(self) -> "NoiseSection":
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("`min_snr_gamma` and `debiased` are two weights of the same thing: give one of them")
        return self


class OptimizerSection(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """Optimiser."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Highest learning rate."""
    part_learning_rates: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Another learning rate for a part, such as `text_encoder: 5.0e-5`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the steps, after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""


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
    deterministic: bool = True
    """Ask torch for deterministic kernels, so that a run can be repeated to the bit."""


class CheckpointSection(Section):
    """Saving the state of the run."""

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints stay on disk."""


class ValidationSection(Section):
    """Images sampled during training, by the same engine that `loraloom sample` uses."""

    every: int = Field(default=100, ge=1)
    """Steps between validations; there is always one at the end."""
    prompts: list[str] = []
    """Prompts; none means no validation images."""
    num_images: int = Field(default=4, ge=1)
    """Images of each prompt."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps."""
    guidance: float = Field(default=4.0, ge=0)
    """Classifier-free guidance scale."""
    seed: int = Field(default=0, ge=0)
    """Image k of a prompt has the seed `seed + k`."""


class OutputSection(Section):
    """Where results go."""

    dir: str = Field(default=..., min_length=1)
    """Run folder."""
    name: str = Field(default="adapter", pattern=r"^[\w.-]+$")
    """File name of the adapter, without ending."""
    formats: list[str] = Field(default=["diffusers", "kohya"], min_length=1)
    """File formats: file names in `adapters/formats/`."""
    dtype: DType = "fp32"
    """Type of the saved tensors."""


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
    optimizer: OptimizerSection = OptimizerSection()
    """Optimiser and learning-rate schedule."""
    loop: LoopSection
    """The training loop."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving the state of the run."""
    validation: ValidationSection = ValidationSection()
    """Images sampled during training."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where curves are logged, besides the run folder."""
    output: OutputSection
    """Where results go."""
