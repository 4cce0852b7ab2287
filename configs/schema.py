"""The tree of settings of one run. Every field has a docstring, which is its help text and its entry in the schema."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from .data_sections import DataSection, PriorSource, Source
from .dtypes import DType
from .section import Batch, Denoising, Guidance, PathText, PatternText, Rank, Revision, Section, Seed, Threads


class ModelSection(Section):
    """The base model that stays frozen."""

    base: PathText = Field(default=..., min_length=1)
    """`pocket` (the embedded model), a diffusers pipeline folder, a `.safetensors` checkpoint, or a hub id."""
    family: str | None = None
    """Model family, such as `sd1`; found from the base's files when not given."""
    revision: Revision | None = None
    """Commit hash of a hub id; recorded in the run."""
    dtype: DType = "fp32"
    """Type of the frozen weights. Adapter weights always train in fp32."""
    adapters: list[PathText] = []
    """Adapter files that are merged into the base in memory and stay frozen, each as FILE or FILE:WEIGHT."""
    clip_skip: int = Field(default=0, ge=0, le=11)
    """Layers at the text encoder's end that are left out, counted as diffusers does; web UIs call 1 "clip skip 2"."""


class TokenSection(Section):
    """A new word for the text encoders."""

    token: str = Field(default=..., pattern=r"^\S+$")
    """How it is written in captions and prompts, such as `<sks>`."""
    init: str | None = Field(default=None, min_length=1)
    """Words whose vectors it begins with; random ones when not given."""
    vectors: int = Field(default=1, ge=1, le=64)
    """How many tokens of a caption it takes."""


OF_RANKS: dict[str, Any] = {"rank": 8, "rank_pattern": {}, "alpha_pattern": {}}
"""What `alpha: rank` looks at, and what stands there when it is not given."""


def _or_rank(schema: dict[str, Any]) -> None:
    """A number, or the word for the rank."""
    number = {name: schema.pop(name) for name in ("type", "exclusiveMinimum") if name in schema}
    schema["anyOf"] = [number, {"const": "rank"}]


class AdapterSection(Section):
    """What is trained."""

    method: str = "lora"
    """Adapter method: a file name in `adapters/methods/`."""
    rank: Rank = 8
    """Rank of each adapted module."""
    alpha: float = Field(default=8.0, gt=0, json_schema_extra=_or_rank)
    """Scale numerator: the update of a weight is alpha / rank * B A. `rank` is the rank of each module, so that another
    rank trains as strongly; 8 when not given."""
    parts: dict[str, str | list[str]] | None = Field(default=None, min_length=1)
    """Model part to target modules: presets joined by `+` (`attention+ff+conv`, `all-linear`; `all` for `full`), or a
    list of presets and of `re:` with a regular expression for module names. When not given: the denoiser's attention,
    or all of it for `full`."""
    tokens: list[TokenSection] = []
    """New words that are learnt: alone by `method: textual_inversion`, or beside an adapter (pivotal tuning)."""
    start_from: PathText | None = None
    """Adapter file of the same method, ranks and base, from whose weights training begins."""
    rank_pattern: dict[PatternText, Rank] = {}
    """Another rank for modules in whose name (`unet.mid_block…`) the first matching regular expression is found."""
    alpha_pattern: dict[PatternText, Annotated[float, Field(gt=0)]] = {}
    """Another alpha for modules, in the same way."""
    options: dict[str, Any] = {}
    """Options of the method."""

    @model_validator(mode="before")
    @classmethod
    def _take_rank(cls, values: Any) -> Any:
        """`alpha: rank` as numbers: a run's config.yaml, its records and its files hold what was trained."""
        if not isinstance(values, dict) or values.get("alpha") != "rank":
            return values
        rest = {key: value for key, value in values.items() if key != "alpha"}
        rank, ranks, alphas = (values.get(key, otherwise) for key, otherwise in OF_RANKS.items())
        if not isinstance(rank, int) or not isinstance(ranks, dict) or not isinstance(alphas, dict):
            return rest  # the rank itself is what is wrong
        others = {pattern: own for pattern, own in ranks.items() if pattern not in alphas}
        return rest | {"alpha": rank} | ({"alpha_pattern": alphas | others} if others else {})

    @model_validator(mode="after")
    def _check_patterns(self) -> "AdapterSection":
        if (largest := max(self.rank, *self.rank_pattern.values(), 1)) > 16_384 and self.method != "lokr":
            raise ValueError(f"rank {largest} is more than 16,384: only LoKr, which then takes whole factors, has it")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(f"`{name}`: {pattern[:60]!r} is no regular expression ({error})") from error
        return self

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
    """Weight losses by min(SNR, gamma) / SNR (Hang et al. 2023); 5 is usual. For bases that predict v the weight of
    pure noise, the last timestep with `zero_terminal_snr`, is 0."""
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


MOVED_OPTIONS = ("delta", "delta_schedule")
"""Keys of `loss` that are keys of `loss.options` now."""


class LossSection(Section):
    """How far a prediction is from its target."""

    kind: str = "mse"
    """The error of each value: a file name in `train/losses/`, such as `mse`, `huber` and `smooth_l1`."""
    options: dict[str, Any] = {}
    """Options of the kind, such as `delta`."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight of what a mask leaves out, beside 1 for what it shows."""
    unmasked_probability: float = Field(default=0.0, ge=0, le=1)
    """Chance of a sample to be trained without its mask, so that the surroundings are not forgotten."""

    @model_validator(mode="before")
    @classmethod
    def _move_options(cls, values: Any) -> Any:
        """Version 0.1.0 had the options of the robust kinds in this section."""
        if not isinstance(values, dict) or not values.keys() & set(MOVED_OPTIONS):
            return values
        if not isinstance(values.get("options", {}), dict):
            return values  # the options themselves are what is wrong
        own = {name: values[name] for name in MOVED_OPTIONS if name in values and values.get("kind", "mse") != "mse"}
        rest = {name: value for name, value in values.items() if name not in MOVED_OPTIONS}
        return rest | ({"options": own | values.get("options", {})} if own else {})


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
    """Decoupled weight decay, towards 0: also of DoRA's magnitudes and of new words, which it makes smaller than they
    began. 0 for either of them, or in `parts`, leaves them alone."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"] = (
        "constant"
    )
    """Learning rate over the steps, after the warm-up."""
    schedule_cycles: int = Field(default=1, ge=1, le=10**6)
    """Times that `cosine_with_restarts` falls."""
    schedule_power: float = Field(default=1.0, gt=0)
    """Exponent of `polynomial`."""
    schedule_rules: str = Field(
        default="1", max_length=10_000, pattern=r"^(\d{0,9}\.?\d{1,18}:\d{1,18},)*\d{0,9}\.?\d{1,18}$"
    )
    """Factors of `piecewise_constant` with the steps at which they end: `1:500,0.1:800,0.01`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Average the weights over the steps with this memory, and sample and export the average; 0.999 is usual."""
    options: dict[str, Any] = {}
    """Options of the optimiser."""


class LoopSection(Section):
    """The training loop."""

    steps: int = Field(default=..., ge=1, le=10**9)
    """Optimiser steps."""
    batch_size: Batch = 1
    """Samples of one optimiser step in the whole run (all processes together)."""
    micro_batch: Batch | None = None
    """Samples of one forward pass of one process; all of its share at once when not given."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward pass."""
    seed: Seed = 0
    """Seed of every random number in the run."""
    threads: Threads | None = None
    """CPU threads; `$OMP_NUM_THREADS`, or cores / local processes, when not given. Other numbers give other bits."""
    gradient_checkpointing: bool | list[str] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time. A list of
    blocks of the denoiser, such as `down_blocks.0`, does so only there: those at full resolution keep the most."""
    deterministic: bool = True
    """Ask torch for deterministic kernels: on CPUs a run can be repeated to the bit; on GPUs the backward pass of
    memory-efficient attention stays as it is, with a warning of torch."""
    fast: bool = True
    """Layers and an AdamW that do the sums of diffusers', PEFT's and torch's in less time, to rounding."""
    compile: bool | Literal["model"] = False
    """Compile the denoiser's repeated blocks, for each size of bucket: minutes at the start, less time in each step.
    `model` compiles the denoiser in one piece, which takes longer and is worth more where it is small."""

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
    steps: Denoising | None = None
    """Denoising steps; those of `validation` when not given."""
    guidance: Guidance | None = None
    """Classifier-free guidance scale; that of `validation` when not given."""
    seed: Seed | None = None
    """Seed of the first image; that of `validation` when not given."""


Prompt = Annotated[
    Annotated[str, Tag("<words>")] | Annotated[PromptSection, Tag("<section>")],
    Discriminator(lambda value: "<section>" if isinstance(value, dict | PromptSection) else "<words>"),
]


ClassPath = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$")]


class CallbackSection(Section):
    """A callback of an installed package."""

    use: ClassPath = Field(default=...)
    """Import path of its class: `package.module:Class`."""
    options: dict[str, Any] = {}
    """Arguments of the class."""


OwnCallback = Annotated[
    Annotated[ClassPath, Tag("<path>")] | Annotated[CallbackSection, Tag("<section>")],
    Discriminator(lambda value: "<section>" if isinstance(value, dict | CallbackSection) else "<path>"),
]


class ValidationSection(Section):
    """Images sampled during training, by the engine that `loraloom sample` uses, and the loss on held-out images."""

    every: int = Field(default=100, ge=1)
    """Steps between validations; there is always one at the end."""
    at_start: bool = True
    """Also before the first step, by the base without the adapter, to compare with."""
    prompts: list[Prompt] = []
    """Prompts, or sections with `prompt` and settings of its own; none means no validation images."""
    num_images: int = Field(default=4, ge=1, le=10_000)
    """Images of each prompt."""
    steps: Denoising = 20
    """Denoising steps."""
    guidance: Guidance = 4.0
    """Classifier-free guidance scale."""
    seed: Seed = 0
    """Image k of a prompt has the seed `seed + k`."""
    sources: list[Source] = []
    """Images that are not trained on, as in `data.sources`: their loss, with fixed noise, is logged each time."""
    timesteps: int = Field(default=8, ge=1, le=1000)
    """Timesteps at which each of them is looked at."""
    callbacks: list[OwnCallback] = []
    """Callbacks of installed packages for sampling: `package.module:Class`, or a section with `use` and `options`."""
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


RESERVED = (
    *("checkpoints", "logs", "samples", "replay", "config", "config.yaml", "run", "run.json", "report", "report.html"),
    *("readme", "readme.md", "quarantine", "quarantine.jsonl", "stop", "save", ".lock", ".loraloom.jsonl"),
)
"""What a run folder has under these names, or may have: no adapter is called so."""


def checked_name(name: str) -> str:
    """A name that a file of the run's own cannot have. ValueError for the others."""
    if not name.strip(".") or name.lower() in RESERVED or re.fullmatch(r"prior-[0-9a-f]{12}", name):
        raise ValueError(f"{name!r} is a name that the run folder uses itself, or none for a file: take another")
    if name.startswith("-"):
        raise ValueError(f"{name!r} begins as an option does, which its file would be taken for: take another")
    return name


class OutputSection(Section):
    """Where results go."""

    dir: PathText = Field(default=..., min_length=1)
    """Run folder."""
    name: Annotated[str, AfterValidator(checked_name)] = Field(default="adapter", pattern=r"^[\w.-]+$")
    """File name of the adapter, without ending: none that the run folder has a file or folder of."""
    formats: list[str] = []
    """File formats: file names in `adapters/formats/`; those that suit the method when not given."""
    dtype: DType = "fp32"
    """Type of the saved tensors."""
    weights: Literal["last", "best"] = "last"
    """Those of the last step, or of the validation with the best held-out loss."""
    metadata: Literal["minimal", "full"] = "minimal"
    """What the results tell of the data: `minimal` names no prompt, caption, trigger word or folder; `full` tells
    prompts, trigger words and the captions of the config too, but no folder."""
    push_to: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """Repository on the Hugging Face hub (OWNER/NAME) that files and model card go to at the end; made, and private,
    if there is none."""


Tracker = Literal["tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]


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
    callbacks: list[OwnCallback] = []
    """Callbacks of installed packages, `package.module:Class` or a section with `use` and `options`; they see each step
    before ours."""
    trackers: list[Tracker] = ["tensorboard"]
    """Where curves are logged, besides the run folder: those that accelerate knows. They are told once a second."""
    output: OutputSection
    """Where results go."""

    @model_validator(mode="after")
    def _check_best(self) -> "RunConfig":
        if self.output.weights == "best" and not self.validation.sources:
            raise ValueError("`output.weights: best` looks at the held-out loss: give images as `validation.sources`")
        return self
