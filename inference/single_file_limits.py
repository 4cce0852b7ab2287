"""What a single-file checkpoint can say of a pipeline, and what not: it has tensors, a few marks, and no configs.

Whoever reads such a file takes the configs of its family. A folder whose model differs from those is refused; what
only concerns how one samples is told.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
from transformers import CLIPTextConfig, CLIPTokenizer

from ..configs.errors import UserError
from ..models.base import PipelineFiles
from ..models.original_names import MARKS
from ..models.part_tensors import pixels_of_a_latent
from ..models.single_file import clip_tokenizer, shipped_configs
from .adapter_file import ARCHITECTURES

INPAINTING = 9  # channels of such a UNet: latents, mask, and the latents of what is not masked
CLASSES = {
    ("sd", 4): "StableDiffusionPipeline",
    ("sd", INPAINTING): "StableDiffusionInpaintPipeline",
    ("sdxl", 4): "StableDiffusionXLPipeline",
    ("sdxl", INPAINTING): "StableDiffusionXLInpaintPipeline",
}
"""Pipelines that a single file can hold, by the UNet's input."""

_NOISE = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
          "trained_betas": None}  # fmt: skip
"""What decides the noise that the model knows, with diffusers' defaults."""
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""What a model predicts, as diffusers and as ModelSpec call it."""
_OF_SAMPLING = {"unet": ("upcast_attention",), "vae": ("sample_size", "force_upcast")}
"""Settings of a part that decide where one calculates in which type, not what."""
_CLIP = (
    *("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("layer_norm_eps", "max_position_embeddings", "vocab_size"),
)
_PARTS_OF_FILE = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True, slots=True)
class Held:
    """What a single file says of a pipeline folder beside its tensors."""

    kind: str
    configs: dict[str, Any]  # path in the folder -> its config
    header: dict[str, str]
    marks: tuple[str, ...] = ()  # tensors without numbers
    told: list[str] = field(default_factory=list)  # what the file does not hold and no number depends on


def held(files: PipelineFiles) -> Held:
    """UserError that names everything about the model that a single file could not say."""
    kind = _kind(files)
    shipped = shipped_configs(kind)
    configs = {name: files.config(name.partition("/")[0]) for name in shipped if name.endswith("/config.json")}
    shipped["unet/config.json"]["in_channels"] = configs["unet/config.json"].get("in_channels", 4)
    problems = [problem for name, own in configs.items() for problem in _refused(name, own, shipped[name])]
    for name in shipped:
        if name.startswith("tokenizer"):
            problems += _words(files, name, str(shipped[name]))
    scheduler = files.config("scheduler")
    problems += _noise(scheduler, shipped["scheduler/scheduler_config.json"])
    if not isinstance(size := configs["unet/config.json"].get("sample_size"), int):
        problems.append(f"its unet has sample_size {size}, a single file says that of squares only")
    if problems:
        raise UserError([f"{files.folder}: {problem}" for problem in problems])
    header = _header(kind, configs, scheduler, files.folder.resolve().name)
    return Held(kind, configs, header, _marks(kind, scheduler), [*_told(files, configs, shipped)])


def _kind(files: PipelineFiles) -> str:
    channels = files.config("unet").get("in_channels", 4)
    stem = next((stem for (stem, number), name in CLASSES.items() if (name, number) == (files.kind, channels)), None)
    if stem is None:
        raise UserError(
            f"{files.folder}: a {files.kind} with a UNet of {channels} channels has no single file that is known; "
            f"there are files of {', '.join(CLASSES.values())}"
        )
    if stem == "sdxl":
        return stem
    return "sd2" if files.config("unet").get("use_linear_projection") else "sd1"


def _refused(name: str, own: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    part = name.partition("/")[0]
    ours, theirs = _settings(part, own), _settings(part, usual)
    free = (*_OF_SAMPLING.get(part, ()), "sample_size")  # that of the UNet is in the header
    differ = sorted(key for key in ours if ours[key] != theirs[key] and key not in free)
    if differ:
        values = ", ".join(f"{key} {ours[key]} (readers take {theirs[key]})" for key in differ)
        yield f"a single file cannot say that its {part} has {values}"


def _settings(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that decide what a part computes, with the defaults of its class."""
    if part.startswith("text"):
        full: Any = CLIPTextConfig(**config)
        kept = (*_CLIP, "projection_dim") if "CLIPTextModelWithProjection" in config["architectures"] else _CLIP
        return {key: getattr(full, key) for key in kept}
    known = inspect.signature({"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part].__init__)
    defaults = {name: each.default for name, each in known.parameters.items() if name != "self"}
    return {name: _plain(config.get(name, default)) for name, default in defaults.items()}


def _plain(value: Any) -> Any:
    """One number for a list of the same ones, which diffusers takes as the same."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(set(map(str, value))) == 1 else list(value)


def _words(files: PipelineFiles, name: str, padding: str) -> Iterator[str]:
    own: Any = CLIPTokenizer.from_pretrained(files.folder, subfolder=name)
    usual = clip_tokenizer(padding)
    if own.get_vocab() != usual.get_vocab():
        yield f"its {name} has {len(own)} tokens that are not CLIP's {len(usual)}, which is what a single file means"
    elif own.pad_token != padding:
        yield f"its {name} pads with {own.pad_token!r}, which a single file cannot say: readers take {padding!r}"


def _noise(own: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    for key in _NOISE:
        if (value := {**_NOISE, **own}[key]) != usual[key]:
            yield f"its scheduler has {key} {value}, which a single file cannot say: readers take {usual[key]}"
    if (predicts := own.get("prediction_type", "epsilon")) not in PREDICTIONS:
        yield f"its model predicts {predicts!r}; a single file says {' or '.join(PREDICTIONS)}"
    elif own.get("rescale_betas_zero_snr") and predicts == "epsilon":
        yield "its noise ends without signal (rescale_betas_zero_snr), which a single file says of models of v alone"


def _marks(kind: str, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
    """As web UIs look for them; files of Stable Diffusion 2 have none, there the header tells v."""
    if scheduler.get("prediction_type") != "v_prediction":
        return ()
    if scheduler.get("rescale_betas_zero_snr"):
        return MARKS
    return () if kind == "sd2" else MARKS[:1]


def _header(kind: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any], title: str) -> dict[str, str]:
    """ModelSpec 1.0.1."""
    predicts = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
    detail = {"v": "-768-v", "epsilon": "-512"}[predicts] if kind == "sd2" else ""
    side = configs["unet/config.json"]["sample_size"] * pixels_of_a_latent(configs["vae/config.json"])
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{ARCHITECTURES[kind]}{detail}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": predicts,
    }


def _told(files: PipelineFiles, configs: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    """What readers will not know, though no number of the model depends on it."""
    for part, keys in _OF_SAMPLING.items():
        ours, theirs = (_settings(part, each[f"{part}/config.json"]) for each in (configs, shipped))
        for key in keys:
            if ours[key] != theirs[key]:
                yield f"{key} {ours[key]} of its {part} (readers take {theirs[key]})"
    ours, theirs = files.config("scheduler"), shipped["scheduler/scheduler_config.json"]
    if ours.get("_class_name") != theirs["_class_name"]:
        yield f"its sampler {ours.get('_class_name')} (readers choose their own)"
    parts = [name for name, value in files.index.items() if isinstance(value, list) and files.has(name)]
    yield from (f"its {part}" for part in parts if part not in _PARTS_OF_FILE)
    zeros, usual = (
        index.get("force_zeros_for_empty_prompt", True) for index in (files.index, shipped["model_index.json"])
    )
    if zeros != usual:
        yield f"force_zeros_for_empty_prompt {zeros} (readers take {usual})"
