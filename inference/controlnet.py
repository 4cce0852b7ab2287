"""ControlNets (Zhang et al. 2023) beside a base: loaded from folders, single files or the hub, and its pipeline with
them, which shares every part with the engine's.

    engine = Engine.load("models/sd15", scheduler="unipc")
    pipeline = engine.pipeline_with(load_controlnets(["canny.safetensors"]))
    image = pipeline("a red star", image=edges, controlnet_conditioning_scale=0.8).images[0]

Adapters that are attached to the engine work in it too, as they sit in the UNet and the text encoders that are shared.
"""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.loaders import single_file_utils as tables
from PIL import Image
from torch import Tensor

from ..adapters.stored import load_file
from ..configs.dtypes import torch_dtype
from ..configs.errors import UserError
from ..configs.faults import is_out_of_memory
from ..models.aligned import align
from ..models.family import ModelFamily, Parts
from ..models.original_names import TEXT_ENCODERS
from ..models.part_files import check_part
from ..models.single_file import PICKLES, SUFFIX, shipped_configs
from .given_pictures import shown_picture

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")
_OURS, _ORIGINAL = "controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"
_PREFIX = "control_model."
_OTHER_MODELS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema.")
"""The base, which the first ControlNets carried along."""
_SHARED = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
"""Settings that a ControlNet has from its base's UNet: they decide what goes into it and what comes out."""


@dataclass(frozen=True, slots=True)
class Control:
    """A picture that the sampling follows."""

    model: ControlNetModel
    image: Image.Image  # what the ControlNet was trained on: edges, depth, …
    scale: float = 1.0  # how strongly

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", shown_picture(self.image))  # frozen


def load_controlnets(sources: Sequence[str], dtype: str = "fp32") -> list[ControlNetModel]:
    """From diffusers folders, single files (.safetensors, original or diffusers' names), or hub ids `a/b@commit`.

    Frozen, on the CPU, in `dtype` (fp32, bf16, fp16). Nothing is fetched for what lies here. UserError for a pickle, a
    source that is not there, and one that is no ControlNet.
    """
    return [_load(source, torch_dtype(dtype)) for source in sources]


def together(family: ModelFamily, parts: Parts, controlnets: Sequence[ControlNetModel]) -> Any:
    """What a pipeline takes for them: one, or several as one. UserError for none, and for one of another family."""
    if not controlnets:
        raise UserError("no ControlNet was given")
    for controlnet in controlnets:
        check_fits(family, parts, controlnet)
    return MultiControlNetModel(list(controlnets)) if len(controlnets) > 1 else controlnets[0]


def controlnet_task(task: str) -> str:
    """What a family calls its pipeline for a task with ControlNets."""
    return "controlnet" if task == "text_to_image" else f"controlnet_{task}"


def check_fits(family: ModelFamily, parts: Parts, controlnet: ControlNetModel) -> None:
    """UserError for a ControlNet of another family."""
    config: Any = controlnet.config
    own: Any = parts[family.denoiser].config
    odd = [name for name in _SHARED if _plain(config[name]) != _plain(own[name])]
    if odd:
        values = ", ".join(f"{name} {_plain(config[name])} instead of {_plain(own[name])}" for name in odd)
        raise UserError(
            f"ControlNet {config['_name_or_path']}: is for {_family_of(config['cross_attention_dim'])}, "
            f"the base is {family.name} ({values})"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _family_of(width: int) -> str:
    """By the numbers of a token's embedding."""
    kinds = [kind for kind in TEXT_ENCODERS if _unet_config(kind)["cross_attention_dim"] == width]
    return kinds[0] if kinds else f"a model of {width} numbers for each token"


def _unet_config(kind: str) -> dict[str, Any]:
    return shipped_configs(kind)["unet/config.json"]


def _load(source: str, dtype: torch.dtype) -> ControlNetModel:
    suffix = Path(source).suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"ControlNet {source}: a pickle can run code when it is opened; give a .safetensors file")
    try:
        if suffix == SUFFIX:
            model = _from_file(Path(source), dtype)
        elif Path(source).is_dir():
            model = _from_folder(source, dtype)
        else:
            model = _from_hub(source, dtype)
    except UserError as error:
        raise UserError([f"ControlNet {source}: {problem}" for problem in error.problems]) from error
    model.register_to_config(_name_or_path=source)
    align(model)
    return model.requires_grad_(False).eval()


def _from_folder(folder: str, dtype: torch.dtype, **options: Any) -> Any:
    if Path(folder).is_dir():
        check_part(Path(folder))
    try:
        config: Any = ControlNetModel.load_config(folder, **options)
        if (found := config.get("_class_name")) != "ControlNetModel":
            raise UserError(f"is a {found}, not a ControlNetModel")
        return ControlNetModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **options)
    except Exception as error:  # whatever libraries raise for files that are not as they wrote them
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def _from_hub(source: str, dtype: torch.dtype) -> Any:
    found = _HUB_ID.fullmatch(source)
    if found is None:
        raise UserError(
            "there is no such folder; give one, a .safetensors file, or a hub id with its commit, a/b@1f2e…"
        )
    return _from_folder(found["repository"], dtype, revision=found["revision"])


def _from_file(file: Path, dtype: torch.dtype) -> Any:
    """Its config is that of its family, with what the tensors tell of this one."""
    stored = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(file)[0].items()}
    if not {_OURS, _ORIGINAL} & stored.keys() or any("lora_controlnet" in name for name in stored):
        raise UserError(f"is no ControlNet: {_content(stored)}")
    kind = _kind_of(stored)
    usual = _unet_config(kind)
    tensors = stored if _OURS in stored else _renamed(stored, usual)
    config = _config(usual, tensors)
    with torch.device("meta"):
        model: Any = ControlNetModel.from_config(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(f"lacks {len(missing)} of {len(wanted)} tensors of a {kind} ControlNet, first {missing[0]}")
    if strange := sorted(tensors.keys() - wanted.keys()):
        raise UserError(f"has {len(strange)} tensors that no {kind} ControlNet has, first {strange[0]}")
    if odd := sorted(name for name, shape in wanted.items() if tensors[name].shape != shape):
        shapes = tuple(tensors[odd[0]].shape), tuple(wanted[odd[0]])
        raise UserError(f"{odd[0]} is {shapes[0]}, in a {kind} ControlNet it is {shapes[1]}")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model


def _content(names: Collection[str]) -> str:
    """What a file is instead."""
    if any("lora_controlnet" in name for name in names):
        return "it holds a control-LoRA, which only has the differences from its base's UNet"
    if any("lora" in name for name in names):
        return "it holds an adapter"
    if any(name.startswith("model.diffusion_model.") for name in names):
        return "it holds a whole checkpoint"
    return f"its {len(names)} tensors are of something else"


def _kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The family, by the width of what cross-attention reads; SDXL's small ones have none, but know sizes."""
    widths = {tensor.shape[1] for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")}
    for kind in TEXT_ENCODERS:
        if widths == {_unet_config(kind)["cross_attention_dim"]}:
            return kind
    if not widths and any(name.startswith(("add_embedding.", "label_emb.")) for name in tensors):
        return "sdxl"
    raise UserError(f"is for no family that is known: it reads {sorted(widths) or 'no'} numbers for each token")


def _renamed(stored: Mapping[str, Tensor], usual: Mapping[str, Any]) -> dict[str, Tensor]:
    """By diffusers' own tables; the one of the size conditions is there, but is not used by its converter."""
    controlnet = {name: tensor for name, tensor in stored.items() if not name.startswith(_OTHER_MODELS)}
    renamed = tables.convert_controlnet_checkpoint(dict(controlnet), dict(usual))
    sizes = tables.DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]
    return {
        **{name: tensor for name, tensor in renamed.items() if tensor is not None},
        **{name: controlnet[original] for name, original in sizes.items() if original in controlnet},
    }


def _config(usual: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a ControlNet with these tensors; `usual` is the config of its base's UNet."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    blocks = range(len(usual["block_out_channels"]))
    depths = [_depth(tensors, f"down_blocks.{block}.attentions.0.transformer_blocks.") for block in blocks]
    hints = [name for name in tensors if re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d*[13579]\.weight", name)]
    middle = _depth(tensors, "mid_block.attentions.0.transformer_blocks.")  # diffusers counts it with the last block
    widths = [tensors[_OURS], *(tensors[name] for name in sorted(hints, key=lambda name: int(name.split(".")[2])))]
    return {
        **{name: value for name, value in usual.items() if name in known},
        "in_channels": tensors["conv_in.weight"].shape[1],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "transformer_layers_per_block": [depth or 1 for depth in (*depths[:-1], depths[-1] or middle)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "conditioning_channels": tensors[_OURS].shape[1],
        "conditioning_embedding_out_channels": [tensor.shape[0] for tensor in widths],
    }


def _depth(tensors: Collection[str], start: str) -> int:
    """How many numbered layers follow a name."""
    return len({name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)})
